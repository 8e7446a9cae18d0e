// Primitives of arithmetic that CPU and GPU share: the function qualifier, fused multiply-add, bit casts.
#ifndef HVD_SYNCBN_COMMON_PORTABLE_H_
#define HVD_SYNCBN_COMMON_PORTABLE_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define HVD_SYNCBN_HD __host__ __device__ __forceinline__
#else
#define HVD_SYNCBN_HD inline __attribute__((always_inline))
#endif

namespace hvd_syncbn {

// The only fused operation of the protocol; all code is compiled with contraction off.
HVD_SYNCBN_HD double fused(double a, double b, double c) { return fma(a, b, c); }
HVD_SYNCBN_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }

// Functions of a double for templates over a double or a vector V of doubles.
template <class V>
HVD_SYNCBN_HD V constant(double v) {
  return V::splat(v);
}
template <>
HVD_SYNCBN_HD double constant<double>(double v) {
  return v;
}
HVD_SYNCBN_HD double square_root(double v) { return sqrt(v); }
HVD_SYNCBN_HD float square_root(float v) { return sqrtf(v); }
HVD_SYNCBN_HD double larger(double a, double b) { return a > b ? a : b; }  // b where a is NaN

// Functions of an int64_t for the same templates, besides + - & ^.
template <int kBits>
HVD_SYNCBN_HD int64_t shift_right(int64_t v) {  // toward minus infinity
  return v >> kBits;
}
HVD_SYNCBN_HD int64_t where_negative(int64_t v) { return v >> 63; }  // all bits, or none
HVD_SYNCBN_HD bool any_nonzero(int64_t v) { return v != 0; }
HVD_SYNCBN_HD double to_double(int64_t v) { return static_cast<double>(v); }  // 0 <= v < 2^52
HVD_SYNCBN_HD double negate_where(int64_t negative, double v) { return negative ? -v : v; }

template <class To, class From>
HVD_SYNCBN_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Returns the largest power of two up to |v|, at least the smallest normal one; 1 if v is not finite.
HVD_SYNCBN_HD float power_of_two(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v) & 0x7f800000u;
  return bit_cast<float>(bits == 0 ? 0x00800000u : bits == 0x7f800000u ? 0x3f800000u : bits);
}
HVD_SYNCBN_HD double power_of_two(double v) {
  const uint64_t infinite = 0x7ff0000000000000u, bits = bit_cast<uint64_t>(v) & infinite;
  return bit_cast<double>(bits == 0 ? 0x0010000000000000u : bits == infinite ? 0x3ff0000000000000u : bits);
}

// The only NaN that the core writes, because processors differ in the sign and payload of the NaNs they generate.
template <class T>
HVD_SYNCBN_HD T canonical_nan();
template <>
HVD_SYNCBN_HD float canonical_nan<float>() {
  return bit_cast<float>(uint32_t{0x7fc00000});
}
template <>
HVD_SYNCBN_HD double canonical_nan<double>() {
  return bit_cast<double>(uint64_t{0x7ff8000000000000});
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_PORTABLE_H_
