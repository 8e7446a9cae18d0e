// All of hvd_syncbn/csrc/cuda as one translation unit of plain C++, with the emulated device's settings.
#include "backward_apply.cu"
#include "backward_moments.cu"
#include "forward_apply.cu"
#include "forward_moments.cu"
#include "reports.cu"

extern "C" __attribute__((visibility("default"))) void cuda_emulator_set(int multiprocessors, int resident,
                                                                         int shared_bytes, int float64_ratio,
                                                                         uint64_t seed) {
  cuda_emulator::Machine::get().use({multiprocessors, resident, shared_bytes, float64_ratio});
  cuda_emulator::Machine::get().seed = seed;
}

// Blocks of the last launch; and how often the occupancy of a kernel was asked for.
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulator_blocks() {
  return cuda_emulator::Machine::get().blocks;
}
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulator_occupancy_calls() {
  return cuda_emulator::Machine::get().occupancy_calls;
}

// Of the last launch: elements that became integers, and lanes that were added up again in float64.
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulator_integers() {
  return cuda_emulator::Machine::get().integers;
}
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulator_float64_lanes() {
  return cuda_emulator::Machine::get().float64_lanes;
}

// Addresses that the last launch prefetched, up to `most` of them into `addresses`; returns how many there were.
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulator_prefetched(uint64_t* addresses, int64_t most) {
  const auto& prefetched = cuda_emulator::Machine::get().prefetched;
  const int64_t count = static_cast<int64_t>(prefetched.size());
  for (int64_t i = 0; i < count && i < most; ++i) addresses[i] = reinterpret_cast<uint64_t>(prefetched[i]);
  return count;
}
