// Piece sums in the canonical order (docs/protocol.md, 1), for the two moment kernels.
//
// A kernel brings Terms: what one element adds to the two moments.
//   terms.load<kWidth>(i, row)    kWidth elements from offset i, as they lie in memory; row: their position, for a mask
//   terms.element(loaded, e)      the e-th of them, masked
//   terms.term(element, mean)     {a, d}: the moments grow by a and a*d
//   Terms::kUsesMean              whether terms use the mean
//   Terms::Lanes                  how terms of a lane are added up (lane_sums.cuh)
//
// A block sums a tile of channels over one of `splits` shares of its items. Its threads take `turn` items at a time,
// and the blocks of a tile take turns, so that a launch goes through memory once, from the first sample to the last.
// Four forms, by the way a piece lies:
//   Rows<kWidth>      channels first, pieces of more than 64 positions. An item is a piece of the tile's one channel,
//                     read by 32 / kWidth threads, a lane of the canonical order for each element of an access.
//   Planes<kWidth>    channels first, short pieces. An item is a sample; runs of up to 128 rows are copied to shared
//                     memory as they lie, kWidth elements at a time, and each thread sums a row.
//   Columns<kWidth>   channels last, pieces of more than 64 positions. An item is a piece of 32 * kWidth channels; a
//                     thread takes eight lanes of kWidth channels, two lanes at a time.
//   Cells             channels last, short pieces, and 2-D input. An item is a sample; a thread sums whole pieces of
//                     one channel.
#ifndef HVD_SYNCBN_CUDA_MOMENTS_CUH_
#define HVD_SYNCBN_CUDA_MOMENTS_CUH_

#include "lane_sums.cuh"

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

// A block's items: `turn` of them from begin, from begin + step, ..., all below end.
struct Share {
  int64_t begin, end, step;
};

// The mean of a channel, 0 where terms use none or there is no such channel.
template <class Terms>
__device__ double mean_of(const double* means, const Walk& walk, int64_t channel) {
  return Terms::kUsesMean && channel < walk.c ? means[channel] : 0.0;
}

// ---- Rows

template <int kWidth>
struct Rows {
  static constexpr int kGroup = 32 / kWidth;               // threads of a piece
  static constexpr int kGroups = kMomentThreads / kGroup;  // pieces at a time

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, const double* means, int64_t channel, Share share,
                            ThreadSums* sums, unsigned char*) {
    // Loads in flight before the first is used: 32 to 64 bytes of a thread.
    constexpr int kBatch = kWidth == 1 || sizeof(typename Terms::Type) == 2 ? 8 : 4;
    const int thread = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
    const double mean = mean_of<Terms>(means, walk, channel);
    typename Terms::Lanes adding;
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
        typename Terms::Lanes::Lane sums_of[kWidth];
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
            for (int e = 0; e < kWidth; ++e) adding.add(&sums_of[e], terms, terms.element(loaded[u], e), mean);
          }
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          lanes[e] = adding.exact(sums_of[e]) ? adding.moments(sums_of[e])
                                              : float64_lane(terms, mean, offset, 1, row, thread * kWidth + e, length);
        }
        adding.follow(lanes[0], static_cast<int>(ceil_div(length, kLanes)));
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

template <int kWidth>
struct Planes {
  // The shared rows' distance: odd, so that threads that walk rows side by side read different banks. Wide accesses are
  // for odd rows, which then lie in shared memory as in global memory.
  __host__ __device__ static int pitch(int64_t s) { return static_cast<int>(s) | 1; }

  // Rows that fit beside the sums into `bytes` of shared memory, and start at an access.
  __host__ __device__ static int rows(int64_t bytes, int64_t s, int64_t element_bytes) {
    const int64_t fit = (bytes - kSumsBytes - 16) / (pitch(s) * element_bytes);
    return static_cast<int>(fit < kMomentThreads ? fit / kWidth * kWidth : kMomentThreads);
  }

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, const double* means, int64_t first, Share share,
                            ThreadSums* sums, unsigned char* shared) {
    using Element = typename Terms::Element;
    Element* const stage = reinterpret_cast<Element*>(shared);
    const int s = static_cast<int>(walk.s), between = pitch(walk.s), t = threadIdx.x;
    const int channels = static_cast<int>(walk.c - first < walk.tile ? walk.c - first : walk.tile);
    const double mean = mean_of<Terms>(means, walk, first + t % walk.tile);
    ShortPieceSums piece_sums;
    for (int64_t n = share.begin; n < share.end; n += share.step) {
      const int staged = static_cast<int>(share.end - n < walk.turn ? share.end - n : walk.turn) * channels;
      copy(walk, terms, n, first, channels, staged * s, stage);
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

 private:
  // Copies `elements` elements of whole rows, from sample n and a channel on.
  template <class Terms>
  __device__ static void copy(const Walk& walk, const Terms& terms, int64_t n, int64_t first, int channels,
                              int elements, typename Terms::Element* stage) {
    using Element = typename Terms::Element;
    const int64_t offset = (n * walk.c + first) * walk.s;
    const int t = threadIdx.x;
    if constexpr (kWidth > 1) {
      // What fits the registers: up to three arrays are in flight in the backward direction.
      constexpr int kBatch = Terms::kUsesMean ? 2 : 8, kStored = 16 / sizeof(Element);
      for (int i = t * kWidth; i < elements; i += kBatch * kMomentThreads * kWidth) {
        typename Terms::template Loaded<kWidth> loaded[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const int at = i + u * kMomentThreads * kWidth;
          if (at < elements) loaded[u] = terms.template load<kWidth>(offset + at, 0);
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const int at = i + u * kMomentThreads * kWidth;
          if (at >= elements) break;
#pragma unroll
          for (int from = 0; from < kWidth; from += kStored) {
            Pack<Element, kStored> pack;
#pragma unroll
            for (int e = 0; e < kStored; ++e) pack.v[e] = terms.element(loaded[u], from + e);
            store_pack<kStored>(stage + at + from, pack);
          }
        }
      }
    } else {
      constexpr int kBatch = Terms::kUsesMean ? (sizeof(Element) < 16 ? 4 : 2) : sizeof(Element) < 8 ? 8 : 4;
      const int s = static_cast<int>(walk.s), between = pitch(walk.s);
      const int row_step = kMomentThreads / s, column_step = kMomentThreads - row_step * s;
      int row = t / s, column = t - row * s;
      for (int i = t; i < elements; i += kBatch * kMomentThreads) {
        typename Terms::template Loaded<1> loaded[kBatch];
        int to[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (i + u * kMomentThreads < elements) {
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
          if (i + u * kMomentThreads < elements) stage[to[u]] = terms.element(loaded[u], 0);
        }
      }
    }
  }
};

// ---- Columns

template <int kWidth>
struct Columns {
  static constexpr int kTile = 32 * kWidth;
  static constexpr int64_t kSharedFold = 2 * kWarps * kTile * sizeof(Moments);

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, const double* means, int64_t first, Share share,
                            ThreadSums* sums, unsigned char* shared) {
    const int warp = threadIdx.x / 32, column = threadIdx.x % 32 * kWidth;
    const int64_t channel = first + column;
    double mean[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) mean[e] = mean_of<Terms>(means, walk, channel + e);
    typename Terms::Lanes adding[kWidth];
    // Two buffers: while some warps fold the sums of an item, the others are at the next.
    Moments* const fold = reinterpret_cast<Moments*>(shared);
    int round = 0;
    for (int64_t item = share.begin; item < share.end; item += share.step, ++round) {
      const unsigned n = static_cast<unsigned>(item) / static_cast<unsigned>(walk.pieces);
      const int64_t position = static_cast<int64_t>(static_cast<unsigned>(item) - n * walk.pieces) * kPiece;
      const int length = static_cast<int>(walk.s - position < kPiece ? walk.s - position : kPiece);
      const int64_t row = n * walk.s + position;
      Moments even[kWidth], odd[kWidth];
      if (channel < walk.c) {
        // In the order of the fold, so that few sums are alive and many loads fit the registers.
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const int lane = warp + kWarps * (i / 2 + i % 2 * 2);
          Moments both[kWidth];
          two_lanes(terms, mean, row, row * walk.c + channel, walk.c, lane, length, adding, both);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            if (i == 0) {
              even[e] = both[e];
            } else if (i == 1) {
              even[e].add(both[e]);
            } else if (i == 2) {
              odd[e] = both[e];
            } else {
              odd[e].add(both[e]);
            }
          }
        }
      }
      Moments* const buffer = fold + (round & 1) * kWarps * kTile;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        even[e].add(odd[e]);
        buffer[warp * kTile + column + e] = even[e];
      }
      __syncthreads();
      if (static_cast<int>(threadIdx.x) / kTile == round % (kMomentThreads / kTile)) {
        const Moments* const rest = buffer + threadIdx.x % kTile;
        Moments sum[kWarps];
#pragma unroll
        for (int k = 0; k < kWarps; ++k) sum[k] = rest[k * kTile];
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

 private:
  // Lanes j and j + 16 of a piece, added. row, offset: of its first position and its first element.
  template <class Terms>
  __device__ static void two_lanes(const Terms& terms, const double (&mean)[kWidth], int64_t row, int64_t offset,
                                   int64_t c, int j, int length, typename Terms::Lanes (&adding)[kWidth],
                                   Moments (&sum)[kWidth]) {
    constexpr int kHalf = kLanes / 2;
    // Loads of a thread in flight: 64 bytes, of each array 32 where there are several; what fits the registers beside
    // the integers of two channels.
    constexpr bool kHalved = Terms::kUsesMean || (Terms::Lanes::kIntegers && kWidth > 1);
    constexpr int kBatch = (kHalved ? 8 : 16) / (sizeof(typename Terms::Type) == 8 ? 2 : 1);
    // Added up: a product of 64 bits per load would take more instructions than the sums.
    const int64_t step = kHalf * c;
    int64_t from = offset + j * c;
    typename Terms::Lanes::Lane lane[kWidth], other[kWidth];
    for (int i = j; i < length; i += kBatch * kHalf) {
      typename Terms::template Loaded<kWidth> loaded[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int at = i + u * kHalf;
        if (at < length) loaded[u] = terms.template load<kWidth>(from, row + at);
        from += step;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (i + u * kHalf >= length) break;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          adding[e].add(&(u % 2 ? other : lane)[e], terms, terms.element(loaded[u], e), mean[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const auto moments = [&](const auto& sums, int at) {
        return adding[e].exact(sums) ? adding[e].moments(sums)
                                     : float64_lane(terms, mean[e], offset + e, c, row, at, length);
      };
      sum[e] = moments(lane[e], j);
      const Moments second = moments(other[e], j + kHalf);
      adding[e].follow(sum[e], static_cast<int>(ceil_div(length, kLanes)));
      sum[e].add(second);
    }
  }
};

// ---- Cells

struct Cells {
  static constexpr int kBatch = 8;  // 2-D: loads of a thread in flight

  template <class Terms>
  __device__ static int sum(const Walk& walk, const Terms& terms, const double* means, int64_t first, Share share,
                            ThreadSums* sums, unsigned char*) {
    const int64_t channel = first + threadIdx.x % 32;
    const int s = static_cast<int>(walk.s);
    if (channel >= walk.c) return kMomentThreads;
    const double mean = mean_of<Terms>(means, walk, channel);
    ShortPieceSums piece_sums;
    typename Terms::Lanes adding;
    int64_t n = share.begin + threadIdx.x / 32;
    if (s == 1) {
      for (; n < share.end; n += share.step) {
        typename Terms::template Loaded<1> loaded[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const int64_t row = n + u * kWarps;
          if (row < share.end) loaded[u] = terms.template load<1>(row * walk.c + channel, row);
        }
        if constexpr (Terms::Lanes::kIntegers) {
          // Every element is a piece, and no sum of them is rounded; so pieces may be added up first.
          typename Terms::Lanes::Lane lane;
          int elements = 0;
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (n + u * kWarps >= share.end) break;
            adding.add(&lane, terms, terms.element(loaded[u], 0), mean);
            elements = u + 1;
          }
          if (adding.exact(lane)) {
            const Moments moments = adding.moments(lane);
            piece_sums.add(moments, sums);
            adding.follow(moments, elements);
            continue;
          }
          note_float64_lane();
        }
        Moments whole;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (n + u * kWarps >= share.end) break;
          Moments moments;
          moments.add(terms.term(terms.element(loaded[u], 0), mean));
          piece_sums.add(moments, sums);
          if constexpr (Terms::Lanes::kIntegers) whole.add(moments);
        }
        adding.follow(whole, kBatch);
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
  const Share share = {int64_t{split} * walk.turn, walk.items, int64_t{walk.splits} * walk.turn};
  const int columns = Form::sum(walk, arguments.terms, closing.stats, first, share, &sums, shared + kSumsBytes);
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

template <int kWidth, class Terms>
cudaError_t launch_planes(const Walk& walk, const Terms& terms, const Closing& closing, void* stream) {
  using Form = Planes<kWidth>;
  constexpr int64_t kElement = sizeof(typename Terms::Element);
  int64_t most;
  const cudaError_t error = most_shared_bytes(&most);
  if (error != cudaSuccess) return error;
  const int rows = Form::rows(most, walk.s, kElement);
  const int tile = static_cast<int>(walk.c < rows ? std::max(walk.c, int64_t{1}) : rows);
  // Samples follow one another in memory only where the tile holds all channels.
  const int turn = tile == walk.c ? rows / tile : 1;
  return launch_form<Form>(walk, tile, walk.n, turn, int64_t{rows} * Form::pitch(walk.s) * kElement, terms, closing,
                           stream);
}

// Short pieces of several positions are for Float64Lanes alone.
// access: bytes of the widest access for which all arrays are aligned; of one element if there is a mask.
template <class Terms>
cudaError_t launch_moments(const hvd_syncbn_shape& shape, int64_t access, const Terms& terms, const Closing& closing,
                           void* stream) {
  using T = typename Terms::Type;
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
    if constexpr (sizeof(T) == 2) {
      using Pairs = Columns<2>;
      // Where four blocks per multiprocessor are left, and no threads without channels.
      const bool enough = shape.c > 32 && ceil_div(shape.c, Pairs::kTile) * pieces >= int64_t{4} * sms;
      if (enough && shape.c % 2 == 0 && access >= 4) {
        return launch_form<Pairs>(walk, Pairs::kTile, pieces, 1, Pairs::kSharedFold, terms, closing, stream);
      }
    }
    return launch_form<Columns<1>>(walk, 32, pieces, 1, Columns<1>::kSharedFold, terms, closing, stream);
  }
  if constexpr (!Terms::Lanes::kIntegers) {
    if (shape.s <= kShortPiece) {
      constexpr int kWidth = 16 / sizeof(T);
      return access >= 16 && shape.s % 2 == 1 && shape.c % kWidth == 0
                 ? launch_planes<kWidth>(walk, terms, closing, stream)
                 : launch_planes<1>(walk, terms, closing, stream);
    }
  }
  // Where pieces are few, more threads have to share each of them.
  constexpr int kWidth = sizeof(T) == 8 ? 2 : 4;
  using Wide = Rows<kWidth>;
  if (access >= static_cast<int64_t>(kWidth * sizeof(T)) && shape.s % kWidth == 0 &&
      pieces * shape.c * Wide::kGroup >= int64_t{256} * sms) {
    return launch_form<Wide>(walk, 1, pieces, Wide::kGroups, 0, terms, closing, stream);
  }
  return launch_form<Rows<1>>(walk, 1, pieces, Rows<1>::kGroups, 0, terms, closing, stream);
}

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_MOMENTS_CUH_
