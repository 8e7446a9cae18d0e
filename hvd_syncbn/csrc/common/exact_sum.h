// Exact sums: a two's complement fixed-point number in LIMBS limbs of LIMB_BITS bits, little end first
// (docs/protocol.md, 2).
//
// During summation limbs are signed digits: a negative value is subtracted limb by limb, so values of either sign
// change at most three limbs. `normalize` converts digits to the packet's form, with limbs 0..6 in [0, 2^40).
#ifndef HVD_SYNCBN_COMMON_EXACT_SUM_H_
#define HVD_SYNCBN_COMMON_EXACT_SUM_H_

#include "portable.h"

namespace hvd_syncbn {

constexpr int kProtocolVersion = 3;
constexpr int kPiece = 1024;
constexpr int kLanes = 32;
constexpr int kLimbs = 8;
constexpr int kLimbBits = 40;
constexpr int kLsbExp = -160;
constexpr int kHeader = 4;
constexpr int64_t kLimbMask = (int64_t{1} << kLimbBits) - 1;
// The maximum number of values between two `normalize` calls: each adds less than 2^40 to a limb of 63 bits.
constexpr int64_t kDepositsBeforeCarry = int64_t{1} << 22;

// One value as signed digits of limbs [index, index + 3); the third is 0 if index is 6.
struct Digits {
  int index;
  int64_t digit[3];
};

// Rounds v toward minus infinity to a multiple of 2^kLsbExp. Returns false if v is NaN, infinite, or at least 2^159.
HVD_SYNCBN_HD bool split(double v, Digits* out) {
  const uint64_t bits = bit_cast<uint64_t>(v);
  const int biased = static_cast<int>(bits >> 52) & 0x7ff;
  if (biased >= 1023 + kLimbs * kLimbBits + kLsbExp - 1) return false;
  uint64_t mantissa = (bits & ((uint64_t{1} << 52) - 1)) | (biased ? uint64_t{1} << 52 : 0);
  const int64_t sign = static_cast<int64_t>(bits) >> 63;  // 0 or -1
  int shift = (biased ? biased : 1) - 1075 - kLsbExp;     // |v| = mantissa * 2^(shift + kLsbExp)
  if (shift < 0) {
    const int drop = -shift < 63 ? -shift : 63;
    if (sign) mantissa += (uint64_t{1} << drop) - 1;  // toward minus infinity: a negative magnitude rounds up
    mantissa >>= drop;
    shift = 0;
  }
  const int index = shift / kLimbBits;
  const int offset = shift - index * kLimbBits;
  out->index = index;
  const int64_t low = static_cast<int64_t>(mantissa << offset) & kLimbMask;
  const int64_t middle = static_cast<int64_t>(mantissa >> (kLimbBits - offset)) & kLimbMask;
  const int64_t high = static_cast<int64_t>(mantissa >> (kLimbBits - offset) >> kLimbBits);
  out->digit[0] = (low ^ sign) - sign;
  out->digit[1] = (middle ^ sign) - sign;
  out->digit[2] = (high ^ sign) - sign;
  return true;
}

// Adds v to the sum at `limbs`, or 1 to `nonfinite`. Limbs: int64_t*, or a type that is indexed like it.
template <class Limbs>
HVD_SYNCBN_HD void deposit(double v, Limbs limbs, int64_t* nonfinite) {
  Digits d;
  if (!split(v, &d)) {
    *nonfinite += 1;
    return;
  }
  limbs[d.index] += d.digit[0];
  limbs[d.index + 1] += d.digit[1];
  if (d.digit[2]) limbs[d.index + 2] += d.digit[2];
}

// Limbs: int64_t* or a pointer to vectors of int64_t, or a type that is indexed like it.
template <class Limbs>
HVD_SYNCBN_HD void normalize(Limbs limbs) {
  auto digit = limbs[0] + 0;
  for (int i = 0; i < kLimbs - 1; ++i) {
    limbs[i] = digit & kLimbMask;
    digit = limbs[i + 1] + shift_right<kLimbBits>(digit);
  }
  limbs[kLimbs - 1] = digit;
}

// Offsets of a channel's parts in a packet of c channels.
HVD_SYNCBN_HD int64_t packet_size(int64_t c) { return kHeader + c + 2 * c * kLimbs; }
HVD_SYNCBN_HD int64_t nonfinite_at(int64_t channel) { return kHeader + channel; }
HVD_SYNCBN_HD int64_t moment_a_at(int64_t c, int64_t channel) { return kHeader + c + channel * kLimbs; }
HVD_SYNCBN_HD int64_t moment_b_at(int64_t c, int64_t channel) { return kHeader + c + (c + channel) * kLimbs; }

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_EXACT_SUM_H_
