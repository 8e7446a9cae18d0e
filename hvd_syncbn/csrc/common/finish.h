// Computes the per-channel values of a layer from exact sums (docs/protocol.md, 3), in double-double and a fixed order.
#ifndef HVD_SYNCBN_COMMON_FINISH_H_
#define HVD_SYNCBN_COMMON_FINISH_H_

#include "../include/hvd_syncbn/core.h"
#include "double_double.h"
#include "exact_sum.h"

namespace hvd_syncbn {

// Reads the exact sum in `limbs`, whose carries may be pending and change, for V double and I int64_t, or vectors of
// them.
template <class V, class I>
HVD_SYNCBN_HD DoubleDouble<V> read_limbs(I* limbs) {
  normalize(limbs);
  const I negative = where_negative(limbs[kLimbs - 1]);
  if (any_nonzero(negative)) {  // the magnitude's digits
    for (int i = 0; i < kLimbs; ++i) limbs[i] = (limbs[i] ^ negative) - negative;
    normalize(limbs);
  }
  // From the highest digit down. The top limb may have 63 bits, more than a double holds: add its upper part first.
  DoubleDouble<V> sum = {to_double(shift_right<kLimbBits>(limbs[kLimbs - 1])) * constant<V>(0x1p160), constant<V>(0.0)};
  double unit = 0x1p120;  // 2^((kLimbs - 1) * kLimbBits + kLsbExp)
  for (int i = kLimbs - 1; i >= 0; --i) {
    const I digit = limbs[i] & kLimbMask;
    if (any_nonzero(digit)) sum = add(sum, to_double(digit) * constant<V>(unit));
    unit *= 0x1p-40;
  }
  return {negate_where(negative, sum.hi), negate_where(negative, sum.lo)};
}

HVD_SYNCBN_HD DoubleDouble<double> read_sum(const int64_t* limbs) {
  int64_t own[kLimbs];
  for (int i = 0; i < kLimbs; ++i) own[i] = limbs[i];
  return read_limbs<double>(own);
}

// The batch statistics of one channel, or of a vector of channels.
template <class V>
struct Statistics {
  V mean, var, invstd;
};

// From the sums of x and of x^2 over n > 0 values.
template <class V>
HVD_SYNCBN_HD Statistics<V> statistics(DoubleDouble<V> a, DoubleDouble<V> b, V n, V eps) {
  const DoubleDouble<V> mean = divide(a, n);
  const V var = larger(divide(subtract(b, multiply(a, mean)), n).hi, constant<V>(0.0));
  return {mean.hi, var, constant<V>(1.0) / square_root(var + eps)};
}

HVD_SYNCBN_HD Statistics<double> statistics(const int64_t* packet, int64_t c, int64_t channel, double eps) {
  if (packet[nonfinite_at(channel)] != 0) {
    const double nan = canonical_nan<double>();
    return {nan, nan, nan};
  }
  if (packet[1] == 0) return {0, 0, 1 / sqrt(eps)};  // no rank has a value, or all are masked: 0, as in Keras
  return statistics(read_sum(packet + moment_a_at(c, channel)), read_sum(packet + moment_b_at(c, channel)),
                    static_cast<double>(packet[1]), eps);
}

// Of a frozen layer, from its running statistics.
HVD_SYNCBN_HD Statistics<double> stored_statistics(double mean, double var, double eps) {
  return {mean, var, 1 / sqrt(var + eps)};
}

// The weights are float32 values, widened. The result is then rounded once into the buffer. A batch that is not finite
// is left out, or makes the result NaN.
HVD_SYNCBN_HD double running(double old_weight, double old, double new_weight, double batch, bool skip_nonfinite) {
  return batch == batch || !skip_nonfinite ? old_weight * old + new_weight * batch : old;
}

// base^n, n >= 0, always in this order; pow() may differ between machines.
HVD_SYNCBN_HD double power(double base, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// The batch's weight in a zero-debiased average after `batches` earlier batches: 1 / s, where s = old_weight * s + 1
// with every batch. For old_weight 1 it is the average over all batches. old_weight is first rounded to float32.
HVD_SYNCBN_HD double share_of_new(double old_weight, int64_t batches) {
  const double keep = static_cast<float>(old_weight);
  if (keep == 1) return 1 / (static_cast<double>(batches) + 1);
  return (1 - keep) / (1 - power(keep, batches + 1));
}

HVD_SYNCBN_HD double unbiased(double var, double n) { return var * n / (n - 1); }

// The coefficients of a channel for forward_apply, in the compute type T: y = (x - pivot) * (scale + scale_lo) + shift
// + shift_lo.
template <class T>
struct ForwardCoefficients {
  T pivot, scale, scale_lo, shift, shift_lo;
};

// A mean of more standard deviations than this is not part of the shift, where it would cost digits of beta. It is
// subtracted first, which is exact there.
constexpr double kFarMean = 0x1p20;

template <class T>
HVD_SYNCBN_HD ForwardCoefficients<T> forward_coefficients(double mean, double invstd, double gamma, double beta) {
  const T pivot = fabs(mean) * invstd > kFarMean ? static_cast<T>(mean) : T(0);
  const DoubleDouble<T> scale = narrowed<T>({gamma * invstd, 0.0});
  const DoubleDouble<T> shift = narrowed<T>(add_product(beta, -(mean - static_cast<double>(pivot)),
                                                        static_cast<double>(scale.hi) + static_cast<double>(scale.lo)));
  return {pivot, scale.hi, scale.lo, shift.hi, shift.lo};
}

// The coefficients of a channel for backward_apply: dx = unit * ((scale + scale_lo) * dy + slope * x + shift +
// shift_lo). The unit is a power of two; without it, the slope would underflow float if x is very large.
template <class T>
struct BackwardCoefficients {
  T unit, scale, scale_lo, slope, shift, shift_lo;
};

// The means of dy, and of dy * d over the variance.
template <class V>
struct GradientMeans {
  V dy, dyd;
};

// From the sums of dy and of dy * d over n > 0 values.
template <class V>
HVD_SYNCBN_HD GradientMeans<V> gradient_means(DoubleDouble<V> a, DoubleDouble<V> b, V n, V invstd) {
  return {divide(a, n).hi, invstd * invstd * divide(b, n).hi};
}

HVD_SYNCBN_HD GradientMeans<double> gradient_means(const int64_t* packet, int64_t c, int64_t channel, double invstd) {
  if (packet[nonfinite_at(channel)] != 0) {
    const double nan = canonical_nan<double>();
    return {nan, nan};
  }
  if (packet[1] == 0) return {0, 0};
  return gradient_means(read_sum(packet + moment_a_at(c, channel)), read_sum(packet + moment_b_at(c, channel)),
                        static_cast<double>(packet[1]), invstd);
}

template <class T>
HVD_SYNCBN_HD BackwardCoefficients<T> backward_coefficients(double mean, double invstd, double gamma,
                                                            GradientMeans<double> means) {
  if (means.dy != means.dy) {
    const T nan = canonical_nan<T>();
    return {nan, nan, nan, nan, nan, nan};
  }
  const double whole = gamma * invstd;
  const T unit = power_of_two(static_cast<T>(whole));
  const double scale = whole / static_cast<double>(unit);
  const DoubleDouble<T> split = narrowed<T>({scale, 0.0});
  const T slope = static_cast<T>(-scale * means.dyd);
  const DoubleDouble<T> shift = narrowed<T>(add_product(-(scale * means.dy), -mean, static_cast<double>(slope)));
  return {unit, split.hi, split.lo, slope, shift.hi, shift.lo};
}

// This rank's parameter gradients, from its own packet.
template <class V>
struct ParameterGradients {
  V dgamma, dbeta;
};

template <class V>
HVD_SYNCBN_HD ParameterGradients<V> parameter_gradients(DoubleDouble<V> a, DoubleDouble<V> b, V invstd) {
  return {invstd * b.hi, a.hi};
}

HVD_SYNCBN_HD ParameterGradients<double> parameter_gradients(const int64_t* packet, int64_t c, int64_t channel,
                                                             double mean, double invstd) {
  if (packet[nonfinite_at(channel)] != 0 || mean != mean) {
    const double nan = canonical_nan<double>();
    return {nan, nan};
  }
  return parameter_gradients(read_sum(packet + moment_a_at(c, channel)), read_sum(packet + moment_b_at(c, channel)),
                             invstd);
}

HVD_SYNCBN_HD uint32_t folded(uint64_t hash) { return static_cast<uint32_t>(hash ^ (hash >> 32)); }

// FNV-1a takes in one more byte.
HVD_SYNCBN_HD uint64_t fnv1a(uint64_t hash, uint64_t byte) { return (hash ^ byte) * 0x100000001b3u; }
constexpr uint64_t kFnvStart = 0xcbf29ce484222325u;

// The digest of a forward packet, which differs between ranks that cannot share a batch: FNV-1a over version, dtype,
// channel count, eps and the number of the call.
HVD_SYNCBN_HD uint32_t forward_digest(double eps, int32_t dtype, int64_t channels, int64_t call) {
  const uint64_t words[5] = {static_cast<uint64_t>(kProtocolVersion), static_cast<uint64_t>(dtype),
                             static_cast<uint64_t>(channels), bit_cast<uint64_t>(eps), static_cast<uint64_t>(call)};
  uint64_t hash = kFnvStart;
  for (int w = 0; w < 5; ++w) {
    for (int byte = 0; byte < 8; ++byte) hash = fnv1a(hash, (words[w] >> (8 * byte)) & 0xff);
  }
  return folded(hash);
}

// The digest of a backward packet identifies the call of the layer by its batch statistics, which are the same on every
// rank: backward_digest(sum of call_hash over the channels, modulo 2^64).
HVD_SYNCBN_HD uint64_t call_hash(double mean, double invstd, int64_t channel) {
  const uint64_t a = bit_cast<uint64_t>(mean) ^ (static_cast<uint64_t>(channel) * 0x9e3779b97f4a7c15u);
  const uint64_t b = bit_cast<uint64_t>(invstd);
  const uint64_t hash = a * 0xbf58476d1ce4e5b9u;
  const uint64_t both = ((hash ^ (hash >> 29)) + (b ^ (b >> 32))) * 0x94d049bb133111ebu;
  return both ^ (both >> 32);
}

HVD_SYNCBN_HD uint32_t backward_digest(uint64_t sum) { return folded(sum * 0xd6e8feb86659fd93u); }

// Word `index` (not 1, the count) of a rank's own header.
HVD_SYNCBN_HD int64_t header_word(int index, uint32_t digest) {
  const uint64_t d = digest;
  return index == 0 ? 1 : static_cast<int64_t>(index == 2 ? d : d * d);
}

// The status in the header of a reduced packet. p * sum(d^2) - sum(d)^2 is the sum of the squared differences of all
// pairs of digests: 0 if they are equal.
HVD_SYNCBN_HD int32_t check_header(int32_t direction, const int64_t* packet) {
  const uint64_t participants = static_cast<uint64_t>(packet[0]), sum = static_cast<uint64_t>(packet[2]);
  if (participants * static_cast<uint64_t>(packet[3]) != sum * sum) {
    return direction == HVD_SYNCBN_FORWARD ? HVD_SYNCBN_RANKS_DISAGREE : HVD_SYNCBN_CALLS_DIFFER;
  }
  return packet[1] == 0 ? HVD_SYNCBN_EMPTY : packet[1] == 1 ? HVD_SYNCBN_ONE_VALUE : HVD_SYNCBN_OK;
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_FINISH_H_
