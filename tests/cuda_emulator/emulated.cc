// All of hvd_syncbn/csrc/cuda as one translation unit of plain C++, with the emulated device's settings.
#include "backward_apply.cu"
#include "backward_moments.cu"
#include "forward_apply.cu"
#include "forward_moments.cu"
#include "reports.cu"

extern "C" __attribute__((visibility("default"))) void cuda_emulator_set(int multiprocessors, uint64_t seed) {
  cuda_emulator::Machine::get().multiprocessors = multiprocessors;
  cuda_emulator::Machine::get().seed = seed;
}

// Addresses that the last launch prefetched, up to `most` of them into `addresses`; returns how many there were.
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulator_prefetched(uint64_t* addresses, int64_t most) {
  const auto& prefetched = cuda_emulator::Machine::get().prefetched;
  const int64_t count = static_cast<int64_t>(prefetched.size());
  for (int64_t i = 0; i < count && i < most; ++i) addresses[i] = reinterpret_cast<uint64_t>(prefetched[i]);
  return count;
}
