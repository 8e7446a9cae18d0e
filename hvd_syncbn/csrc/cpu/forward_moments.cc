// Forward moments: sum x and sum x^2 of every piece, in float64, added exactly to the packet.
//
// Traffic: x is read once; for each piece of up to 1024 positions, two values are added to the tile's exact sums.
// Geometry: see moments.h; one unit is one piece of a tile of channels.
#include "moments.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

template <class T>
struct ForwardTerms {
  static constexpr bool kNarrow = sizeof(T) < sizeof(double), kSquare = true;
  static constexpr int kItem = sizeof(T);
  const T* x;
  const uint8_t* mask;

  template <class V>
  HVD_SYNCBN_INLINE void load(int64_t i, V, V* g, V* d) const {
    *g = *d = V::load(x + i);
  }
  HVD_SYNCBN_INLINE void load_first(int64_t i, int count, F64, F64* g, F64* d) const {
    *g = *d = load_part(x + i, count);
  }
  template <int kLevel>
  HVD_SYNCBN_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(x + i, 0, kLevel);
  }
  HVD_SYNCBN_INLINE bool masked() const { return mask != nullptr; }
  HVD_SYNCBN_INLINE bool counts(int64_t row) const { return mask == nullptr || mask[row] != 0; }
};

template <class T>
void run(const hvd_syncbn_shape& shape, const void* data, const uint8_t* mask, int64_t begin, int64_t end,
         int64_t* packet) {
  const ForwardTerms<T> terms = {static_cast<const T*>(data), mask};
  const auto row = [&](int64_t n, int64_t c, int64_t position, int length, double mean) {
    const int64_t offset = (n * shape.c + c) * shape.s + position;
    if (mask == nullptr) return row_piece(terms, offset, length, mean);
    T kept[kPiece];
    const uint8_t* const counts = mask + n * shape.s + position;
    for (int i = 0; i < length; ++i) kept[i] = counts[i] ? terms.x[offset + i] : T{};
    return row_piece(ForwardTerms<T>{kept, nullptr}, 0, length, mean);
  };
  walk(shape, terms, row, nullptr, begin, end, packet);
}

}  // namespace

void forward_moments(const hvd_syncbn_shape& shape, const void* x, const uint8_t* mask, int64_t begin, int64_t end,
                     int64_t* packet) {
  switch (shape.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return run<float>(shape, x, mask, begin, end, packet);
    case HVD_SYNCBN_FLOAT64:
      return run<double>(shape, x, mask, begin, end, packet);
    case HVD_SYNCBN_FLOAT16:
      return run<Half>(shape, x, mask, begin, end, packet);
    default:
      return run<BFloat16>(shape, x, mask, begin, end, packet);
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn
