// Piece sums in the canonical order (docs/protocol.md, 1), for the two moment kernels.
//
// A kernel defines Terms: an element adds g to the first moment and g * d to the second.
//   kNarrow, kSquare    whether g has at most 24 bits; whether d is g
//   kItem               bytes of an element
//   terms.load(i, mean, &g, &d)
//                       loads the element (or vector of elements) at offset i
//   terms.load_first(i, count, mean, &g, &d)
//                       loads a vector of `count` elements followed by zeros
//   terms.prefetch<kLevel>(i)
//                       prefetches the cache line of the element at offset i into kFirstLevel or kSecondLevel, from
//                       where the hardware prefetcher continues along addresses
//   terms.masked(), counts(row)
//                       whether there is a mask; whether this position is not masked (channels last only; channels
//                       first applies the mask beforehand)
//
// A unit is (tile of channels, sample, piece), with the tile varying slowest: a thread loops over the samples with the
// sums of one tile in its second-level cache.
#ifndef HVD_SYNCBN_CPU_MOMENTS_H_
#define HVD_SYNCBN_CPU_MOMENTS_H_

#include <vector>

#include "tile_sums.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

// Arguments of __builtin_prefetch.
constexpr int kFirstLevel = 3, kSecondLevel = 2;
// Channels first: the prefetch distance. Without prefetching, a core with fast memory reaches half its bandwidth here.
constexpr int kAheadBytes = 4096;

// The lanes of a piece, folded to one vector; fold_rows folds V::N such vectors at once.
struct LaneSums {
  F64 a, b;
};

template <class Terms, class V>
HVD_SYNCBN_INLINE void add_element(const Terms& terms, int64_t i, V mean, V* a, V* b) {
  V g, d;
  terms.load(i, mean, &g, &d);
  *a = *a + g;
#if !defined(__AVX2__)
  // Without FMA instructions, a fused multiply-add is a library call.
  if (Terms::kNarrow && Terms::kSquare) {  // the product is exact
    *b = *b + g * d;
    return;
  }
#endif
  *b = fused(g, d, *b);
}

// Computes lane[j] += lane[j + w] for w = 16, 8, ... until one vector of lanes is left.
HVD_SYNCBN_INLINE F64 fold(double* lane) {
  for (int w = kLanes / 2; w >= F64::N; w /= 2) {
    for (int j = 0; j < w; j += F64::N) (F64::load(lane + j) + F64::load(lane + j + w)).keep(lane + j);
  }
  return F64::load(lane);
}

// Channels first: sums a piece of fewer than 2 * kLanes elements, at most two per lane, in registers. In the order of
// the fold: vectors of lanes v, v + kStride, v + 2 * kStride, ...
template <int kStride, class Terms>
HVD_SYNCBN_INLINE LaneSums short_row(const Terms& terms, int64_t offset, int length, F64 mean, int v) {
  constexpr int kVectors = kLanes / F64::N;
  if constexpr (kStride < kVectors) {
    const LaneSums left = short_row<2 * kStride>(terms, offset, length, mean, v);
    const LaneSums right = short_row<2 * kStride>(terms, offset, length, mean, v + kStride);
    return {left.a + right.a, left.b + right.b};
  } else {
    LaneSums sums = {F64::splat(0.0), F64::splat(0.0)};
    for (int first = v * F64::N; first < length; first += kLanes) {
      F64 g, d;
      if (length - first >= F64::N) {
        terms.load(offset + first, mean, &g, &d);
      } else {
        terms.load_first(offset + first, length - first, mean, &g, &d);
      }
      sums.a = sums.a + g;
      sums.b = fused(g, d, sums.b);
    }
    return sums;
  }
}

// Channels first: sums the piece of `length` consecutive elements from offset.
// Registers hold kPass lanes of both moments, so a chunk that fits in L1 is read 32 / kPass times.
template <class Terms>
HVD_SYNCBN_INLINE LaneSums row_piece(const Terms& terms, int64_t offset, int length, double mean) {
  if constexpr (F64::N > 1) {
    if (length < 2 * kLanes) return short_row<1>(terms, offset, length, F64::splat(mean), 0);
  }
#if defined(__AVX512F__)
  constexpr int kPass = 32;
#elif defined(__AVX2__)
  constexpr int kPass = 16;
#else
  constexpr int kPass = 4;
#endif
  constexpr int kVectors = kPass / F64::N;
  constexpr int kChunk = kPass == kLanes ? kPiece : 1024;
  constexpr int kLine = 64 / Terms::kItem;
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
        if (pass == 0) {
          for (int line = 0; line < kLanes; line += kLine) {
            terms.template prefetch<kFirstLevel>(i + kAheadBytes / Terms::kItem + line);
          }
        }
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

// Channels last: positions [row, row + length) of channels [first, first + width). One lane at a time adds up to kRows
// of its positions, so the sums of a lane move between cache and registers once per kRows elements. The rows of a lane
// are far apart, so the next kLanes * kRows rows are prefetched meanwhile, in the order of addresses, which full memory
// bandwidth requires. Tiles are whole rows, even if their sums (512 bytes per channel) do not fit in the second-level
// cache: narrower tiles read half as fast.
template <class Terms>
constexpr int kRows = Terms::kSquare ? 8 : 4;

template <class V, int kVectors, class Terms>
HVD_SYNCBN_INLINE int lane_columns(const Terms& terms, const int64_t* offsets, int rows, int64_t ahead, int64_t stride,
                                   bool start, int c, int width, const double* mean, double* a, double* b) {
  constexpr int kStep = kVectors * V::N, kLine = 64 / Terms::kItem;
  for (; c + kStep <= width; c += kStep) {
    V sum_a[kVectors], sum_b[kVectors], mean_vector[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      const int at = c + v * V::N;
      sum_a[v] = start ? V::splat(0.0) : V::load(a + at);
      sum_b[v] = start ? V::splat(0.0) : V::load(b + at);
      if (!Terms::kSquare) mean_vector[v] = V::load(mean + at);
    }
    for (int r = 0; r < rows; ++r) {
      for (int line = 0; line < kStep; line += kLine) {
        terms.template prefetch<kSecondLevel>(ahead + r * stride + c + line);
      }
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

// The scratch memory of a walk: two arrays of kLanes rows, `pitch` apart.
struct Scratch {
  double *a, *b;
  int pitch;
};

// Returns this thread's scratch for tiles of `width` channels. It is kept between calls, because page faults would cost
// more than the sums of a small layer, and it is up to 1 MiB, too much for the stack. With a pitch of a power of two,
// all rows of a channel would map to one cache set.
inline Scratch scratch_of(int width) {
  constexpr int kLine = 64 / sizeof(double);
  static thread_local std::vector<double> memory;
  const int pitch = (width + kLine - 1) / kLine * kLine + kLine;
  const int size = kLanes * pitch;
  if (memory.size() < static_cast<size_t>(2 * size + kLine)) memory.resize(2 * size + kLine);
  const size_t past = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(double) % kLine;
  double* const a = memory.data() + (past ? kLine - past : 0);
  return {a, a + size, pitch};
}

// A piece of at most kShort positions keeps its lanes in registers. They are visited in the order of the fold, for all
// channels of the tile: lanes j, j + 8, j + 16 and j + 24 are added while their rows are read, for j = 0, 4, 2, 6, 1,
// 5, 3, 7. The left operand of level l of that tree waits in row l of the scratch.
constexpr int kShort = 4 * kLanes;
constexpr int kStrands = 8;
constexpr int kStrandOrder[kStrands] = {0, 4, 2, 6, 1, 5, 3, 7};
// Pieces of one element are added for this many samples at a time, while the bins of a channel are in registers.
constexpr int kSingles = 8;

template <class V, int kVectors>
struct Sums {
  V a[kVectors], b[kVectors];
  HVD_SYNCBN_INLINE void add(const Sums& other) {
    for (int v = 0; v < kVectors; ++v) a[v] = a[v] + other.a[v];
    for (int v = 0; v < kVectors; ++v) b[v] = b[v] + other.b[v];
  }
};

// Folds `count` > 0 rows, `step` apart, which belong to four lanes in turn.
template <class V, int kVectors, class Terms>
HVD_SYNCBN_INLINE void strand(const Terms& terms, int64_t offset, int64_t step, int count, const V* mean,
                              Sums<V, kVectors>* sums) {
  const auto lane = [&](int first, Sums<V, kVectors>* sum) {
    for (int v = 0; v < kVectors; ++v) {
      V d;
      terms.load(offset + first * step + v * V::N, mean[v], &sum->a[v], &d);
      sum->b[v] = sum->a[v] * d;  // equals fma(g, d, +0.0) except for the sign of zero, which does not affect the sum
    }
#pragma GCC unroll 2
    for (int r = first + 4; r < count; r += 4) {
      for (int v = 0; v < kVectors; ++v) {
        add_element(terms, offset + r * step + v * V::N, mean[v], &sum->a[v], &sum->b[v]);
      }
    }
  };
  Sums<V, kVectors> other, last;
  lane(0, sums);
  if (count > 2) {
    lane(2, &other);
    sums->add(other);
  }
  if (count > 1) {
    lane(1, &other);
    if (count > 3) {
      lane(3, &last);
      other.add(last);
    }
    sums->add(other);
  }
}

template <class V, int kVectors, class Terms>
HVD_SYNCBN_INLINE int strand_columns(const Terms& terms, int64_t offset, int64_t step, int count, int k, int c,
                                     int width, const double* mean, const Scratch& scratch, TileSums* tile) {
  constexpr int kStep = kVectors * V::N;
  for (; c + kStep <= width; c += kStep) {
    V mean_vector[kVectors] = {};
    if (!Terms::kSquare) {
      for (int v = 0; v < kVectors; ++v) mean_vector[v] = V::load(mean + c + v * V::N);
    }
    Sums<V, kVectors> sums;
    if (count > 0) {
      strand(terms, offset + c, step, count, mean_vector, &sums);
    } else {
      for (int v = 0; v < kVectors; ++v) sums.a[v] = sums.b[v] = V::splat(0.0);
    }
    int level = 0;
    for (; (k >> level) & 1; ++level) {
      for (int v = 0; v < kVectors; ++v) {
        const int at = level * scratch.pitch + c + v * V::N;
        sums.a[v] = V::load(scratch.a + at) + sums.a[v];
        sums.b[v] = V::load(scratch.b + at) + sums.b[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      if (k + 1 < kStrands) {
        sums.a[v].keep(scratch.a + level * scratch.pitch + c + v * V::N);
        sums.b[v].keep(scratch.b + level * scratch.pitch + c + v * V::N);
      } else {
        tile->add<V, 1>(c + v * V::N, [&](int, V* value) {
          value[0] = sums.a[v];
          value[1] = sums.b[v];
        });
      }
    }
  }
  return c;
}

// Adds strand k of the piece, in the widest vectors. The counts of images up to 7 x 7 are compile-time constants.
template <class Terms>
HVD_SYNCBN_INLINE int short_columns(const Terms& terms, int64_t offset, int64_t stride, int length, int k, int width,
                                    const double* mean, const Scratch& scratch, TileSums* tile) {
  const int j = kStrandOrder[k];
  const int count = j < length ? (length - j + kStrands - 1) / kStrands : 0;
  const auto columns = [&](int constant) {
    return strand_columns<F64, 2>(terms, offset + j * stride, kStrands * stride, constant, k, 0, width, mean, scratch,
                                  tile);
  };
  int c;
  switch (count) {
#define HVD_SYNCBN_CASE(n) \
  case n:                  \
    c = columns(n);        \
    break;
    HVD_SYNCBN_CASE(1)
    HVD_SYNCBN_CASE(2)
    HVD_SYNCBN_CASE(3)
    HVD_SYNCBN_CASE(4)
    HVD_SYNCBN_CASE(5)
    HVD_SYNCBN_CASE(6)
    HVD_SYNCBN_CASE(7)
#undef HVD_SYNCBN_CASE
    default:
      c = columns(count);
  }
  return strand_columns<S64, 1>(terms, offset + j * stride, kStrands * stride, count, k, c, width, mean, scratch, tile);
}

// Adds pieces of one element: kCount rows from the offset.
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
      tile->add_many_products<V, kVectors, kCount, Terms::kSquare>(c, factors);
    } else {
      for (int i = 0; i < kStep; i += V::N) {
        tile->add_products<V, kCount>(c + i, [&](int r, V* g, V* d) { factors(r, i, g, d); });
      }
    }
  }
  return c;
}

// Adds pieces that are stored in arrays, one per channel from c.
template <class V>
HVD_SYNCBN_INLINE int add_vectors(const double* a, const double* b, int c, int width, TileSums* tile) {
  for (; c + V::N <= width; c += V::N) {
    tile->add<V, 1>(c, [&](int, V* value) {
      value[0] = V::load(a + c);
      value[1] = V::load(b + c);
    });
  }
  return c;
}

HVD_SYNCBN_INLINE void add_pieces(const double* a, const double* b, int width, TileSums* tile) {
  const int c = add_vectors<F64>(a, b, 0, width, tile);
  if (F64::N > 1) add_vectors<S64>(a, b, c, width, tile);
}

// Channels first: the maximum number of consecutive pieces of a row.
constexpr int kRun = 16;
static_assert(kRun <= kLanes, "each needs a row of the scratch");

template <class Terms>
HVD_SYNCBN_INLINE void column_piece(const Terms& terms, int64_t row, int length, int64_t channels, int64_t first,
                                    int width, const double* mean, const Scratch& scratch, TileSums* tile) {
  if (length <= kShort && !terms.masked()) {
    const int64_t offset = row * channels + first;
    for (int k = 0; k < kStrands; ++k) {
      short_columns(terms, offset, channels, length, k, width, mean, scratch, tile);
    }
    return;
  }
  double *const a = scratch.a, *const b = scratch.b;
  const int pitch = scratch.pitch;
  constexpr int kBlock = kLanes * kRows<Terms>;
  const int lanes = length < kLanes ? length : kLanes;  // adding +0.0 of a lane without positions would not change sums
  for (int base = 0; base < length; base += kBlock) {
    const int next = base + kBlock < length ? base + kBlock : length;
    for (int j = 0; j < lanes; ++j) {
      int64_t offsets[kRows<Terms>];
      int rows = 0;
      for (int r = base + j; r < next; r += kLanes) {
        if (terms.counts(row + r)) offsets[rows++] = (row + r) * channels + first;
      }
      if (rows == 0 && base != 0) continue;
      const int64_t next_rows = row + next + j * kRows<Terms>, ahead = next_rows * channels + first;
      double *const lane_a = a + j * pitch, *const lane_b = b + j * pitch;
      int c = 0;
      c = lane_columns<F64, 4>(terms, offsets, rows, ahead, channels, base == 0, c, width, mean, lane_a, lane_b);
      c = lane_columns<F64, 1>(terms, offsets, rows, ahead, channels, base == 0, c, width, mean, lane_a, lane_b);
      if (F64::N > 1) {
        lane_columns<S64, 1>(terms, offsets, rows, ahead, channels, base == 0, c, width, mean, lane_a, lane_b);
      }
    }
  }
  for (int w = kLanes / 2; w >= 1; w /= 2) {
    for (int j = 0; j < w && j + w < lanes; ++j) {
      for (int c = 0; c < width; ++c) a[j * pitch + c] += a[(j + w) * pitch + c];
      for (int c = 0; c < width; ++c) b[j * pitch + c] += b[(j + w) * pitch + c];
    }
  }
  add_pieces(a, b, width, tile);
}

// Processes units [begin, end). `mean` is NULL if the terms do not use it. Channels first, `row(n, c, position, length,
// mean)` returns the sums of one piece.
template <class Terms, class RowPiece>
HVD_SYNCBN_INLINE void walk(const hvd_syncbn_shape& shape, const Terms& terms, const RowPiece& row, const double* mean,
                            int64_t begin, int64_t end, int64_t* packet) {
  const int64_t pieces = (shape.s + kPiece - 1) / kPiece;
  const int tile_channels = tile_width(shape);
  const int64_t units_of_tile = shape.n * pieces;
  TileSums sums;
  const Scratch scratch = scratch_of(static_cast<int>(shape.c < tile_channels ? shape.c : tile_channels));
  while (begin < end) {
    const int64_t tile = begin / units_of_tile;
    const int64_t stop = end < (tile + 1) * units_of_tile ? end : (tile + 1) * units_of_tile;
    const int64_t first = tile * tile_channels;
    const int width = static_cast<int>(shape.c - first < tile_channels ? shape.c - first : tile_channels);
    const double* const tile_mean = mean ? mean + first : nullptr;
    const bool alone = begin == tile * units_of_tile && stop - begin == units_of_tile;
    sums.begin(width, packet, shape.c, first, alone);
    while (begin < stop) {
      const int64_t unit = begin - tile * units_of_tile;
      if (shape.s == 1) {
        const int64_t offset = unit * shape.c + first;
        const bool group = !terms.masked() && stop - begin >= kSingles;
        begin += group ? kSingles : 1;
        if (!terms.counts(unit)) continue;
        sums.expect(group ? kSingles : 1);
        int c = 0;
        if (group) {
          c = single_columns<F64, 2, kSingles>(terms, offset, shape.c, c, width, tile_mean, &sums);
          c = single_columns<S64, 1, kSingles>(terms, offset, shape.c, c, width, tile_mean, &sums);
        } else {
          c = single_columns<F64, 1, 1>(terms, offset, shape.c, c, width, tile_mean, &sums);
          c = single_columns<S64, 1, 1>(terms, offset, shape.c, c, width, tile_mean, &sums);
        }
        continue;
      }
      const int64_t n = unit / pieces, piece = unit - n * pieces;
      const auto length_of = [&](int64_t at) {
        return static_cast<int>(shape.s - at * kPiece < kPiece ? shape.s - at * kPiece : kPiece);
      };
      if (shape.layout == HVD_SYNCBN_CHANNELS_LAST) {
        ++begin;
        sums.expect(1);
        column_piece(terms, n * shape.s + piece * kPiece, length_of(piece), shape.c, first, width, tile_mean, scratch,
                     &sums);
        continue;
      }
      // Several pieces of a row before the next row, because full memory bandwidth needs reads along rows.
      const int64_t ours = pieces - piece < stop - begin ? pieces - piece : stop - begin;
      const int run = static_cast<int>(ours < kRun ? ours : kRun);
      begin += run;
      for (int i = 0; i < width; i += F64::N) {
        F64 rows_a[kRun][F64::N], rows_b[kRun][F64::N];
        for (int r = 0; r < F64::N; ++r) {
          const int c = i + r < width ? i + r : width - 1;  // repeats the last channel; the result is not used
          for (int p = 0; p < run; ++p) {
            const LaneSums m =
                row(n, first + c, (piece + p) * kPiece, length_of(piece + p), mean ? mean[first + c] : 0.0);
            rows_a[p][r] = m.a;
            rows_b[p][r] = m.b;
          }
        }
        for (int p = 0; p < run; ++p) {
          fold_rows(rows_a[p]).keep(scratch.a + p * scratch.pitch + i);
          fold_rows(rows_b[p]).keep(scratch.b + p * scratch.pitch + i);
        }
      }
      for (int p = 0; p < run; ++p) {
        sums.expect(1);
        add_pieces(scratch.a + p * scratch.pitch, scratch.b + p * scratch.pitch, width, &sums);
      }
    }
    sums.finish();
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_MOMENTS_H_
