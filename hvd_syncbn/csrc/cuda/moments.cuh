// Piece sums in the canonical order (docs/protocol.md, 1), for the two moment kernels.
//
// A kernel brings Terms: what one element adds to the two moments.
//   terms.load<kWidth>(i, row)    kWidth elements from offset i, as they lie in memory; row: their position, for a mask
//   terms.element(loaded, e)      the e-th of them, masked
//   terms.term(element, mean)     {a, d}: the moments grow by a and a*d
//   Terms::kArrays, kUsesMean     arrays of an element that are kept; whether terms use the mean
//
// A block sums a tile of channels over one of `splits` shares of its items. Its threads take `turn` items at a time,
// and the blocks of a tile take turns, so that a launch goes through memory once, from the first sample to the last.
// Four forms, by the way a piece lies:
//   Rows<kWidth>   channels first, pieces of more than 64 positions. An item is a piece of the tile's one channel, read
//                  by 32 / kWidth threads, a lane of the canonical order for each element of an access.
//   Planes         channels first, short pieces. An item is a sample; runs of up to 128 rows are copied to shared
//                  memory as they lie, and each thread sums a row.
//   Columns        channels last, pieces of more than 64 positions. An item is a piece of 32 channels; a thread takes
//                  eight lanes of one channel.
//   Cells          channels last, short pieces, and 2-D input. An item is a sample; a thread sums whole pieces of one
//                  channel.
#ifndef HVD_SYNCBN_CUDA_MOMENTS_CUH_
#define HVD_SYNCBN_CUDA_MOMENTS_CUH_

#include "exact_sums.cuh"

namespace hvd_syncbn {
namespace cuda {

constexpr int kShortPiece = 64;
constexpr int kWarps = kMomentThreads / 32;

struct Walk {
  int64_t n, c, s;
  int64_t items;  // of a tile
  int64_t tiles;
  int pieces;  // of a row
  int tile;    // channels
  int turn;    // items that a block's threads sum at a time
  int splits;
};

struct Term {
  double a, d;
};

struct Moments {
  double a = 0, b = 0;

  __device__ void add(const Term& term) {
    a += term.a;
    b = fused(term.a, term.d, b);
  }
  __device__ void add(const Moments& other) {
    a += other.a;
    b += other.b;
  }
};

// A block's items: `turn` of them from begin, from begin + step, ..., all below end.
struct Share {
  int64_t begin, end, step;
};

// ---- Rows

template <int kWidth>
struct Rows {
  static constexpr int kGroup = 32 / kWidth;               // threads of a piece
  static constexpr int kGroups = kMomentThreads / kGroup;  // pieces at a time

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, double mean, int64_t channel, Share share,
                            ThreadSums* sums, unsigned char*) {
    // Loads in flight before the first is used: 32 to 64 bytes of a thread.
    constexpr int kBatch = kWidth == 1 || sizeof(typename Terms::Type) == 2 ? 8 : 4;
    const int thread = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
    Moments kept;
    bool keeps = false;
    int round = 0;
    for (int64_t base = share.begin; base < share.end; base += share.step, ++round) {
      const unsigned item = static_cast<unsigned>(base + group);
      Moments lanes[kWidth];
      if (item < share.end) {
        const unsigned n = item / static_cast<unsigned>(walk.pieces);
        const int64_t position = static_cast<int64_t>(item - n * walk.pieces) * kPiece;
        const int length = static_cast<int>(walk.s - position < kPiece ? walk.s - position : kPiece);
        const int64_t offset = (n * walk.c + channel) * walk.s + position;
        const int64_t row = n * walk.s + position;
        for (int i = thread * kWidth; i < length; i += kBatch * kLanes) {
          typename Terms::template Loaded<kWidth> loaded[kBatch];
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            const int at = i + u * kLanes;
            if (at < length) loaded[u] = terms.template load<kWidth>(offset + at, row + at);
          }
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (i + u * kLanes >= length) break;
#pragma unroll
            for (int e = 0; e < kWidth; ++e) lanes[e].add(terms.term(terms.element(loaded[u], e), mean));
          }
        }
      }
      // lane[j] += lane[j + w]. Addition commutes, so each thread of a pair may compute the sum.
#pragma unroll
      for (int w = kLanes / 2; w >= kWidth; w /= 2) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          Moments other;
          other.a = __shfl_xor_sync(kWholeWarp, lanes[e].a, w / kWidth);
          other.b = __shfl_xor_sync(kWholeWarp, lanes[e].b, w / kWidth);
          lanes[e].add(other);
        }
      }
#pragma unroll
      for (int w = kWidth / 2; w >= 1; w /= 2) {
#pragma unroll
        for (int e = 0; e < w; ++e) lanes[e].add(lanes[e + w]);
      }
      // Splitting a value into limbs takes many instructions: each thread keeps a piece, then all split at once.
      if (round % kGroup == thread) {
        kept = lanes[0];
        keeps = item < share.end;
      }
      if (round % kGroup == kGroup - 1 || base + share.step >= share.end) {
        if (keeps) {
          sums->deposit(kMomentA, kept.a);
          sums->deposit(kMomentB, kept.b);
          sums->count();
        }
        keeps = false;
      }
    }
    return kMomentThreads;
  }
};

// ---- Short pieces by one thread

// The sum of one piece of at most kShortPiece positions; term(i) is position i's. Lanes are visited in the order of the
// fold, so that few sums are alive: a strand is lanes j, j + 8, j + 16 and j + 24, a quarter is strands j and j + 4.
// Adding the +0.0 of an absent position changes nothing.
template <class GetTerm>
__device__ Moments strand(int length, const GetTerm& term, int j) {
  constexpr int kStrands = 8, kTerms = kShortPiece / kStrands;
  Term terms[kTerms];
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const int at = j + i * kStrands;
    terms[i] = at < length ? term(at) : Term{0, 0};
  }
  Moments lanes[kTerms / 2];
#pragma unroll
  for (int lane = 0; lane < kTerms / 2; ++lane) {
    lanes[lane].add(terms[lane]);
    lanes[lane].add(terms[lane + kTerms / 2]);
  }
  lanes[0].add(lanes[2]);
  lanes[1].add(lanes[3]);
  lanes[0].add(lanes[1]);
  return lanes[0];
}

template <class GetTerm>
__device__ Moments short_piece(int length, const GetTerm& term) {
  Moments even, odd;  // of quarters 0 and 2, of quarters 1 and 3
  // Not unrolled: the loads of two strands are enough in flight, and more would not fit the registers.
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int j = i / 2 + i % 2 * 2;
    Moments quarter = strand(length, term, j);
    quarter.add(strand(length, term, j + 4));
    if (j == 0) {
      even = quarter;
    } else if (j == 1) {
      odd = quarter;
    } else if (j == 2) {
      even.add(quarter);
    } else {
      odd.add(quarter);
    }
  }
  even.add(odd);
  return even;
}

// Both moments of the many short pieces of a thread.
class ShortPieceSums {
 public:
  __device__ void add(const Moments& moments, ThreadSums* sums) {
    a_.add(moments.a, sums);
    b_.add(moments.b, sums);
    sums->count();
    if (++values_ == TwoPartSum::kValues) flush(sums);
  }
  __device__ void flush(ThreadSums* sums) {
    a_.flush(sums);
    b_.flush(sums);
    values_ = 0;
  }

 private:
  // Where the values of common data fit: about 1, and their squares.
  TwoPartSum a_{kMomentA, -20}, b_{kMomentB, -26};
  int values_ = 0;
};

// ---- Planes

struct Planes {
  // The shared rows' distance: odd, so that threads that walk rows side by side read different banks.
  __host__ __device__ static int pitch(int64_t s) { return static_cast<int>(s) | 1; }

  // Rows that fit beside the sums.
  __host__ __device__ static int rows(int64_t s, int64_t element_bytes) {
    const int64_t fit = (kSharedBytes - kSumsBytes - 16) / (pitch(s) * element_bytes);
    return static_cast<int>(fit < kMomentThreads ? fit : kMomentThreads);
  }

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, double mean, int64_t first, Share share,
                            ThreadSums* sums, unsigned char* shared) {
    using Element = typename Terms::Element;
    constexpr int kBatch = sizeof(Element) < 8 ? 8 : 4;
    Element* const stage = reinterpret_cast<Element*>(shared);
    const int s = static_cast<int>(walk.s), between = pitch(walk.s), t = threadIdx.x;
    const int channels = static_cast<int>(walk.c - first < walk.tile ? walk.c - first : walk.tile);
    const int row_step = kMomentThreads / s, column_step = kMomentThreads - row_step * s;
    ShortPieceSums piece_sums;
    for (int64_t n = share.begin; n < share.end; n += share.step) {
      const int staged = static_cast<int>(share.end - n < walk.turn ? share.end - n : walk.turn) * channels;
      const int64_t offset = (n * walk.c + first) * walk.s;
      int row = t / s, column = t - row * s;
      for (int i = t; i < staged * s; i += kBatch * kMomentThreads) {
        typename Terms::template Loaded<1> loaded[kBatch];
        int to[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (i + u * kMomentThreads < staged * s) {
            loaded[u] = terms.template load<1>(offset + i + u * kMomentThreads, (n + row / channels) * s + column);
          }
          to[u] = row * between + column;
          row += row_step;
          column += column_step;
          if (column >= s) {
            column -= s;
            ++row;
          }
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (i + u * kMomentThreads < staged * s) stage[to[u]] = terms.element(loaded[u], 0);
        }
      }
      __syncthreads();
      if (t < staged) {
        const Element* const mine = stage + t * between;
        piece_sums.add(short_piece(s, [&](int i) { return terms.term(mine[i], mean); }), sums);
      }
      __syncthreads();
    }
    piece_sums.flush(sums);
    return walk.turn * walk.tile;
  }
};

// ---- Columns

struct Columns {
  static constexpr int kLanesPerThread = kLanes / kWarps;
  static constexpr int64_t kSharedFold = 2 * kMomentThreads * sizeof(Moments);

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, double mean, int64_t first, Share share,
                            ThreadSums* sums, unsigned char* shared) {
    const int warp = threadIdx.x / 32;
    const int64_t channel = first + threadIdx.x % 32;
    // Two buffers: while one warp folds the sums of an item, the others are at the next.
    Moments* const fold = reinterpret_cast<Moments*>(shared);
    int round = 0;
    for (int64_t item = share.begin; item < share.end; item += share.step, ++round) {
      const unsigned n = static_cast<unsigned>(item) / static_cast<unsigned>(walk.pieces);
      const int64_t position = static_cast<int64_t>(static_cast<unsigned>(item) - n * walk.pieces) * kPiece;
      const int length = static_cast<int>(walk.s - position < kPiece ? walk.s - position : kPiece);
      const int64_t row = n * walk.s + position;
      Moments lanes[kLanesPerThread];  // warp, warp + kWarps, ...
      if (channel < walk.c) {
        for (int i = warp; i < length; i += kLanes) {
          typename Terms::template Loaded<1> loaded[kLanesPerThread];
#pragma unroll
          for (int k = 0; k < kLanesPerThread; ++k) {
            const int at = i + k * kWarps;
            if (at < length) loaded[k] = terms.template load<1>((row + at) * walk.c + channel, row + at);
          }
#pragma unroll
          for (int k = 0; k < kLanesPerThread; ++k) {
            if (i + k * kWarps < length) lanes[k].add(terms.term(terms.element(loaded[k], 0), mean));
          }
        }
      }
#pragma unroll
      for (int w = kLanesPerThread / 2; w >= 1; w /= 2) {
#pragma unroll
        for (int k = 0; k < w; ++k) lanes[k].add(lanes[k + w]);
      }
      Moments* const buffer = fold + (round & 1) * kMomentThreads;
      buffer[threadIdx.x] = lanes[0];
      __syncthreads();
      if (warp == round % kWarps) {
        const Moments* const rest = buffer + threadIdx.x % 32;
        Moments sum[kWarps];
#pragma unroll
        for (int k = 0; k < kWarps; ++k) sum[k] = rest[k * 32];
#pragma unroll
        for (int w = kWarps / 2; w >= 1; w /= 2) {
#pragma unroll
          for (int k = 0; k < w; ++k) sum[k].add(sum[k + w]);
        }
        sums->deposit(kMomentA, sum[0].a);
        sums->deposit(kMomentB, sum[0].b);
        sums->count();
      }
    }
    return kMomentThreads;
  }
};

// ---- Cells

struct Cells {
  static constexpr int kBatch = 8;  // 2-D: loads of a thread in flight

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, double mean, int64_t first, Share share,
                            ThreadSums* sums, unsigned char*) {
    const int64_t channel = first + threadIdx.x % 32;
    const int s = static_cast<int>(walk.s);
    if (channel >= walk.c) return kMomentThreads;
    ShortPieceSums piece_sums;
    int64_t n = share.begin + threadIdx.x / 32;
    if (s == 1) {
      for (; n < share.end; n += share.step) {
        typename Terms::template Loaded<1> loaded[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const int64_t row = n + u * kWarps;
          if (row < share.end) loaded[u] = terms.template load<1>(row * walk.c + channel, row);
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (n + u * kWarps >= share.end) break;
          Moments moments;
          moments.add(terms.term(terms.element(loaded[u], 0), mean));
          piece_sums.add(moments, sums);
        }
      }
    } else {
      for (; n < share.end; n += share.step) {
        const int64_t row = n * s;
        piece_sums.add(short_piece(s,
                                   [&](int i) {
                                     const auto loaded = terms.template load<1>((row + i) * walk.c + channel, row + i);
                                     return terms.term(terms.element(loaded, 0), mean);
                                   }),
                       sums);
      }
    }
    piece_sums.flush(sums);
    return kMomentThreads;
  }
};

// ---- The kernel

template <class Terms>
struct MomentsArguments {
  Walk walk;
  Terms terms;
  Closing closing;
};

// At least 4 blocks per multiprocessor: 128 registers.
template <class Form, class Terms>
__global__ void __launch_bounds__(kMomentThreads, 4)
    moments(const __grid_constant__ MomentsArguments<Terms> arguments) {
  const Walk& walk = arguments.walk;
  const Closing& closing = arguments.closing;
  unsigned char* const shared = shared_memory();
  int64_t* const limbs = reinterpret_cast<int64_t*>(shared);
  const int64_t tile = blockIdx.x % walk.tiles, first = tile * walk.tile;
  const int split = static_cast<int>(blockIdx.x / walk.tiles);
  if (blockIdx.x == 0) {
    if constexpr (Terms::kUsesMean) {  // backward; a call costs the forward kernels registers
      write_header(closing, walk.c);
    } else if (threadIdx.x < kHeader && threadIdx.x != 1) {
      closing.packet[threadIdx.x] = header_word(threadIdx.x, closing.digest);
    }
  }
  if (closing.mask != nullptr) {
    if (tile == 0) count_mask(closing, split, walk.splits);
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    closing.packet[1] = closing.count;
  }
  if (walk.c == 0) return;

  ThreadSums sums(limbs);
  const int64_t channel = first + (walk.tile == 1 ? 0 : threadIdx.x % walk.tile);
  const double mean = Terms::kUsesMean && channel < walk.c ? closing.stats[channel] : 0.0;
  const Share share = {int64_t{split} * walk.turn, walk.items, int64_t{walk.splits} * walk.turn};
  const int columns = Form::sum(walk, arguments.terms, mean, first, share, &sums, shared + kSumsBytes);
  if (walk.items >= kValuesWithoutCarry) sums.carry();
  publish(closing, limbs, columns, walk.tile, walk.c, first, walk.splits);
}

// ---- The launch

template <class Form, class Terms>
cudaError_t launch_form(Walk walk, int tile, int64_t items, int turn, int64_t form_bytes, const Terms& terms,
                        const Closing& closing, void* stream) {
  const int64_t bytes = kSumsBytes + form_bytes;
  int64_t wave;
  const cudaError_t error =
      wave_blocks(reinterpret_cast<const void*>(&moments<Form, Terms>), kMomentThreads, bytes, &wave);
  if (error != cudaSuccess) return error;
  walk.tile = tile;
  walk.tiles = ceil_div(walk.c, tile) > 1 ? ceil_div(walk.c, tile) : 1;
  walk.items = items;
  walk.turn = turn;
  walk.splits = static_cast<int>(std::min(choose_splits(walk.tiles, ceil_div(items, turn), wave), kMaxSplits));
  return launch(moments<Form, Terms>, walk.tiles * walk.splits, kMomentThreads, bytes, stream,
                MomentsArguments<Terms>{walk, terms, closing});
}

// wide: whether accesses of kWidth elements are aligned.
template <int kWidth, class Terms>
cudaError_t launch_moments(const hvd_syncbn_shape& shape, bool wide, const Terms& terms, const Closing& closing,
                           void* stream) {
  cudaError_t error =
      cudaMemsetAsync(closing.packet, 0, packet_size(shape.c) * sizeof(int64_t), static_cast<cudaStream_t>(stream));
  int sms = 0;
  if (error == cudaSuccess) error = multiprocessors(&sms);
  if (error != cudaSuccess) return error;
  Walk walk = {};
  walk.n = shape.n;
  walk.c = shape.c;
  walk.s = shape.s;
  walk.pieces = static_cast<int>(ceil_div(shape.s, kPiece));
  const int64_t pieces = shape.n * walk.pieces;
  // Of one channel, both layouts are the same.
  const bool innermost = (shape.layout == HVD_SYNCBN_CHANNELS_LAST && shape.c > 1) || shape.s <= 1;
  if (innermost) {
    if (shape.s <= kShortPiece) {
      const int turn = shape.s == 1 ? Cells::kBatch * kWarps : kWarps;
      return launch_form<Cells>(walk, 32, shape.s == 0 ? 0 : shape.n, turn, 0, terms, closing, stream);
    }
    return launch_form<Columns>(walk, 32, pieces, 1, Columns::kSharedFold, terms, closing, stream);
  }
  if (shape.s <= kShortPiece) {
    const int rows = Planes::rows(shape.s, sizeof(typename Terms::Element));
    const int tile = shape.c < rows ? static_cast<int>(shape.c > 0 ? shape.c : 1) : rows;
    const int64_t bytes = int64_t{rows} * Planes::pitch(shape.s) * sizeof(typename Terms::Element);
    // Samples follow one another in memory only where the tile holds all channels.
    return launch_form<Planes>(walk, tile, shape.n, tile == shape.c ? rows / tile : 1, bytes, terms, closing, stream);
  }
  // Where pieces are few, more threads have to share each of them.
  if (wide && pieces * shape.c * Rows<kWidth>::kGroup >= int64_t{256} * sms) {
    return launch_form<Rows<kWidth>>(walk, 1, pieces, Rows<kWidth>::kGroups, 0, terms, closing, stream);
  }
  return launch_form<Rows<1>>(walk, 1, pieces, Rows<1>::kGroups, 0, terms, closing, stream);
}

// Elements of an access of the moment kernels.
template <class T>
constexpr int kMomentWidth = sizeof(T) == 8 ? 2 : 4;

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_MOMENTS_CUH_
