// Forward apply: y = relu?((x - pivot) * (scale + scale_lo) + shift + shift_lo + residual?) for each element, with the
// operations of ../common/elementwise.h.
//
// Traffic: x (and the residual) are read once, y is written once; five coefficients per channel stay in cache.
// Geometry: see apply.h.
#include "apply.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

// Prefetch distance.
constexpr int kAheadBytes = 1024;

template <class T, bool kResidual, bool kRelu>
struct ForwardApply {
  using Value = Compute<T>;
  static constexpr int kRows = 4;
  const T* x;
  const T* residual;
  T* y;
  const Value* pivot;
  const Value* scale;
  const Value* scale_lo;
  const Value* shift;
  const Value* shift_lo;

  HVD_SYNCBN_INLINE uintptr_t outputs() const { return reinterpret_cast<uintptr_t>(y); }

  template <class V>
  struct Coefficients {
    V pivot, scale, scale_lo, shift, shift_lo;
  };
  template <class V>
  HVD_SYNCBN_INLINE Coefficients<V> splat(int64_t c) const {
    return {V::splat(pivot[c]), V::splat(scale[c]), V::splat(scale_lo[c]), V::splat(shift[c]), V::splat(shift_lo[c])};
  }
  template <class V>
  HVD_SYNCBN_INLINE Coefficients<V> load(int64_t c) const {
    return {V::load(pivot + c), V::load(scale + c), V::load(scale_lo + c), V::load(shift + c), V::load(shift_lo + c)};
  }
  template <bool kStream, class V>
  HVD_SYNCBN_INLINE void apply(int64_t i, const Coefficients<V>& k, bool) const {
    // With streaming stores, the hardware prefetcher falls behind if one tensor is read, but not if two are.
    if (kStream && !kResidual) __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAheadBytes);
    const V at = V::load(x + i);
    V v = kResidual ? normalized(at, k.pivot, k.scale, k.scale_lo, k.shift, k.shift_lo, V::load(residual + i))
                    : normalized(at, k.pivot, k.scale, k.scale_lo, k.shift, k.shift_lo);
    if (kRelu) v = relu(v);
    v.template store<kStream>(y + i);
  }
};

template <class T, bool kResidual, bool kRelu>
void run(const hvd_syncbn_shape& shape, const void* x, const void* residual, const void* coefficients, int64_t begin,
         int64_t end, void* y) {
  const Compute<T>* const k = static_cast<const Compute<T>*>(coefficients);
  const int64_t c = shape.c;
  const ForwardApply<T, kResidual, kRelu> op = {static_cast<const T*>(x),
                                                static_cast<const T*>(residual),
                                                static_cast<T*>(y),
                                                k,
                                                k + c,
                                                k + 2 * c,
                                                k + 3 * c,
                                                k + 4 * c};
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
