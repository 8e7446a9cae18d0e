// Backward moments: sum dy and sum dy * (x - mean) of every piece, in float64, added exactly to the packet. With a
// fused relu, dy counts where the output y is positive.
//
// Traffic: x and dy (and y) are read once. Geometry: see moments.h.
#include "moments.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

template <class T, bool kRelu>
struct BackwardTerms {
  static constexpr bool kNarrow = sizeof(T) < sizeof(double), kSquare = false;
  static constexpr int kItem = sizeof(T);
  const T* x;
  const T* dy;
  const T* y;

  template <class V>
  HVD_SYNCBN_INLINE void load(int64_t i, V mean, V* g, V* d) const {
    *d = V::load(x + i) - mean;
    *g = V::load(dy + i);
    if (kRelu) *g = keep_where_positive(*g, V::load(y + i));
  }
  HVD_SYNCBN_INLINE void load_first(int64_t i, int count, F64 mean, F64* g, F64* d) const {
    *d = load_part(x + i, count) - mean;
    *g = load_part(dy + i, count);
    if (kRelu) *g = keep_where_positive(*g, load_part(y + i, count));
  }
  template <int kLevel>
  HVD_SYNCBN_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(x + i, 0, kLevel);
    __builtin_prefetch(dy + i, 0, kLevel);
    if (kRelu) __builtin_prefetch(y + i, 0, kLevel);
  }
  HVD_SYNCBN_INLINE bool masked() const { return false; }
  HVD_SYNCBN_INLINE bool counts(int64_t) const { return true; }
};

template <class T, bool kRelu>
void run_terms(const hvd_syncbn_shape& shape, const BackwardTerms<T, kRelu>& terms, const double* mean, int64_t begin,
               int64_t end, int64_t* packet) {
  const auto row = [&](int64_t n, int64_t c, int64_t position, int length, double channel_mean) {
    return row_piece(terms, (n * shape.c + c) * shape.s + position, length, channel_mean);
  };
  walk(shape, terms, row, mean, begin, end, packet);
}

template <class T>
void run(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const double* mean, int64_t begin,
         int64_t end, int64_t* packet) {
  const T* const xt = static_cast<const T*>(x);
  const T* const dyt = static_cast<const T*>(dy);
  if (y == nullptr) {
    run_terms<T, false>(shape, {xt, dyt, nullptr}, mean, begin, end, packet);
  } else {
    run_terms<T, true>(shape, {xt, dyt, static_cast<const T*>(y)}, mean, begin, end, packet);
  }
}

}  // namespace

void backward_moments(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const double* stats,
                      int64_t begin, int64_t end, int64_t* packet) {
  switch (shape.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return run<float>(shape, x, dy, y, stats, begin, end, packet);
    case HVD_SYNCBN_FLOAT64:
      return run<double>(shape, x, dy, y, stats, begin, end, packet);
    case HVD_SYNCBN_FLOAT16:
      return run<Half>(shape, x, dy, y, stats, begin, end, packet);
    default:
      return run<BFloat16>(shape, x, dy, y, stats, begin, end, packet);
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn
