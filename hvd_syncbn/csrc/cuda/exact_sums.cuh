// Exact sums on the device: of a thread, of a block, of the packet.
//
// A thread keeps the limbs of its sums in shared memory, because limbs are indexed at run time. A block adds up its
// threads' sums and adds them to the packet with 64-bit integer atomics, whose order does not show. The last block of a
// channel tile carries, so that the packet leaves the launch in the form in which ranks exchange it.
#ifndef HVD_SYNCBN_CUDA_EXACT_SUMS_CUH_
#define HVD_SYNCBN_CUDA_EXACT_SUMS_CUH_

#include "../common/finish.h"
#include "../common/vectors.h"
#include "device.cuh"

namespace hvd_syncbn {
namespace cuda {

constexpr int kMomentThreads = 128;
constexpr int kMomentA = 0, kMomentB = kLimbs, kNonfinite = 2 * kLimbs, kWords = 2 * kLimbs + 1;
// Between two words of a thread; odd, so that one thread's words lie in different banks, too.
constexpr int kWordStride = kMomentThreads + 1;
constexpr int64_t kSumsBytes = (kWords * kWordStride + 1) / 2 * 2 * sizeof(int64_t);

// Values that one thread adds to a moment between two carries; each costs its limbs at most four deposits.
constexpr int kValuesBeforeCarry = static_cast<int>(kDepositsBeforeCarry / 4);
// Values of a channel in a launch from which threads carry before they are added up: (values * 4) deposits have to fit,
// and so have the carried limbs of all threads of all blocks of a channel.
constexpr int64_t kValuesWithoutCarry = kDepositsBeforeCarry / 8;
constexpr int64_t kMaxSplits = 4096;

// The words of one thread, indexed like a limb array.
struct ThreadLimbs {
  int64_t* first;
  __device__ int64_t& operator[](int word) const { return first[word * kWordStride]; }
};

// Not inlined: kernels have many of these, on paths that are taken once per piece or less.
__device__ __noinline__ inline void deposit_value(double value, int64_t* moment, int64_t* nonfinite) {
  deposit(value, ThreadLimbs{moment}, nonfinite);
}

class ThreadSums {
 public:
  __device__ explicit ThreadSums(int64_t* shared) : limbs_{shared + threadIdx.x} {
    for (int w = 0; w < kWords; ++w) limbs_[w] = 0;
  }

  __device__ void deposit(int moment, double value) { deposit_value(value, &limbs_[moment], &limbs_[kNonfinite]); }

  // To be called once per value of the moments.
  __device__ void count() {
    if (++values_ == kValuesBeforeCarry) {
      carry();
      values_ = 0;
    }
  }

  __device__ void carry() {
    normalize(ThreadLimbs{&limbs_[kMomentA]});
    normalize(ThreadLimbs{&limbs_[kMomentB]});
  }

 private:
  ThreadLimbs limbs_;
  int values_ = 0;
};

__device__ inline double power_of_two(int exponent) {
  return bit_cast<double>(static_cast<uint64_t>(1023 + exponent) << 52);
}

// One moment where pieces are short and a thread has many: a value is cut in two at 2^e, and both parts are added as
// float64, which is exact while they stay within 53 bits (docs/protocol.md, 7). A value that does not fit goes to the
// limbs, and e follows it.
class TwoPartSum {
 public:
  static constexpr int kReach = 43;
  static constexpr int kValues = 1 << 9;  // between two flushes

  __device__ TwoPartSum(int moment, int exponent) : moment_(moment) { place(exponent); }

  __device__ void add(double value, ThreadSums* sums) {
    const double high = (value + round_high_) - round_high_;
    const double low = value - high;
    if (fabs(value) <= limit_ && low == (low + round_low_) - round_low_) {
      high_ += high;
      low_ += low;
      return;
    }
    sums->deposit(moment_, value);
    const int exponent = (static_cast<int>(bit_cast<uint64_t>(value) >> 52) & 0x7ff) - 1023;
    // Not so low that parts under 2^kLsbExp could add up before they are dropped, nor so high that kValues of them
    // could be 2^159, which a packet does not hold.
    const int cut = exponent - 26;
    if (cut - kReach - 1 >= kLsbExp && cut + kReach + 9 < 159) {
      flush(sums);
      place(cut);
    }
  }

  __device__ void flush(ThreadSums* sums) {
    sums->deposit(moment_, high_);
    sums->deposit(moment_, low_);
    high_ = low_ = 0;
  }

 private:
  __device__ void place(int exponent) {
    limit_ = power_of_two(exponent + kReach);
    // Adding and subtracting 1.5 * 2^(52 + e) rounds to a multiple of 2^e.
    round_high_ = 1.5 * power_of_two(52 + exponent);
    round_low_ = 1.5 * power_of_two(52 + exponent - kReach - 1);
  }

  int moment_;
  double high_ = 0, low_ = 0, limit_, round_high_, round_low_;
};

// What the last block of a launch leaves behind, besides the sums.
struct Closing {
  int64_t* packet;
  uint32_t digest;  // forward only
  // Values per channel on this rank; or, with a mask, the number of its positions, of which the launch counts the
  // unmasked.
  int64_t count;
  const uint8_t* mask;
  // Backward only: this rank's parameter gradients. stats: float64 mean[c], invstd[c].
  const double* stats;
  hvd_syncbn_vector dgamma, dbeta;
};

// While a launch runs, this part of a tile's first nonfinite counter counts its blocks that are done.
constexpr int64_t kBlockDone = int64_t{1} << 40;

// All words of the header but the count; by all threads of one block.
__device__ __noinline__ inline void write_header(const Closing& closing, int64_t c) {
  __shared__ unsigned long long warps[kMomentThreads / 32];
  uint32_t digest = closing.digest;
  if (closing.stats != nullptr) {  // backward: identifies the call
    unsigned long long sum = 0;
    for (int64_t i = threadIdx.x; i < c; i += kMomentThreads) {
      sum += call_hash(closing.stats[i], closing.stats[c + i], i);
    }
    for (int w = 16; w >= 1; w /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, w);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (const unsigned long long warp : warps) sum += warp;
    digest = backward_digest(sum);
  }
  if (threadIdx.x < kHeader && threadIdx.x != 1) closing.packet[threadIdx.x] = header_word(threadIdx.x, digest);
}

// Unmasked positions of this split's share; the blocks of the first tile do it.
__device__ inline void count_mask(const Closing& closing, int split, int splits) {
  const int64_t begin = closing.count * split / splits, end = closing.count * (split + 1) / splits;
  long long count = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kMomentThreads) count += closing.mask[i] != 0;
  for (int w = 16; w >= 1; w /= 2) count += __shfl_xor_sync(kWholeWarp, count, w);
  if (threadIdx.x % 32 == 0 && count != 0) add_to(closing.packet + 1, count);
}

__device__ __noinline__ inline void close_channel(const Closing& closing, int64_t c, int64_t channel) {
  // A packet of this channel alone, in registers.
  int64_t own[kHeader + kWords];
  own[kHeader] = fresh(closing.packet + nonfinite_at(channel)) & (kBlockDone - 1);
  closing.packet[nonfinite_at(channel)] = own[kHeader];
  for (int moment = 0; moment < 2; ++moment) {
    int64_t* const limbs = closing.packet + (moment ? moment_b_at(c, channel) : moment_a_at(c, channel));
    int64_t* const mine = own + (moment ? moment_b_at(1, 0) : moment_a_at(1, 0));
    for (int l = 0; l < kLimbs; ++l) mine[l] = fresh(limbs + l);
    normalize(mine);
    for (int l = 0; l < kLimbs; ++l) limbs[l] = mine[l];
  }
  if (closing.dgamma.data == nullptr && closing.dbeta.data == nullptr) return;
  const ParameterGradients<double> g =
      parameter_gradients(own, 1, 0, closing.stats[channel], closing.stats[c + channel]);
  write(closing.dgamma, channel, g.dgamma);
  write(closing.dbeta, channel, g.dbeta);
}

// Adds the block's sums to the packet and, in the last block of the tile, closes the tile's channels [first, first +
// tile). Column t of `shared` holds sums of channel first + t % tile, for t < columns.
__device__ inline void publish(const Closing& closing, int64_t* shared, int columns, int tile, int64_t c, int64_t first,
                               int splits) {
  __shared__ bool last;
  const int t = threadIdx.x;
  __syncthreads();
  // Halving takes every thread; the few columns that are left per channel are added up on the way out.
  for (; columns > 4 * tile && columns % (2 * tile) == 0; columns /= 2) {
    const int half = columns / 2;
    for (int i = t; i < kWords * half; i += kMomentThreads) {
      const int word = i / half, column = i - word * half;
      shared[word * kWordStride + column] += shared[word * kWordStride + column + half];
    }
    __syncthreads();
  }
  const int width = static_cast<int>(c - first < tile ? c - first : tile);
  for (int i = t; i < kWords * width; i += kMomentThreads) {
    const int word = i / width, channel = i - word * width;
    int64_t sum = 0;
    for (int column = channel; column < columns; column += tile) sum += shared[word * kWordStride + column];
    if (sum == 0) continue;
    int64_t* const to = closing.packet + (word == kNonfinite ? nonfinite_at(first + channel)
                                          : word >= kMomentB ? moment_b_at(c, first + channel) + (word - kMomentB)
                                                             : moment_a_at(c, first + channel) + word);
    add_to(to, sum);
  }
  __threadfence();  // before this block counts as done
  __syncthreads();
  if (t == 0) {
    const int64_t done = add_to(closing.packet + nonfinite_at(first), kBlockDone) / kBlockDone;
    last = done == splits - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = t; i < width; i += kMomentThreads) close_channel(closing, c, first + i);
}

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_EXACT_SUMS_CUH_
