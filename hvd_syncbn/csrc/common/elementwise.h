// The element-wise formulas (docs/protocol.md, 4), for any V with +, -, *, fused, relu, keep_where_positive:
// a float, a double, or a vector of either.
#ifndef HVD_SYNCBN_COMMON_ELEMENTWISE_H_
#define HVD_SYNCBN_COMMON_ELEMENTWISE_H_

#include "portable.h"

namespace hvd_syncbn {

// relu keeps NaN; its derivative is 1 where the output is not <= 0.
HVD_SYNCBN_HD float relu(float v) { return v <= 0.0f ? 0.0f : v; }
HVD_SYNCBN_HD double relu(double v) { return v <= 0.0 ? 0.0 : v; }
HVD_SYNCBN_HD float keep_where_positive(float v, float y) { return y <= 0.0f ? 0.0f : v; }
HVD_SYNCBN_HD double keep_where_positive(double v, double y) { return y <= 0.0 ? 0.0 : v; }

template <class V>
HVD_SYNCBN_HD V normalized(V x, V mean_hi, V mean_lo, V scale, V shift) {
  const V d = (x - mean_hi) - mean_lo;
  return fused(d, scale, shift);
}

template <class V>
HVD_SYNCBN_HD V input_gradient(V x, V dy, V mean_hi, V mean_lo, V scale, V c1, V c2) {
  const V d = (x - mean_hi) - mean_lo;
  return scale * (dy - fused(d, c2, c1));
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_ELEMENTWISE_H_
