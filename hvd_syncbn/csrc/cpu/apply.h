// The loop over elements that both apply kernels share. An Op has
//   splat<V>(c), load<V>(c)         return its coefficients of channel c, or of channels c .. c + V::N
//   apply<kStream>(i, k, counts)    processes the element (or vector) at offset i; counts: whether it is not masked
//   outputs()                       the bitwise or of the addresses that it writes to
//   kRows                           channels last, the number of rows that share each load of coefficients
//
// Geometry: channels first, one unit is a piece of one row (n, c), with its coefficients in registers; channels last,
// one unit is the c channels of one position.
#ifndef HVD_SYNCBN_CPU_APPLY_H_
#define HVD_SYNCBN_CPU_APPLY_H_

#include "../common/exact_sum.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

// Larger outputs are written with streaming stores: they would be evicted before they are read, and a store through the
// cache reads the cache line first.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

template <class T, int kRows, bool kStream, class Op>
HVD_SYNCBN_INLINE void apply_rows(const Op& op, const uint8_t* mask, int64_t row, int64_t channels) {
  using Wide = typename VectorOf<T>::Wide;
  using One = typename VectorOf<T>::One;
  bool counts[kRows];
  for (int r = 0; r < kRows; ++r) counts[r] = mask == nullptr || mask[row + r] != 0;
  const int64_t at = row * channels;
  int64_t c = 0;
  for (; c + Wide::N <= channels; c += Wide::N) {
    const auto k = op.template load<Wide>(c);
    for (int r = 0; r < kRows; ++r) op.template apply<kStream>(at + r * channels + c, k, counts[r]);
  }
  for (; c < channels; ++c) {
    const auto k = op.template load<One>(c);
    for (int r = 0; r < kRows; ++r) op.template apply<kStream>(at + r * channels + c, k, counts[r]);
  }
}

template <class T, bool kStream, class Op>
HVD_SYNCBN_INLINE void walk_units(const hvd_syncbn_shape& shape, const Op& op, const uint8_t* mask, int64_t begin,
                                  int64_t end) {
  using Wide = typename VectorOf<T>::Wide;
  using One = typename VectorOf<T>::One;
  if (shape.layout == HVD_SYNCBN_CHANNELS_LAST || shape.s == 1) {
    constexpr int kRows =
        kStream ? 1 : Op::kRows;  // streaming stores should fill whole cache lines, so one row at a time
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) apply_rows<T, kRows, kStream>(op, mask, row, shape.c);
    for (; row < end; ++row) apply_rows<T, 1, kStream>(op, mask, row, shape.c);
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
      for (; i + Wide::N <= length; i += Wide::N) op.template apply<kStream>(at + i, wide, true);
    }
    if (i < length) {
      const auto one = op.template splat<One>(c);
      const uint8_t* const counts = mask == nullptr ? nullptr : mask + n * shape.s + position;
      for (; i < length; ++i) op.template apply<kStream>(at + i, one, counts == nullptr || counts[i] != 0);
    }
  }
}

template <class T, class Op>
HVD_SYNCBN_INLINE void walk_elements(const hvd_syncbn_shape& shape, const Op& op, const uint8_t* mask, int64_t begin,
                                     int64_t end) {
  constexpr int64_t kStore = VectorOf<T>::Wide::N * sizeof(T);
  const int64_t row = (shape.layout == HVD_SYNCBN_CHANNELS_LAST || shape.s == 1 ? shape.c : shape.s) * sizeof(T);
  if (VectorOf<T>::Wide::N > 1 && shape.n * shape.c * shape.s * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
      row % kStore == 0 && op.outputs() % kStore == 0) {
    walk_units<T, true>(shape, op, mask, begin, end);
    end_stream();
  } else {
    walk_units<T, false>(shape, op, mask, begin, end);
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_APPLY_H_
