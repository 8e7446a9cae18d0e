// Backward apply: dx = unit * ((scale + scale_lo) * dy + slope * x + shift + shift_lo) for each element, with the
// operations of ../common/elementwise.h. With a fused relu, dy is first masked by the output, and the masked dy is the
// gradient of the residual.
//
// Traffic: x and dy (and y) are read once, dx (and dresidual) are written once; six coefficients per channel stay in
// cache. Geometry: see apply.h.
#include "apply.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

template <class T, bool kRelu>
struct BackwardApply {
  using Value = Compute<T>;
  static constexpr int kRows = 2;
  const T* x;
  const T* dy;
  const T* y;
  T* dx;
  T* dresidual;
  const Value* unit;
  const Value* scale;
  const Value* scale_lo;
  const Value* slope;
  const Value* shift;
  const Value* shift_lo;

  HVD_SYNCBN_INLINE uintptr_t outputs() const {
    return reinterpret_cast<uintptr_t>(dx) | reinterpret_cast<uintptr_t>(dresidual);
  }

  template <class V>
  struct Coefficients {
    V unit, scale, scale_lo, slope, shift, shift_lo;
  };
  template <class V>
  HVD_SYNCBN_INLINE Coefficients<V> splat(int64_t c) const {
    return {V::splat(unit[c]),  V::splat(scale[c]), V::splat(scale_lo[c]),
            V::splat(slope[c]), V::splat(shift[c]), V::splat(shift_lo[c])};
  }
  template <class V>
  HVD_SYNCBN_INLINE Coefficients<V> load(int64_t c) const {
    return {V::load(unit + c),  V::load(scale + c), V::load(scale_lo + c),
            V::load(slope + c), V::load(shift + c), V::load(shift_lo + c)};
  }
  template <bool kStream, class V>
  HVD_SYNCBN_INLINE void apply(int64_t i, const Coefficients<V>& k, bool counts) const {
    V g = V::load(dy + i);
    if (kRelu) g = keep_where_positive(g, V::load(y + i));
    const V dx_i = counts ? input_gradient(V::load(x + i), g, k.unit, k.scale, k.scale_lo, k.slope, k.shift, k.shift_lo)
                          : input_gradient(g, k.unit, k.scale, k.scale_lo);
    dx_i.template store<kStream>(dx + i);
    if (dresidual != nullptr) g.template store<kStream>(dresidual + i);
  }
};

template <class T, bool kRelu>
void run(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const uint8_t* mask,
         const void* coefficients, int64_t begin, int64_t end, void* dx, void* dresidual) {
  const Compute<T>* const k = static_cast<const Compute<T>*>(coefficients);
  const int64_t c = shape.c;
  const BackwardApply<T, kRelu> op = {static_cast<const T*>(x),
                                      static_cast<const T*>(dy),
                                      static_cast<const T*>(y),
                                      static_cast<T*>(dx),
                                      static_cast<T*>(dresidual),
                                      k,
                                      k + c,
                                      k + 2 * c,
                                      k + 3 * c,
                                      k + 4 * c,
                                      k + 5 * c};
  walk_elements<T>(shape, op, mask, begin, end);
}

template <class T>
void select(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const uint8_t* mask,
            const void* coefficients, int64_t begin, int64_t end, void* dx, void* dresidual) {
  y != nullptr ? run<T, true>(shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual)
               : run<T, false>(shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual);
}

}  // namespace

void backward_apply(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const uint8_t* mask,
                    const void* coefficients, int64_t begin, int64_t end, void* dx, void* dresidual) {
  switch (shape.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return select<float>(shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual);
    case HVD_SYNCBN_FLOAT64:
      return select<double>(shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual);
    case HVD_SYNCBN_FLOAT16:
      return select<Half>(shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual);
    default:
      return select<BFloat16>(shape, x, dy, y, mask, coefficients, begin, end, dx, dresidual);
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn
