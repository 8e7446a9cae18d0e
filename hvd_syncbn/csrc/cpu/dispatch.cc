// The C interface: selects the instruction-set path and sets the floating-point environment to IEEE.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../common/finish.h"
#include "kernels.h"

namespace hvd_syncbn {
namespace {

struct Path {
  const char* name;
  bool (*runs_here)();
  decltype(&baseline::forward_moments) forward_moments;
  decltype(&baseline::backward_moments) backward_moments;
  decltype(&baseline::forward_apply) forward_apply;
  decltype(&baseline::backward_apply) backward_apply;
  decltype(&baseline::forward_finish) forward_finish;
  decltype(&baseline::backward_params) backward_params;
  decltype(&baseline::backward_finish) backward_finish;
};

#define HVD_SYNCBN_KERNELS(path)                                                                                  \
  path::forward_moments, path::backward_moments, path::forward_apply, path::backward_apply, path::forward_finish, \
      path::backward_params, path::backward_finish

// In ascending order of preference.
const Path kPaths[] = {
    {"baseline", [] { return true; }, HVD_SYNCBN_KERNELS(baseline)},
#if defined(__x86_64__)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     HVD_SYNCBN_KERNELS(avx2)},
    {"avx512", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, HVD_SYNCBN_KERNELS(avx512)},
#endif
};

const Path* find(const char* name) {
  for (const Path& path : kPaths) {
    if (path.runs_here() && std::strcmp(path.name, name) == 0) return &path;
  }
  return nullptr;
}

const Path* initial() {
  const char* const wanted = std::getenv("HVD_SYNCBN_ISA");
  if (wanted != nullptr) {
    if (const Path* const path = find(wanted)) return path;
  }
  const Path* best = nullptr;
  for (const Path& path : kPaths) {
    if (path.runs_here()) best = &path;
  }
  return best;
}

std::atomic<const Path*>& current() {
  static std::atomic<const Path*> path(initial());
  return path;
}

const Path& path() { return *current().load(std::memory_order_relaxed); }

// TensorFlow's threads flush denormals to zero, and PyTorch's may. The core must not, and must restore the setting.
class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // all exceptions masked, to nearest, no FTZ, no DAZ
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~IeeeArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

bool channels_innermost(const hvd_syncbn_shape* shape) {
  return shape->layout == HVD_SYNCBN_CHANNELS_LAST || shape->s == 1;
}

int64_t element_size(int32_t dtype) { return dtype == HVD_SYNCBN_FLOAT64 ? 8 : dtype == HVD_SYNCBN_FLOAT32 ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void close(int64_t c, uint32_t digest, int64_t count, int64_t* packet) {
  for (int i = 0; i < kHeader; ++i) packet[i] = i == 1 ? count : header_word(i, digest);
  for (int64_t i = 0; i < c; ++i) {
    normalize(packet + moment_a_at(c, i));
    normalize(packet + moment_b_at(c, i));
  }
}

}  // namespace
}  // namespace hvd_syncbn

using namespace hvd_syncbn;

extern "C" {

int64_t hvd_syncbn_packet_size(int64_t channels) { return packet_size(channels); }

int64_t hvd_syncbn_coefficients_size(const hvd_syncbn_shape* shape) {
  return 6 * shape->c * (shape->dtype == HVD_SYNCBN_FLOAT64 ? 8 : 4);
}

int64_t hvd_syncbn_moments_units(const hvd_syncbn_shape* shape) {
  return ceil_div(shape->c, tile_width(*shape)) * shape->n * ceil_div(shape->s, kPiece);
}

int64_t hvd_syncbn_apply_units(const hvd_syncbn_shape* shape) {
  if (shape->c == 0) return 0;
  return channels_innermost(shape) ? shape->n * shape->s : shape->n * shape->c * ceil_div(shape->s, kPiece);
}

int64_t hvd_syncbn_moments_unit_bytes(const hvd_syncbn_shape* shape) {
  const int64_t tile = tile_width(*shape), channels = shape->c < tile ? shape->c : tile;
  return channels * (shape->s < kPiece ? shape->s : kPiece) * element_size(shape->dtype);
}

int64_t hvd_syncbn_apply_unit_bytes(const hvd_syncbn_shape* shape) {
  const int64_t elements = channels_innermost(shape) ? shape->c : shape->s < kPiece ? shape->s : kPiece;
  return elements * element_size(shape->dtype);
}

void hvd_syncbn_forward_moments(const hvd_syncbn_shape* shape, const void* x, const uint8_t* mask, int64_t begin,
                                int64_t end, int64_t* packet) {
  const IeeeArithmetic ieee;
  path().forward_moments(*shape, x, mask, begin, end, packet);
}

void hvd_syncbn_backward_moments(const hvd_syncbn_shape* shape, const void* x, const void* dy, const void* y,
                                 const double* stats, int64_t begin, int64_t end, int64_t* packet) {
  const IeeeArithmetic ieee;
  path().backward_moments(*shape, x, dy, y, stats, begin, end, packet);
}

int64_t hvd_syncbn_call_number(const char* name, int32_t needs_gradient) {
  uint64_t hash = kFnvStart;
  for (; *name != '\0'; ++name) hash = fnv1a(hash, static_cast<unsigned char>(*name));
  return static_cast<int64_t>(hash << 1 | (needs_gradient != 0));
}

void hvd_syncbn_forward_close(const hvd_syncbn_shape* shape, double eps, int64_t call, int64_t count, int64_t* packet) {
  close(shape->c, forward_digest(eps, shape->dtype, shape->c, call), count, packet);
}

void hvd_syncbn_backward_close(const hvd_syncbn_shape* shape, const double* stats, int64_t count, int64_t* packet) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < shape->c; ++i) sum += call_hash(stats[i], stats[shape->c + i], i);
  close(shape->c, backward_digest(sum), count, packet);
}

int32_t hvd_syncbn_check_packet(int32_t direction, const int64_t* packet) { return check_header(direction, packet); }

int64_t hvd_syncbn_nonfinite_channels(int64_t c, const int64_t* packet) {
  int64_t channels = 0;
  for (int64_t i = 0; i < c && packet[2] != 0; ++i) channels += packet[nonfinite_at(i)] != 0;
  return channels;
}

int64_t hvd_syncbn_count_nonfinite(const char* layer, int64_t batches) {
  static std::mutex mutex;
  static auto* const counts = new std::map<std::string, int64_t>;  // never destroyed: threads may outlive main
  const std::lock_guard<std::mutex> lock(mutex);
  if (batches == 0 && counts->find(layer) == counts->end()) return 0;
  return (*counts)[layer] += batches;
}

void hvd_syncbn_forward_finish(const hvd_syncbn_shape* shape, double eps, const int64_t* packet,
                               hvd_syncbn_vector gamma, hvd_syncbn_vector beta, hvd_syncbn_running running,
                               double* stats, void* coefficients) {
  const IeeeArithmetic ieee;
  path().forward_finish(*shape, eps, packet, gamma, beta, running, stats, coefficients);
}

void hvd_syncbn_average_weights(double old_weight, int64_t batches, double* weight_of_old, double* weight_of_new) {
  const IeeeArithmetic ieee;
  *weight_of_new = share_of_new(old_weight, batches);
  *weight_of_old = 1 - *weight_of_new;
}

void hvd_syncbn_forward_apply(const hvd_syncbn_shape* shape, const void* x, const void* residual, int32_t relu,
                              const void* coefficients, int64_t begin, int64_t end, void* y) {
  const IeeeArithmetic ieee;
  path().forward_apply(*shape, x, residual, relu, coefficients, begin, end, y);
}

void hvd_syncbn_backward_params(const hvd_syncbn_shape* shape, const int64_t* packet, const double* stats,
                                hvd_syncbn_vector dgamma, hvd_syncbn_vector dbeta) {
  const IeeeArithmetic ieee;
  path().backward_params(*shape, packet, stats, dgamma, dbeta);
}

void hvd_syncbn_backward_finish(const hvd_syncbn_shape* shape, const int64_t* packet, const double* stats,
                                hvd_syncbn_vector gamma, void* coefficients) {
  const IeeeArithmetic ieee;
  path().backward_finish(*shape, packet, stats, gamma, coefficients);
}

void hvd_syncbn_backward_apply(const hvd_syncbn_shape* shape, const void* x, const void* dy, const void* y,
                               const uint8_t* mask, const void* coefficients, int64_t begin, int64_t end, void* dx,
                               void* dresidual) {
  const IeeeArithmetic ieee;
  current()
      .load(std::memory_order_relaxed)
      ->backward_apply(*shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual);
}

void hvd_syncbn_add_packet(int64_t channels, const int64_t* packet, int64_t* total) {
  add_packet(channels, packet, total);
}

int32_t hvd_syncbn_add_batch(int64_t channels, const int64_t* packet, int64_t* total) {
  const IeeeArithmetic ieee;
  return add_batch(channels, packet, total);
}

int32_t hvd_syncbn_population(int64_t channels, const int64_t* total, int32_t estimator, int32_t unbiased, double eps,
                              hvd_syncbn_vector mean, hvd_syncbn_vector variance, hvd_syncbn_vector gamma,
                              hvd_syncbn_vector beta) {
  const IeeeArithmetic ieee;
  return population(channels, total, estimator, unbiased, eps, mean, variance, gamma, beta);
}

void hvd_syncbn_prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < int64_t{4} << 20) return;  // the same threshold as in NumPy
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  (void)madvise(reinterpret_cast<void*>(first), begin + static_cast<uintptr_t>(bytes) - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

const char* hvd_syncbn_isa(void) { return current().load()->name; }

const char* hvd_syncbn_isas(void) {
  static const std::string names = [] {
    std::string all;
    for (const Path& path : kPaths) {
      if (path.runs_here()) all += (all.empty() ? "" : ",") + std::string(path.name);
    }
    return all;
  }();
  return names.c_str();
}

int32_t hvd_syncbn_set_isa(const char* name) {
  const Path* const path = find(name);
  if (path == nullptr) return -1;
  current().store(path);
  return 0;
}

}  // extern "C"
