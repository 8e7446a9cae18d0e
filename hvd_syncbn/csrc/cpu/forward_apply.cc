// Forward apply: y = relu?(fma(d, scale, shift) + residual?), d = (x - mean_hi) - mean_lo, element by element.
//
// Traffic: x (and the residual) are read once, y is written once; four coefficients per channel stay in cache.
// Geometry: see apply.h.
#include "apply.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

template <class T, bool kResidual, bool kRelu>
struct ForwardApply {
  using Value = Compute<T>;
  static constexpr int kRows = 4;
  const T* x;
  const T* residual;
  T* y;
  const Value* mean_hi;
  const Value* mean_lo;
  const Value* scale;
  const Value* shift;

  HVD_SYNCBN_INLINE uintptr_t outputs() const { return reinterpret_cast<uintptr_t>(y); }

  template <class V>
  struct Coefficients {
    V mean_hi, mean_lo, scale, shift;
  };
  template <class V>
  HVD_SYNCBN_INLINE Coefficients<V> splat(int64_t c) const {
    return {V::splat(mean_hi[c]), V::splat(mean_lo[c]), V::splat(scale[c]), V::splat(shift[c])};
  }
  template <class V>
  HVD_SYNCBN_INLINE Coefficients<V> load(int64_t c) const {
    return {V::load(mean_hi + c), V::load(mean_lo + c), V::load(scale + c), V::load(shift + c)};
  }
  template <bool kStream, class V>
  HVD_SYNCBN_INLINE void apply(int64_t i, const Coefficients<V>& k, bool) const {
    V v = normalized(V::load(x + i), k.mean_hi, k.mean_lo, k.scale, k.shift);
    if (kResidual) v = v + V::load(residual + i);
    if (kRelu) v = relu(v);
    v.template store<kStream>(y + i);
  }
};

template <class T, bool kResidual, bool kRelu>
void run(const hvd_syncbn_shape& shape, const void* x, const void* residual, const void* coefficients, int64_t begin,
         int64_t end, void* y) {
  const Compute<T>* const k = static_cast<const Compute<T>*>(coefficients);
  const int64_t c = shape.c;
  const ForwardApply<T, kResidual, kRelu> op = {
      static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), k, k + c, k + 2 * c, k + 3 * c};
  walk_elements<T>(shape, op, nullptr, begin, end);
}

template <class T>
void select(const hvd_syncbn_shape& shape, const void* x, const void* residual, int32_t relu, const void* coefficients,
            int64_t begin, int64_t end, void* y) {
  if (residual != nullptr) {
    relu ? run<T, true, true>(shape, x, residual, coefficients, begin, end, y)
         : run<T, true, false>(shape, x, residual, coefficients, begin, end, y);
  } else {
    relu ? run<T, false, true>(shape, x, residual, coefficients, begin, end, y)
         : run<T, false, false>(shape, x, residual, coefficients, begin, end, y);
  }
}

}  // namespace

void forward_apply(const hvd_syncbn_shape& shape, const void* x, const void* residual, int32_t relu,
                   const void* coefficients, int64_t begin, int64_t end, void* y) {
  switch (shape.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return select<float>(shape, x, residual, relu, coefficients, begin, end, y);
    case HVD_SYNCBN_FLOAT64:
      return select<double>(shape, x, residual, relu, coefficients, begin, end, y);
    case HVD_SYNCBN_FLOAT16:
      return select<Half>(shape, x, residual, relu, coefficients, begin, end, y);
    default:
      return select<BFloat16>(shape, x, residual, relu, coefficients, begin, end, y);
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn
