// The exact sums of one tile of channels, while a thread walks its units.
//
// Splitting every piece value into limbs costs some 25 scalar instructions, too many where pieces are short. So a value
// is first cut in two at 2^e, e chosen per channel from the values seen: `high` is its multiple of 2^e, `low` the rest,
// and both parts are added as float64. That is exact as long as
//   |v| <= 2^(e + kReach)                     then kFlush highs stay under 2^53 units of 2^e
//   v is a multiple of 2^(e - kReach - 1)     then kFlush lows do, of that unit
// which is checked for every value; one that fails goes to the limbs directly. After kFlush values both parts are split
// into limbs. The result is the same integer whatever e was, so no rule about e is part of the protocol.
#ifndef HVD_SYNCBN_CPU_TILE_SUMS_H_
#define HVD_SYNCBN_CPU_TILE_SUMS_H_

#include "../common/exact_sum.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

constexpr int kReach = 43;
constexpr int kFlush = 1 << 9;

#if defined(__AVX512F__)
// One bit per value: 1 where the value may not be added as it is.
HVD_SYNCBN_INLINE unsigned outside(F64 v, F64 limit, F64 rest, F64 rounded_rest) {
  const __mmask8 large = _mm512_cmp_pd_mask(_mm512_abs_pd(v.v), limit.v, _CMP_NLE_UQ);
  return large | _mm512_cmp_pd_mask(rest.v, rounded_rest.v, _CMP_NEQ_UQ);
}
#elif defined(__AVX2__)
HVD_SYNCBN_INLINE unsigned outside(F64 v, F64 limit, F64 rest, F64 rounded_rest) {
  const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), v.v);
  const __m256d large = _mm256_cmp_pd(magnitude, limit.v, _CMP_NLE_UQ);
  const __m256d fine = _mm256_cmp_pd(rest.v, rounded_rest.v, _CMP_NEQ_UQ);
  return static_cast<unsigned>(_mm256_movemask_pd(_mm256_or_pd(large, fine)));
}
#endif
HVD_SYNCBN_INLINE unsigned outside(S64 v, S64 limit, S64 rest, S64 rounded_rest) {
  return !(fabs(v.v) <= limit.v) || rest.v != rounded_rest.v;
}

class TileSums {
 public:
  // width: channels in use, at most kMaxTile.
  void begin(int width) {
    width_ = width;
    added_ = 0;
    flushes_ = 0;
    memset(nonfinite_, 0, width * sizeof(nonfinite_[0]));
    for (int m = 0; m < 2; ++m) {
      memset(limbs_[m], 0, width * sizeof(limbs_[m][0]));
      memset(high_[m], 0, width * sizeof(double));
      memset(low_[m], 0, width * sizeof(double));
      for (int c = 0; c < width; ++c) place(m, c, -20);
    }
  }

  // Adds one piece value per channel, of each moment.
  HVD_SYNCBN_INLINE void add(const double* a, const double* b) {
    if (added_ == kFlush) flush();
    ++added_;
    add_moment(0, a);
    add_moment(1, b);
  }

  // Adds everything to a packet of c channels, at channel first. Other threads may be adding to it.
  void finish(int64_t* packet, int64_t c, int64_t first) {
    flush();
    for (int i = 0; i < width_; ++i) {
      publish(packet + nonfinite_at(first + i), nonfinite_[i]);
      for (int m = 0; m < 2; ++m) {
        int64_t* const limbs = limbs_[m][i];
        carry(limbs);
        int64_t* const to = packet + (m ? moment_b_at(c, first + i) : moment_a_at(c, first + i));
        for (int l = 0; l < kLimbs; ++l) publish(to + l, limbs[l]);
      }
    }
  }

 private:
  static HVD_SYNCBN_INLINE void publish(int64_t* to, int64_t value) {
    if (value) __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
  }

  // Carries toward zero, so that the upper limbs of a small negative sum stay 0 and cost no atomic add.
  static void carry(int64_t* limbs) {
    for (int l = 0; l < kLimbs - 1; ++l) {
      const int64_t over = limbs[l] / (int64_t{1} << kLimbBits);
      limbs[l] -= over * (int64_t{1} << kLimbBits);
      limbs[l + 1] += over;
    }
  }

  static double power_of_two(int exponent) { return bit_cast<double>(static_cast<uint64_t>(1023 + exponent) << 52); }

  void place(int m, int c, int e) {
    // Adding and subtracting 1.5 * 2^(52 + e) rounds to a multiple of 2^e.
    limit_[m][c] = power_of_two(e + kReach);
    round_high_[m][c] = 1.5 * power_of_two(52 + e);
    round_low_[m][c] = 1.5 * power_of_two(52 + e - kReach - 1);
  }

  template <class V>
  HVD_SYNCBN_INLINE int add_vectors(int m, const double* values, int c) {
    for (; c + V::N <= width_; c += V::N) {
      const V v = V::load(values + c);
      const V round_high = V::load(round_high_[m] + c), round_low = V::load(round_low_[m] + c);
      const V high = (v + round_high) - round_high;
      const V low = v - high;
      const unsigned bad = outside(v, V::load(limit_[m] + c), low, (low + round_low) - round_low);
      if (__builtin_expect(bad != 0, 0)) {
        for (int i = 0; i < V::N; ++i) add_one(m, c + i, values[c + i]);
        continue;
      }
      (V::load(high_[m] + c) + high).keep(high_[m] + c);
      (V::load(low_[m] + c) + low).keep(low_[m] + c);
    }
    return c;
  }

  HVD_SYNCBN_INLINE void add_moment(int m, const double* values) {
    const int c = add_vectors<F64>(m, values, 0);
    if (F64::N > 1) add_vectors<S64>(m, values, c);
  }

  __attribute__((noinline)) void add_one(int m, int c, double v) {
    const double high = (v + round_high_[m][c]) - round_high_[m][c];
    const double low = v - high;
    const double rounded = (low + round_low_[m][c]) - round_low_[m][c];
    if (fabs(v) <= limit_[m][c] && low == rounded) {
      high_[m][c] += high;
      low_[m][c] += low;
      return;
    }
    deposit(v, limbs_[m][c], nonfinite_ + c);
    const int exponent = (static_cast<int>(bit_cast<uint64_t>(v) >> 52) & 0x7ff) - 1023;
    // The next values may be like this one. Not so low that parts under 2^kLsbExp could add up before they are dropped.
    if (exponent - 26 - kReach - 1 >= kLsbExp && exponent < 160) {
      flush_one(m, c);
      place(m, c, exponent - 26);
    }
  }

  void flush_one(int m, int c) {
    deposit(high_[m][c], limbs_[m][c], nonfinite_ + c);
    deposit(low_[m][c], limbs_[m][c], nonfinite_ + c);
    high_[m][c] = low_[m][c] = 0;
  }

  __attribute__((noinline)) void flush() {
    for (int m = 0; m < 2; ++m) {
      for (int c = 0; c < width_; ++c) flush_one(m, c);
    }
    added_ = 0;
    if (++flushes_ == kFlushesBeforeCarry) {
      for (int m = 0; m < 2; ++m) {
        for (int c = 0; c < width_; ++c) carry(limbs_[m][c]);
      }
      flushes_ = 0;
    }
  }

  // Between two flushes a channel may also take kFlush values directly, each with a flush_one of its own.
  static constexpr int64_t kFlushesBeforeCarry = kDepositsBeforeCarry / (4 * kFlush);

  int width_ = 0;
  int added_ = 0;
  int64_t flushes_ = 0;
  int64_t limbs_[2][kMaxTile][kLimbs];
  int64_t nonfinite_[kMaxTile];
  double high_[2][kMaxTile], low_[2][kMaxTile];
  double limit_[2][kMaxTile], round_high_[2][kMaxTile], round_low_[2][kMaxTile];
};

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_TILE_SUMS_H_
