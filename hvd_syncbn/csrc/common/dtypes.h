// The four element types, and their conversions, which are exact or round once. GPUs have instructions for float16.
#ifndef HVD_SYNCBN_COMMON_DTYPES_H_
#define HVD_SYNCBN_COMMON_DTYPES_H_

#include "portable.h"

namespace hvd_syncbn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type for normalizing elements of T (section 4): float64 for float64, float32 for the others.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

HVD_SYNCBN_HD float widen(float v) { return v; }
HVD_SYNCBN_HD double widen(double v) { return v; }
HVD_SYNCBN_HD float widen(BFloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }
HVD_SYNCBN_HD float widen(Half v) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1fu;
  const uint32_t fraction = v.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact
    return bit_cast<float>(bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f) | sign);
  }
  const uint32_t wide = exponent == 0x1fu ? 0xffu : exponent + 112;
  return bit_cast<float>(sign | (wide << 23) | (fraction << 13));
#endif
}

// Round to nearest, ties to even; every NaN becomes the canonical one.
HVD_SYNCBN_HD void narrow(float v, float* out) { *out = v != v ? canonical_nan<float>() : v; }
HVD_SYNCBN_HD void narrow(double v, double* out) { *out = v != v ? canonical_nan<double>() : v; }
HVD_SYNCBN_HD void narrow(float v, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  out->bits = static_cast<uint16_t>(v != v ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
HVD_SYNCBN_HD void narrow(float v, Half* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
  if (v != v) out->bits = 0x7e00u;
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    out->bits = 0x7e00u;
    return;
  }
  if (magnitude >= 0x477ff000u) {  // 65520 and above rounds to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: rebias, round the 13 dropped bits
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the units with 2^-24 and rounds in hardware
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(half | sign);
#endif
}

// float64 to float32 with the last bit sticky (round to odd), so that rounding again to 16 bits rounds only once.
HVD_SYNCBN_HD float round_to_odd(double v) {
  const float nearest = static_cast<float>(v);
  if (!(static_cast<double>(nearest) != v) || v != v || nearest - nearest != 0.0f) return nearest;
  uint32_t bits = bit_cast<uint32_t>(nearest);
  if (bits & 1u) return nearest;
  // The nearest value is even and inexact: return its odd neighbor on v's side.
  const bool grow = fabs(v) > fabs(static_cast<double>(nearest));
  bits = grow ? bits + 1 : (bits & 0x7fffffffu) == 0 ? (bits | 1u) : bits - 1;
  return bit_cast<float>(bits);
}

// Rounds float64 once to the element type of a per-channel vector.
HVD_SYNCBN_HD void narrow(double v, float* out) { narrow(static_cast<float>(v), out); }
HVD_SYNCBN_HD void narrow(double v, Half* out) { narrow(round_to_odd(v), out); }
HVD_SYNCBN_HD void narrow(double v, BFloat16* out) { narrow(round_to_odd(v), out); }

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_DTYPES_H_
