// The walk over elements that both apply kernels share. An Op brings
//   splat<V>(c), load<V>(c)     its coefficients of channel c, or of channels c .. c + V::N
//   apply<V>(i, k, counts)      the element (or vector) at offset i; counts: not masked
#ifndef HVD_SYNCBN_CPU_APPLY_H_
#define HVD_SYNCBN_CPU_APPLY_H_

#include "../common/exact_sum.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

template <class T, class Op>
HVD_SYNCBN_INLINE void walk_elements(const hvd_syncbn_shape& shape, const Op& op, const uint8_t* mask, int64_t begin,
                                     int64_t end) {
  using Wide = typename VectorOf<T>::Wide;
  using One = typename VectorOf<T>::One;
  if (shape.layout == HVD_SYNCBN_CHANNELS_LAST || shape.s == 1) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * shape.c;
      const bool counts = mask == nullptr || mask[row] != 0;
      int64_t c = 0;
      for (; c + Wide::N <= shape.c; c += Wide::N) op.template apply<Wide>(at + c, op.template load<Wide>(c), counts);
      for (; c < shape.c; ++c) op.template apply<One>(at + c, op.template load<One>(c), counts);
    }
    return;
  }
  const int64_t pieces = (shape.s + kPiece - 1) / kPiece;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / pieces;
    const int64_t n = plane / shape.c, c = plane - n * shape.c;
    const int64_t position = (unit - plane * pieces) * kPiece;
    const int64_t length = shape.s - position < kPiece ? shape.s - position : kPiece;
    const int64_t at = plane * shape.s + position;
    int64_t i = 0;
    if (mask == nullptr) {
      const auto wide = op.template splat<Wide>(c);
      for (; i + Wide::N <= length; i += Wide::N) op.template apply<Wide>(at + i, wide, true);
    }
    if (i < length) {
      const auto one = op.template splat<One>(c);
      const uint8_t* const counts = mask == nullptr ? nullptr : mask + n * shape.s + position;
      for (; i < length; ++i) op.template apply<One>(at + i, one, counts == nullptr || counts[i] != 0);
    }
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_APPLY_H_
