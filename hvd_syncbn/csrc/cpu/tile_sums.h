// The exact sums of one tile of channels while a thread processes its units.
//
// Splitting a piece value into limbs costs about 25 scalar instructions, too many for short pieces. So a value v is
// first added to two float64 bins per channel. The high bin stays between 2^(52 + e) and 2^(53 + e), so adding to it
// rounds to a multiple of 2^e; the remainder of v is added to the low bin, whose unit is 2^(e - kReach - 1). This is
// exact if
//   |v| <= 2^(e + kReach)                     so that kFlush values keep the high bin between its bounds, and
//   v is a multiple of 2^(e - kReach - 1)     so that the addition to the low bin loses nothing.
// Both are checked for every value; a value that fails is added to the limbs directly. After kFlush values, both bins
// are split into limbs. e is chosen per channel, from its first values and then from the last value that failed. The
// sum is the same integer for any e, so the choice is not part of the protocol.
#ifndef HVD_SYNCBN_CPU_TILE_SUMS_H_
#define HVD_SYNCBN_CPU_TILE_SUMS_H_

#include "../common/exact_sum.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

constexpr int kReach = 39;
constexpr int kFlush = 1 << 12;
// The low bin's unit is at least 2^kLsbExp, because smaller bits must be dropped in each value; and kFlush of the
// largest values fit in an exact sum, because larger values must be counted one by one.
constexpr int kMinLimit = kLsbExp + kReach + 1 + kReach;
constexpr int kMaxLimit = kLimbs * kLimbBits + kLsbExp - 2 - 12;
// An empty bin, in units of the limit 2^(e + kReach).
constexpr double kEmptyHigh = 0x1.8p13;
constexpr double kEmptyLow = 0x1.8p-27;
static_assert(kReach == 39 && kFlush == 1 << 12,
              "kEmptyHigh is 1.5 * 2^(52 - kReach), kEmptyLow 1.5 * 2^(51 - 2 kReach)");

// The bins of V::N channels.
template <class V>
struct Bins {
  V high, low;

  // Adds v and returns the lost part, which is not 0 (or is NaN) if v is not a multiple of the low bin's unit or not
  // finite.
  HVD_SYNCBN_INLINE V add(V v) {
    const V sum_high = high + v;
    const V rest = v - (sum_high - high);
    const V sum_low = low + rest;
    const V lost = rest - (sum_low - low);
    high = sum_high;
    low = sum_low;
    return lost;
  }
};

class TileSums {
 public:
  // Starts the sums of channels [first, first + width) of a packet of c channels; width is at most kMaxTile. alone: no
  // other thread adds to these channels before `finish`.
  void begin(int width, int64_t* packet, int64_t c, int64_t first, bool alone) {
    width_ = width;
    added_ = 0;
    flushes_ = 0;
    unplaced_ = true;
    alone_ = alone;
    target_nonfinite_ = nonfinite_ = packet + nonfinite_at(first);
    target_[0] = limbs_[0] = packet + moment_a_at(c, first);
    target_[1] = limbs_[1] = packet + moment_b_at(c, first);
    if (alone) return;
    nonfinite_ = own_nonfinite_;
    memset(own_nonfinite_, 0, width * sizeof(own_nonfinite_[0]));
    for (int m = 0; m < 2; ++m) {
      limbs_[m] = own_limbs_[m];
      memset(own_limbs_[m], 0, width * kLimbs * sizeof(own_limbs_[m][0]));
    }
  }

  // Must be called before adding up to `values` (at most kFlush) values to each channel.
  HVD_SYNCBN_INLINE void expect(int values) {
    if (added_ + values > kFlush) flush();
    added_ += values;
    first_ = unplaced_;
    unplaced_ = false;
  }

  // Adds kCount values of both moments to each of V::N channels from c: value(r, v) writes the r-th of them to v[2].
  template <class V, int kCount, class Value>
  HVD_SYNCBN_INLINE void add(int c, const Value& value) {
    // The margin above the first values, in powers of two. More values need less; squares are checked by their sum.
    constexpr int kMargin[2] = {kCount == 1 ? 8 : 3, kCount == 1 ? 8 : 6};
    V lost = V::splat(0.0), largest[2] = {lost, lost}, v[2];
    if (__builtin_expect(first_, 0)) {
      for (int r = 0; r < kCount; ++r) {
        value(r, v);
        for (int m = 0; m < 2; ++m) largest[m] = larger(magnitude(v[m]), largest[m]);
      }
      for (int m = 0; m < 2; ++m) place(m, c, largest[m], kMargin[m]);
    }
    Bins<V> bins[2] = {load<V>(0, c), load<V>(1, c)};
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      value(r, v);
      for (int m = 0; m < 2; ++m) {
        largest[m] = larger(magnitude(v[m]), largest[m]);
        lost = lost | bins[m].add(v[m]);
      }
    }
    if (__builtin_expect(any_nonzero(lost) || any_above(largest[0], V::load(limit_[0] + c)) ||
                             any_above(largest[1], V::load(limit_[1] + c)),
                         0)) {
      for (int r = 0; r < kCount; ++r) {
        value(r, v);
        add_each(c, v);
      }
      return;
    }
    keep(0, c, bins[0]);
    keep(1, c, bins[1]);
  }

  // The same for values g and g * d: factors(r, &g, &d) returns the r-th.
  template <class V, int kCount, class Factors>
  HVD_SYNCBN_INLINE void add_products(int c, const Factors& factors) {
    add<V, kCount>(c, [&](int r, V* value) {
      V d;
      factors(r, value, &d);
      value[1] = value[0] * d;
    });
  }

  // The same for kVectors * V::N channels: factors(r, i, &g, &d) returns those of channels c + i. g has 24 bits and
  // rarely needs a low bin. kSquare: d is g; then the sum of the squares bounds both the squares and g, and if g is a
  // multiple of 2^e, its square has no bit below 2^(2 e).
  template <class V, int kVectors, int kCount, bool kSquare, class Factors>
  HVD_SYNCBN_INLINE void add_many_products(int c, const Factors& factors) {
    V a[kVectors], lost[kVectors], largest_a[kVectors], largest_b[kVectors];
    Bins<V> b[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      a[i] = V::load(high_[0] + c + i * V::N);
      b[i] = load<V>(1, c + i * V::N);
      lost[i] = largest_a[i] = largest_b[i] = V::splat(0.0);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      for (int i = 0; i < kVectors; ++i) {
        V g, d;
        factors(r, i * V::N, &g, &d);
        const V sum = a[i] + g;
        lost[i] = lost[i] | (g - (sum - a[i]));
        a[i] = sum;
        if (kSquare) {
          const V high = fused(g, g, b[i].high);
          b[i].low = b[i].low + fused(g, g, b[i].high - high);
          b[i].high = high;
        } else {
          const V product = g * d;
          lost[i] = lost[i] | b[i].add(product);
          largest_a[i] = larger(magnitude(g), largest_a[i]);
          largest_b[i] = larger(magnitude(product), largest_b[i]);
        }
      }
    }
    for (int i = 0; i < kVectors; ++i) {
      const int at = c + i * V::N;
      const V limit_a = V::load(limit_[0] + at), limit_b = V::load(limit_[1] + at);
      bool exact = !first_ && !any_nonzero(lost[i]);
      if (kSquare) {
        // The low unit of b, 2^(e_b - kReach - 1), must be at most 2^(2 e_a).
        const V square = limit_a * limit_a;
        exact = exact && !any_above(b[i].high - V::load(high_[1] + at), smaller(limit_b, square)) &&
                !any_above(limit_b, square * V::splat(2.0));
      } else {
        exact = exact && !any_above(largest_a[i], limit_a) && !any_above(largest_b[i], limit_b);
      }
      if (__builtin_expect(exact, 1)) {
        a[i].keep(high_[0] + at);
        keep(1, at, b[i]);
      } else {
        add_products<V, kCount>(at, [&](int r, V* g, V* d) { factors(r, i * V::N, g, d); });
      }
    }
  }

  // Adds all remaining sums to the packet.
  void finish() {
    if (unplaced_) return;  // every unit was masked
    flush();
    if (alone_) return;
    for (int m = 0; m < 2; ++m) {
      for (int i = 0; i < width_; ++i) carry(limbs_[m] + i * kLimbs);
      publish(target_[m], limbs_[m], width_ * kLimbs);
    }
    publish(target_nonfinite_, nonfinite_, width_);
  }

 private:
  static void publish(int64_t* to, const int64_t* values, int count) {
    for (int i = 0; i < count; ++i) {
      if (values[i]) __atomic_fetch_add(to + i, values[i], __ATOMIC_RELAXED);
    }
  }

  // Carries toward zero, so that the upper limbs of a small negative sum stay 0 and need no atomic add.
  static void carry(int64_t* limbs) {
    for (int l = 0; l < kLimbs - 1; ++l) {
      const int64_t over = limbs[l] / (int64_t{1} << kLimbBits);
      limbs[l] -= over * (int64_t{1} << kLimbBits);
      limbs[l + 1] += over;
    }
  }

  template <class V>
  HVD_SYNCBN_INLINE Bins<V> load(int m, int c) const {
    return {V::load(high_[m] + c), V::load(low_[m] + c)};
  }

  template <class V>
  HVD_SYNCBN_INLINE void keep(int m, int c, const Bins<V>& bins) {
    bins.high.keep(high_[m] + c);
    bins.low.keep(low_[m] + c);
  }

  // Sets empty bins for values up to 2^margin times as large as `top`.
  template <class V>
  HVD_SYNCBN_INLINE void place(int m, int c, V top, int margin) {
    const V powers = V::splat(bit_cast<double>(uint64_t{0x7ff} << 52));
    const V limit = smaller(larger((top & powers) * V::splat(1 << margin), V::splat(power_of_two(kMinLimit))),
                            V::splat(power_of_two(kMaxLimit)));
    limit.keep(limit_[m] + c);
    (limit * V::splat(kEmptyHigh)).keep(high_[m] + c);
    (limit * V::splat(kEmptyLow)).keep(low_[m] + c);
  }

  template <class V>
  __attribute__((noinline)) void add_each(int c, const V* values) {
    for (int m = 0; m < 2; ++m) {
      double v[V::N];
      values[m].keep(v);
      for (int i = 0; i < V::N; ++i) add_one(m, c + i, v[i]);
    }
  }

  void add_one(int m, int c, double v) {
    Bins<S64> bins = load<S64>(m, c);
    const bool exact = fabs(v) <= limit_[m][c] && !any_nonzero(bins.add({v}));
    if (exact) {
      keep(m, c, bins);
      return;
    }
    deposit(v, limbs_[m] + c * kLimbs, nonfinite_ + c);
    // The next values may be of similar size.
    flush_one(m, c);
    place(m, c, S64{fabs(v)}, 3);
  }

  void flush_one(int m, int c) {
    const double high = limit_[m][c] * kEmptyHigh, low = limit_[m][c] * kEmptyLow;
    deposit(high_[m][c] - high, limbs_[m] + c * kLimbs, nonfinite_ + c);
    deposit(low_[m][c] - low, limbs_[m] + c * kLimbs, nonfinite_ + c);
    high_[m][c] = high;
    low_[m][c] = low;
  }

  __attribute__((noinline)) void flush() {
    for (int m = 0; m < 2; ++m) {
      for (int c = 0; c < width_; ++c) flush_one(m, c);
    }
    added_ = 0;
    if (++flushes_ == kFlushesBeforeCarry) {
      for (int m = 0; m < 2; ++m) {
        for (int c = 0; c < width_; ++c) carry(limbs_[m] + c * kLimbs);
      }
      flushes_ = 0;
    }
  }

  // Between two flushes, a channel may also add kFlush values directly, each with a flush_one.
  static constexpr int64_t kFlushesBeforeCarry = kDepositsBeforeCarry / (4 * kFlush);

  static constexpr double power_of_two(int exponent) {
    double power = 1;
    for (; exponent > 0; --exponent) power *= 2;
    for (; exponent < 0; ++exponent) power /= 2;
    return power;
  }

  bool unplaced_ = true, first_ = true;
  int width_ = 0;
  int added_ = 0;
  int64_t flushes_ = 0;
  bool alone_ = true;
  int64_t *limbs_[2], *nonfinite_;  // where values are added: in the packet, or in this thread's own memory
  int64_t *target_[2], *target_nonfinite_;
  int64_t own_limbs_[2][kMaxTile * kLimbs];
  int64_t own_nonfinite_[kMaxTile];
  double high_[2][kPitch], low_[2][kPitch], limit_[2][kPitch];
};

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_TILE_SUMS_H_
