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
