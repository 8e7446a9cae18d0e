// Piece sums in the canonical order (docs/protocol.md, 1), for the two moment kernels.
//
// A kernel brings Terms: an element adds g to the first moment, g * d to the second.
//   terms.load(i, mean, &g, &d)   of the element (or vector of elements) at offset i
//   kNarrow, kSquare              g has at most 24 bits; d is g
//   terms.masked(), counts(row)   whether there is a mask; false: this position is masked (channels last only; channels
//                                 first masks beforehand)
//   terms.prefetch(i)             a hint that element i is needed soon
//
// A unit is (tile of channels, sample, piece), the tile slowest: a thread walks the samples with the sums of one tile
// in L1.
#ifndef HVD_SYNCBN_CPU_MOMENTS_H_
#define HVD_SYNCBN_CPU_MOMENTS_H_

#include "tile_sums.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

struct Moments {
  double a, b;
};

template <class Terms, class V>
HVD_SYNCBN_INLINE void add_element(const Terms& terms, int64_t i, V mean, V* a, V* b) {
  V g, d;
  terms.load(i, mean, &g, &d);
  *a = *a + g;
#if !defined(__AVX2__)
  // Without the instruction a fused multiply-add is a library call.
  if (Terms::kNarrow && Terms::kSquare) {  // exact as it is
    *b = *b + g * d;
    return;
  }
#endif
  *b = fused(g, d, *b);
}

// lane[j] += lane[j + w] for w = 16, 8, 4, 2, 1.
HVD_SYNCBN_INLINE double fold(double* lane) {
  int w = kLanes / 2;
  for (; w >= F64::N; w /= 2) {
    for (int j = 0; j < w; j += F64::N) (F64::load(lane + j) + F64::load(lane + j + w)).keep(lane + j);
  }
  for (; w >= 1; w /= 2) {
    for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
  }
  return lane[0];
}

// Channels first: the piece is `length` consecutive elements from offset.
// Registers hold kPass lanes of both moments, so a chunk that stays in L1 is walked 32 / kPass times.
template <class Terms>
HVD_SYNCBN_INLINE Moments row_piece(const Terms& terms, int64_t offset, int length, double mean) {
#if defined(__AVX512F__)
  constexpr int kPass = 32;
#elif defined(__AVX2__)
  constexpr int kPass = 16;
#else
  constexpr int kPass = 4;
#endif
  constexpr int kVectors = kPass / F64::N;
  constexpr int kChunk = kPass == kLanes ? kPiece : 1024;
  double lane_a[kLanes], lane_b[kLanes];
  const F64 mean_vector = F64::splat(mean);
  const int whole = length & ~(kLanes - 1);
  if (whole == 0) {
    for (int j = 0; j < kLanes; j += F64::N) {
      F64::splat(0.0).keep(lane_a + j);
      F64::splat(0.0).keep(lane_b + j);
    }
  }
  for (int start = 0; start < whole; start += kChunk) {
    const int stop = start + kChunk < whole ? start + kChunk : whole;
    for (int pass = 0; pass < kLanes; pass += kPass) {
      F64 a[kVectors], b[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        a[v] = start == 0 ? F64::splat(0.0) : F64::load(lane_a + pass + v * F64::N);
        b[v] = start == 0 ? F64::splat(0.0) : F64::load(lane_b + pass + v * F64::N);
      }
      for (int64_t i = offset + start + pass; i < offset + stop; i += kLanes) {
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) add_element(terms, i + v * F64::N, mean_vector, &a[v], &b[v]);
      }
      for (int v = 0; v < kVectors; ++v) {
        a[v].keep(lane_a + pass + v * F64::N);
        b[v].keep(lane_b + pass + v * F64::N);
      }
    }
  }
  const int rest = length - whole;
  int j = 0;
  for (; j + F64::N <= rest; j += F64::N) {
    F64 a = F64::load(lane_a + j), b = F64::load(lane_b + j);
    add_element(terms, offset + whole + j, mean_vector, &a, &b);
    a.keep(lane_a + j);
    b.keep(lane_b + j);
  }
  for (; j < rest; ++j) {
    S64 a = S64::load(lane_a + j), b = S64::load(lane_b + j);
    add_element(terms, offset + whole + j, S64::splat(mean), &a, &b);
    a.keep(lane_a + j);
    b.keep(lane_b + j);
  }
  return {fold(lane_a), fold(lane_b)};
}

// Channels last: positions [row, row + length) of channels [first, first + width). One lane at a time takes up to kRows
// of its positions, so the sums of a lane travel between cache and registers once per kRows elements, and memory is
// read in kRows streams.
constexpr int kRows = 4;

template <class V, int kVectors, class Terms>
HVD_SYNCBN_INLINE int lane_columns(const Terms& terms, const int64_t* offsets, int rows, bool start, int c, int width,
                                   const double* mean, double* a, double* b) {
  constexpr int kStep = kVectors * V::N;
  for (; c + kStep <= width; c += kStep) {
    V sum_a[kVectors], sum_b[kVectors], mean_vector[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      const int at = c + v * V::N;
      sum_a[v] = start ? V::splat(0.0) : V::load(a + at);
      sum_b[v] = start ? V::splat(0.0) : V::load(b + at);
      if (!Terms::kSquare) mean_vector[v] = V::load(mean + at);
    }
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        add_element(terms, offsets[r] + c + v * V::N, mean_vector[v], &sum_a[v], &sum_b[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      sum_a[v].keep(a + c + v * V::N);
      sum_b[v].keep(b + c + v * V::N);
    }
  }
  return c;
}

// A piece of at most kShort positions stays in the cache, so its lanes can be visited in the order of the fold: for one
// group of channels, lanes j, j + 8, j + 16 and j + 24 are added up in registers, for j = 0 .. 7.
constexpr int kShort = kLanes * kRows;
// Pieces of one element are taken this many samples at a time, while the bins of a channel are in registers.
constexpr int kSingles = 8;
constexpr int kStrands = 8;

template <class V, int kVectors>
struct Sums {
  V a[kVectors], b[kVectors];
  HVD_SYNCBN_INLINE void add(const Sums& other) {
    for (int v = 0; v < kVectors; ++v) a[v] = a[v] + other.a[v];
    for (int v = 0; v < kVectors; ++v) b[v] = b[v] + other.b[v];
  }
};

// What the fold leaves in lane j when kWidth lanes are left.
template <int kWidth, class V, int kVectors, class Terms>
HVD_SYNCBN_INLINE void strand(const Terms& terms, int64_t offset, int64_t stride, int length, int j, const V* mean,
                              Sums<V, kVectors>* sums) {
  if constexpr (kWidth == kLanes) {
    for (int v = 0; v < kVectors; ++v) sums->a[v] = sums->b[v] = V::splat(0.0);
    for (int r = j; r < length; r += kLanes) {
      const int64_t i = offset + r * stride;
      terms.prefetch(i + 2 * kVectors * V::N);
      for (int v = 0; v < kVectors; ++v) add_element(terms, i + v * V::N, mean[v], &sums->a[v], &sums->b[v]);
    }
  } else {
    strand<2 * kWidth>(terms, offset, stride, length, j, mean, sums);
    if (j + kWidth < length) {
      Sums<V, kVectors> right;
      strand<2 * kWidth>(terms, offset, stride, length, j + kWidth, mean, &right);
      sums->add(right);
    }
  }
}

template <class V, int kVectors, class Terms>
HVD_SYNCBN_INLINE int short_columns(const Terms& terms, int64_t offset, int64_t stride, int length, int c, int width,
                                    const double* mean, TileSums* tile) {
  constexpr int kStep = kVectors * V::N;
  const int strands = length < kStrands ? length : kStrands;
  for (; c + kStep <= width; c += kStep) {
    V mean_vector[kVectors] = {};
    if (!Terms::kSquare) {
      for (int v = 0; v < kVectors; ++v) mean_vector[v] = V::load(mean + c + v * V::N);
    }
    Sums<V, kVectors> sums[kStrands];
    for (int j = 0; j < strands; ++j) strand<kStrands>(terms, offset + c, stride, length, j, mean_vector, sums + j);
    for (int w = kStrands / 2; w >= 1; w /= 2) {
      for (int j = 0; j < w && j + w < strands; ++j) sums[j].add(sums[j + w]);
    }
    for (int v = 0; v < kVectors; ++v) {
      tile->add<V, 1>(c + v * V::N, [&](int, V* value) {
        value[0] = sums[0].a[v];
        value[1] = sums[0].b[v];
      });
    }
  }
  return c;
}

// Pieces of one element: kCount rows from the offset on.
template <class V, int kVectors, int kCount, class Terms>
HVD_SYNCBN_INLINE int single_columns(const Terms& terms, int64_t offset, int64_t stride, int c, int width,
                                     const double* mean, TileSums* tile) {
  constexpr int kStep = kVectors * V::N;
  for (; c + kStep <= width; c += kStep) {
    V means[kVectors] = {};
    if (!Terms::kSquare) {
      for (int v = 0; v < kVectors; ++v) means[v] = V::load(mean + c + v * V::N);
    }
    const auto factors = [&](int r, int i, V* g, V* d) {
      terms.load(offset + r * stride + c + i, means[i / V::N], g, d);
    };
    if constexpr (V::N > 1 && kCount > 1 && Terms::kNarrow) {
      tile->add_products<V, kVectors, kCount, Terms::kSquare>(c, factors);
    } else {
      for (int i = 0; i < kStep; i += V::N) {
        tile->add<V, kCount>(c + i, [&](int r, V* value) {
          V d;
          factors(r, i, value, &d);
          value[1] = value[0] * d;
        });
      }
    }
  }
  return c;
}

// A piece that lies in arrays, a value per channel.
template <class V>
HVD_SYNCBN_INLINE int add_columns(const double* a, const double* b, int c, int width, TileSums* tile) {
  for (; c + V::N <= width; c += V::N) {
    tile->add<V, 1>(c, [&](int, V* value) {
      value[0] = V::load(a + c);
      value[1] = V::load(b + c);
    });
  }
  return c;
}

HVD_SYNCBN_INLINE void add_tile(const double* a, const double* b, int width, TileSums* tile) {
  const int c = add_columns<F64>(a, b, 0, width, tile);
  if (F64::N > 1) add_columns<S64>(a, b, c, width, tile);
}

template <class Terms>
HVD_SYNCBN_INLINE void column_piece(const Terms& terms, int64_t row, int length, int64_t channels, int64_t first,
                                    int width, const double* mean, double (*a)[kMaxLaneTile], double (*b)[kMaxLaneTile],
                                    TileSums* tile) {
  if (length <= kShort && !terms.masked()) {
    constexpr int kGroup = 4;  // more vectors than that do not fit the registers
    const int64_t offset = row * channels + first;
    int c = 0;
    c = short_columns<F64, kGroup>(terms, offset, channels, length, c, width, mean, tile);
    c = short_columns<F64, 1>(terms, offset, channels, length, c, width, mean, tile);
    if (F64::N > 1) short_columns<S64, 1>(terms, offset, channels, length, c, width, mean, tile);
    return;
  }
  const int lanes = length < kLanes ? length : kLanes;  // adding the +0.0 of a lane without positions changes nothing
  for (int base = 0; base < length; base += kLanes * kRows) {
    for (int j = 0; j < lanes; ++j) {
      int64_t offsets[kRows];
      int rows = 0;
      for (int r = base + j; r < length && r < base + kLanes * kRows; r += kLanes) {
        if (terms.counts(row + r)) offsets[rows++] = (row + r) * channels + first;
      }
      if (rows == 0 && base != 0) continue;
      int c = 0;
      c = lane_columns<F64, 4>(terms, offsets, rows, base == 0, c, width, mean, a[j], b[j]);
      c = lane_columns<F64, 1>(terms, offsets, rows, base == 0, c, width, mean, a[j], b[j]);
      if (F64::N > 1) lane_columns<S64, 1>(terms, offsets, rows, base == 0, c, width, mean, a[j], b[j]);
    }
  }
  for (int w = kLanes / 2; w >= 1; w /= 2) {
    for (int j = 0; j < w && j + w < lanes; ++j) {
      for (int c = 0; c < width; ++c) a[j][c] += a[j + w][c];
      for (int c = 0; c < width; ++c) b[j][c] += b[j + w][c];
    }
  }
  add_tile(a[0], b[0], width, tile);
}

// Walks units [begin, end). `mean` is NULL where the terms do not use it; `row(n, c, piece)` hands over the piece's
// terms and offset, for channels first.
template <class Terms, class RowPiece>
HVD_SYNCBN_INLINE void walk(const hvd_syncbn_shape& shape, const Terms& terms, const RowPiece& row, const double* mean,
                            int64_t begin, int64_t end, int64_t* packet) {
  const int64_t pieces = (shape.s + kPiece - 1) / kPiece;
  const int tile_channels = tile_width(shape);
  const int64_t units_of_tile = shape.n * pieces;
  const bool last = shape.layout == HVD_SYNCBN_CHANNELS_LAST;
  TileSums sums;
  double a[kLanes][kMaxLaneTile], b[kLanes][kMaxLaneTile];
  while (begin < end) {
    const int64_t tile = begin / units_of_tile;
    const int64_t stop = end < (tile + 1) * units_of_tile ? end : (tile + 1) * units_of_tile;
    const int64_t first = tile * tile_channels;
    const int width = static_cast<int>(shape.c - first < tile_channels ? shape.c - first : tile_channels);
    const bool alone = begin == tile * units_of_tile && stop - begin == units_of_tile;
    sums.begin(width);
    while (begin < stop) {
      const int64_t unit = begin - tile * units_of_tile;
      if (shape.s == 1) {
        const int64_t offset = unit * shape.c + first;
        const double* const means = mean ? mean + first : nullptr;
        const bool group = !terms.masked() && stop - begin >= kSingles;
        begin += group ? kSingles : 1;
        if (!terms.counts(unit)) continue;
        sums.expect(group ? kSingles : 1);
        int c = 0;
        if (group) {
          c = single_columns<F64, 2, kSingles>(terms, offset, shape.c, c, width, means, &sums);
          c = single_columns<S64, 1, kSingles>(terms, offset, shape.c, c, width, means, &sums);
        } else {
          c = single_columns<F64, 1, 1>(terms, offset, shape.c, c, width, means, &sums);
          c = single_columns<S64, 1, 1>(terms, offset, shape.c, c, width, means, &sums);
        }
        continue;
      }
      ++begin;
      const int64_t n = unit / pieces, piece = unit - n * pieces;
      const int64_t position = piece * kPiece;
      const int length = static_cast<int>(shape.s - position < kPiece ? shape.s - position : kPiece);
      sums.expect(1);
      if (last) {
        column_piece(terms, n * shape.s + position, length, shape.c, first, width, mean ? mean + first : nullptr, a, b,
                     &sums);
      } else {
        for (int i = 0; i < width; ++i) {
          const Moments m = row(n, first + i, position, length, mean ? mean[first + i] : 0.0);
          a[0][i] = m.a;
          b[0][i] = m.b;
        }
        add_tile(a[0], b[0], width, &sums);
      }
    }
    sums.finish(packet, shape.c, first, alone);
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_MOMENTS_H_
