// The walk over elements that both apply kernels share. An Op brings
//   kDirection                             HVD_SYNCBN_FORWARD or HVD_SYNCBN_BACKWARD
//   Coefficients, finish(channel, first)   what it needs of a channel, from the reduced packet; first: this block alone
//                                          writes what there is one of per channel
//   prefetch(i)                            starts the loads of offset i into the second-level cache
//   load<kWidth>(i, row)                   kWidth elements from offset i; row: their position, for a mask
//   compute(loaded, e, k, &results)        the e-th of them
//   store(i, results)
//
// A block finishes a tile of channels into shared memory and applies them to one of `splits` shares of its items. Its
// threads take turn() items at a time, and the blocks of a tile take turns, as in moments.cuh, but from the last block
// and the last item to the first: what the launch before read last may still be in the second-level cache. A block's
// first loads are prefetched before it finishes its channels. Two forms:
//   Runs<kWidth>    channels first. An item is a sample's run of the tile's rows, which lie side by side, or a part of
//                   it where a row is long.
//   Lines<kWidth>   channels last, and 2-D input. An item is a position; a thread stays on kWidth channels and keeps
//                   their coefficients in registers.
#ifndef HVD_SYNCBN_CUDA_APPLY_CUH_
#define HVD_SYNCBN_CUDA_APPLY_CUH_

#include "../common/finish.h"
#include "../common/vectors.h"
#include "device.cuh"

namespace hvd_syncbn {
namespace cuda {

constexpr int kApplyThreads = 256;
// Accesses of a thread in flight.
constexpr int kApplyBatch = 4;

struct ApplyWalk {
  int64_t n, c, s;
  int64_t items;  // of a tile
  int64_t tiles;
  int64_t turns;  // of a tile: its items, `turn` at a time
  int tile;       // channels
  int splits;
  int chunks;           // of a run
  unsigned row_factor;  // Runs: row = offset in the run * row_factor / 2^32
};

// A block's turns: last, last - splits, ..., down to 0.
struct Turns {
  int64_t last;
  int splits;
};

// ---- Runs

template <int kWidth>
struct Runs {
  static constexpr int kRun = 4096;    // elements, at least, of a run
  static constexpr int kChunk = 8192;  // elements, at most, of an item where the run is one row

  template <class Op>
  __host__ __device__ static int64_t turn(int) {
    return 1;
  }

  template <class Op>
  __device__ static void prefetch(const ApplyWalk& walk, const Op& op, int64_t first, Turns turns) {
    if (turns.last < 0) return;
    const Item item = item_at(walk, first, turns.last);
#pragma unroll
    for (int u = 0; u < kApplyBatch; ++u) {
      const int at = (threadIdx.x + u * kApplyThreads) * kWidth;
      if (at < item.length) op.prefetch(item.offset + at);
    }
  }

  template <class Op>
  __device__ static void walk(const ApplyWalk& walk, const Op& op, const typename Op::Coefficients* coefficients,
                              int64_t first, Turns turns) {
    for (int64_t turn = turns.last; turn >= 0; turn -= turns.splits) {
      const Item item = item_at(walk, first, turn);
      for (int i = threadIdx.x * kWidth; i < item.length; i += kApplyBatch * kApplyThreads * kWidth) {
        typename Op::template Loaded<kWidth> loaded[kApplyBatch];
#pragma unroll
        for (int u = 0; u < kApplyBatch; ++u) {
          const int at = i + u * kApplyThreads * kWidth;
          if (at < item.length) {
            loaded[u] = op.template load<kWidth>(item.offset + at, item.position + column(walk, at));
          }
        }
#pragma unroll
        for (int u = 0; u < kApplyBatch; ++u) {
          const int at = i + u * kApplyThreads * kWidth;
          if (at >= item.length) break;
          const int row = row_of(walk, at);
          const int64_t left = walk.s - column(walk, at);  // in this row
          typename Op::template Results<kWidth> results;
          if (left >= kWidth) {
            const typename Op::Coefficients k = coefficients[row];
#pragma unroll
            for (int e = 0; e < kWidth; ++e) op.compute(loaded[u], e, k, &results);
          } else {
#pragma unroll
            for (int e = 0; e < kWidth; ++e) {
              op.compute(loaded[u], e, coefficients[e < left ? row : row + 1], &results);
            }
          }
          op.store(item.offset + at, results);
        }
      }
    }
  }

 private:
  struct Item {
    int64_t offset, position;  // of its first element: in memory, and among the positions of a channel
    int length;                // elements
  };

  static __device__ Item item_at(const ApplyWalk& walk, int64_t first, int64_t item) {
    const int64_t channels = walk.c - first < walk.tile ? walk.c - first : walk.tile;
    const int64_t n = walk.chunks == 1 ? item : static_cast<unsigned>(item) / static_cast<unsigned>(walk.chunks);
    const int64_t base = (item - n * walk.chunks) * kChunk;
    const int64_t rest = channels * walk.s - base;
    const int length = static_cast<int>(walk.chunks > 1 && rest > kChunk ? kChunk : rest);
    return {(n * walk.c + first) * walk.s + base, n * walk.s + base, length};
  }
  static __device__ int row_of(const ApplyWalk& walk, int at) {
    return static_cast<int>(static_cast<uint64_t>(at) * walk.row_factor >> 32);
  }
  static __device__ int64_t column(const ApplyWalk& walk, int at) { return at - row_of(walk, at) * walk.s; }
};

// ---- Lines

template <int kWidth>
struct Lines {
  static constexpr int kMaxColumns = 32;

  // Accesses in flight that fit the registers beside the coefficients.
  template <class Op>
  static constexpr int kBatch = kWidth * sizeof(typename Op::Coefficients) > 128 ? kApplyBatch / 2 : kApplyBatch;

  template <class Op>
  __host__ __device__ static int64_t turn(int tile) {
    return kBatch<Op> * (kApplyThreads / (tile / kWidth));
  }

  template <class Op>
  __device__ static void prefetch(const ApplyWalk& walk, const Op& op, int64_t first, Turns turns) {
    const Place place = place_of(walk);
    if (place.row >= place.rows || first + place.column >= walk.c || turns.last < 0) return;
#pragma unroll
    for (int u = 0; u < kBatch<Op>; ++u) {
      const int64_t at = turns.last * turn<Op>(walk.tile) + place.row + u * place.rows;
      if (at < walk.items) op.prefetch(at * walk.c + first + place.column);
    }
  }

  template <class Op>
  __device__ static void walk(const ApplyWalk& walk, const Op& op, const typename Op::Coefficients* coefficients,
                              int64_t first, Turns turns) {
    const Place place = place_of(walk);
    const int rows = place.rows, column = place.column;
    if (place.row >= rows || first + column >= walk.c) return;
    typename Op::Coefficients k[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) k[e] = coefficients[column + e];
    const int64_t step = turns.splits * turn<Op>(walk.tile);
    for (int64_t item = turns.last * turn<Op>(walk.tile) + place.row; item >= 0; item -= step) {
      typename Op::template Loaded<kWidth> loaded[kBatch<Op>];
#pragma unroll
      for (int u = 0; u < kBatch<Op>; ++u) {
        const int64_t at = item + u * rows;
        if (at < walk.items) loaded[u] = op.template load<kWidth>(at * walk.c + first + column, at);
      }
#pragma unroll
      for (int u = 0; u < kBatch<Op>; ++u) {
        const int64_t at = item + u * rows;
        if (at >= walk.items) break;
        typename Op::template Results<kWidth> results;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) op.compute(loaded[u], e, k[e], &results);
        op.store(at * walk.c + first + column, results);
      }
    }
  }

 private:
  struct Place {
    int row, rows;  // a thread's position among those that the block takes at once
    int column;     // its first channel in the tile
  };

  static __device__ Place place_of(const ApplyWalk& walk) {
    const int columns = walk.tile / kWidth, row = threadIdx.x / columns;
    return {row, kApplyThreads / columns, static_cast<int>(threadIdx.x - row * columns) * kWidth};
  }
};

// ---- The kernel

// What apply kernels find wrong in a packet, for the host to read: a word of its memory.
struct Report {
  const int64_t* packet;
  int64_t* word;
  int64_t layer;  // of kReportLayer units
};
constexpr int64_t kReportLayer = 8;  // a report is layer * kReportLayer + status

__device__ inline bool failed(int32_t status) { return status != HVD_SYNCBN_OK && status != HVD_SYNCBN_EMPTY; }

__device__ inline void write_report(const Report& report, int32_t status) {
  *static_cast<volatile int64_t*>(report.word) = report.layer * kReportLayer + status;
}

// Reports a channel that is not finite, unless a launch of the same graph has reported an error. A sum of batches has
// no digest; they were reported one by one.
__device__ inline void report_nonfinite(const Report& report, int64_t channel) {
  const int64_t* const packet = report.packet;
  if (packet == nullptr || packet[nonfinite_at(channel)] == 0 || packet[2] == 0) return;
  if (*static_cast<volatile int64_t*>(report.word) == HVD_SYNCBN_OK) write_report(report, HVD_SYNCBN_NONFINITE);
}

template <class Op>
struct ApplyArguments {
  ApplyWalk walk;
  Op op;
  Report report;
};

// At least 2 blocks per multiprocessor: 128 registers.
template <class Form, class Op>
__global__ void __launch_bounds__(kApplyThreads, 2) apply(const __grid_constant__ ApplyArguments<Op> arguments) {
  const ApplyWalk& walk = arguments.walk;
  typename Op::Coefficients* const coefficients = reinterpret_cast<typename Op::Coefficients*>(shared_memory());
  const int64_t block = walk.tiles * walk.splits - 1 - blockIdx.x, first = block % walk.tiles * walk.tile;
  const int split = static_cast<int>(block / walk.tiles);
  const Turns turns = {walk.turns - 1 - (walk.turns - 1 - split) % walk.splits, walk.splits};
  Form::prefetch(walk, arguments.op, first, turns);
  const int64_t* const packet = arguments.report.packet;  // none of a frozen layer
  const int32_t status = packet == nullptr ? int32_t{HVD_SYNCBN_OK} : check_header(Op::kDirection, packet);
  for (int i = threadIdx.x; i < walk.tile && first + i < walk.c; i += kApplyThreads) {
    coefficients[i] = arguments.op.finish(walk.c, first + i, status, split == 0);
    if (Op::kDirection == HVD_SYNCBN_FORWARD && split == 0 && !failed(status)) {
      report_nonfinite(arguments.report, first + i);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && failed(status)) write_report(arguments.report, status);
  __syncthreads();
  Form::walk(walk, arguments.op, coefficients, first, turns);
}

// ---- The launch

template <class Form, class Op>
cudaError_t launch_apply_form(ApplyWalk walk, int tile, int64_t items, const Op& op, const Report& report,
                              void* stream) {
  walk.tile = tile > 0 ? tile : 1;
  const int64_t bytes = walk.tile * sizeof(typename Op::Coefficients);
  int64_t wave;
  const cudaError_t error = wave_blocks(reinterpret_cast<const void*>(&apply<Form, Op>), kApplyThreads, bytes, &wave);
  if (error != cudaSuccess) return error;
  walk.tiles = ceil_div(walk.c, walk.tile) > 1 ? ceil_div(walk.c, walk.tile) : 1;
  walk.items = items;
  walk.turns = ceil_div(items, Form::template turn<Op>(walk.tile));
  walk.splits = static_cast<int>(choose_splits(walk.tiles, walk.turns, wave));
  return launch(apply<Form, Op>, walk.tiles * walk.splits, kApplyThreads, bytes, stream,
                ApplyArguments<Op>{walk, op, report});
}

template <int kWidth, class Op>
cudaError_t launch_width(const hvd_syncbn_shape& shape, const Op& op, const Report& report, void* stream) {
  ApplyWalk walk = {};
  walk.n = shape.n;
  walk.c = shape.c;
  walk.s = shape.s;
  walk.chunks = 1;
  if (shape.layout == HVD_SYNCBN_CHANNELS_LAST || shape.s <= 1) {
    const int64_t columns = ceil_div(shape.c, kWidth), tiles = ceil_div(columns, Lines<kWidth>::kMaxColumns);
    const int tile = static_cast<int>(tiles == 0 ? 1 : ceil_div(columns, tiles)) * kWidth;
    return launch_apply_form<Lines<kWidth>>(walk, tile, shape.n * shape.s, op, report, stream);
  }
  using Form = Runs<kWidth>;
  if (shape.s >= Form::kRun) {
    walk.chunks = static_cast<int>(ceil_div(shape.s, Form::kChunk));
    return launch_apply_form<Form>(walk, 1, shape.n * walk.chunks, op, report, stream);
  }
  // Tiles start on a boundary, too.
  const int64_t rows = ceil_div(ceil_div(Form::kRun, shape.s), kWidth) * kWidth;
  const int64_t most = shape.c < kApplyThreads ? shape.c : kApplyThreads;
  walk.row_factor = static_cast<unsigned>((uint64_t{1} << 32) / shape.s + 1);
  return launch_apply_form<Form>(walk, static_cast<int>(rows < most ? rows : most), shape.n, op, report, stream);
}

// Picks wide accesses where every one of them is aligned.
template <class T, class Op>
cudaError_t launch_apply(const hvd_syncbn_shape& shape, bool aligned_arrays, bool masked, const Op& op,
                         const Report& report, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool innermost = shape.layout == HVD_SYNCBN_CHANNELS_LAST || shape.s <= 1;
  // Channels first, an access may reach into the next row, not further; and one mask byte is one position's.
  const bool fits = innermost ? shape.c % kWidth == 0
                              : !masked && shape.s >= kWidth &&
                                    (shape.s >= Runs<kWidth>::kRun ? shape.s : shape.c * shape.s) % kWidth == 0;
  return aligned_arrays && fits ? launch_width<kWidth>(shape, op, report, stream)
                                : launch_width<1>(shape, op, report, stream);
}

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_APPLY_CUH_
