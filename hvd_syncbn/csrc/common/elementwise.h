// The element-wise formulas (docs/protocol.md, 4), for any V with +, -, *, fused, relu, keep_where_positive,
// number_or_zero: a float, a double, or a vector of either.
#ifndef HVD_SYNCBN_COMMON_ELEMENTWISE_H_
#define HVD_SYNCBN_COMMON_ELEMENTWISE_H_

#include "double_double.h"

namespace hvd_syncbn {

// relu keeps NaN; its derivative is 1 where the output is not <= 0.
HVD_SYNCBN_HD float relu(float v) { return v <= 0.0f ? 0.0f : v; }
HVD_SYNCBN_HD double relu(double v) { return v <= 0.0 ? 0.0 : v; }
HVD_SYNCBN_HD float keep_where_positive(float v, float y) { return y <= 0.0f ? 0.0f : v; }
HVD_SYNCBN_HD double keep_where_positive(double v, double y) { return y <= 0.0 ? 0.0 : v; }

HVD_SYNCBN_HD float number_or_zero(float v) { return v == v ? v : 0.0f; }
HVD_SYNCBN_HD double number_or_zero(double v) { return v == v ? v : 0.0; }

template <class V>
HVD_SYNCBN_HD V normalized(V x, V pivot, V scale, V scale_lo, V shift, V shift_lo) {
  const V d = x - pivot;
  return fused(d, scale, shift) + fused(d, scale_lo, shift_lo);
}

// The sum with a residual is rounded once: the rounding error of shift + residual is added with the low part.
template <class V>
HVD_SYNCBN_HD V normalized(V x, V pivot, V scale, V scale_lo, V shift, V shift_lo, V residual) {
  const V d = x - pivot;
  const DoubleDouble<V> both = two_sum(shift, residual);
  return fused(d, scale, both.hi) + (fused(d, scale_lo, shift_lo) + number_or_zero(both.lo));
}

template <class V>
HVD_SYNCBN_HD V input_gradient(V x, V dy, V unit, V scale, V scale_lo, V slope, V shift, V shift_lo) {
  return unit * fused(scale, dy, fused(x, slope, shift) + fused(scale_lo, dy, shift_lo));
}

// The gradient of a masked position, which does not affect the statistics.
template <class V>
HVD_SYNCBN_HD V input_gradient(V dy, V unit, V scale, V scale_lo) {
  return unit * fused(scale, dy, scale_lo * dy);
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_ELEMENTWISE_H_
