// The vectors of one instruction-set path. Every kernel source is compiled once per path, with HVD_SYNCBN_PATH as its
// name (baseline, avx2, avx512); all differences between paths are in this file.
//
// F64 and F32 hold N values. S64 and S32 hold one value, for tails and for the whole baseline path. All have
//   load(p)     loads N elements of any type, widened (exact)
//   store<kStream>(p)   rounds once and makes NaN canonical; kStream: a streaming store to an aligned address
//   splat(v)    + - *    fused(a, b, c)    relu(v)    keep_where_positive(v, y)    number_or_zero(v): 0 for NaN
// The float64 vectors also have, for the exact sums (tile_sums.h),
//   a | b, a & b (of the bits)    magnitude(v)    larger(a, b), smaller(a, b): b where a is NaN
//   any_above(a, b)    any_nonzero(v)
// F64 also has, for the per-channel work (../common/finish.h),
//   -a    a / b    square_root(v)
//   Bits: a vector of as many int64_t (../common/portable.h)
// Functions: load_part(p, count): F64 of the first `count` < N elements at p, then zeros
//   fold_rows(rows): folds each of N vectors to one value by lane[j] += lane[j + w], w = N / 2, ..., 1
#ifndef HVD_SYNCBN_CPU_SIMD_H_
#define HVD_SYNCBN_CPU_SIMD_H_

#include "../common/dtypes.h"
#include "../common/elementwise.h"

#if !defined(HVD_SYNCBN_PATH)
#error "compile with -DHVD_SYNCBN_PATH=baseline, avx2 or avx512"
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define HVD_SYNCBN_INLINE inline __attribute__((always_inline))

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {

template <class T>
struct Scalar {
  static constexpr int N = 1;
  using Value = T;
  T v;
  template <class Element>
  static HVD_SYNCBN_INLINE Scalar load(const Element* p) {
    return {static_cast<T>(widen(*p))};
  }
  static HVD_SYNCBN_INLINE Scalar splat(T value) { return {value}; }
  template <bool kStream, class Element>
  HVD_SYNCBN_INLINE void store(Element* p) const {
    narrow(v, p);
  }
  // Stores without rounding, for accumulators and other values inside the core.
  HVD_SYNCBN_INLINE void keep(T* p) const { *p = v; }
  friend HVD_SYNCBN_INLINE Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
  friend HVD_SYNCBN_INLINE Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
  friend HVD_SYNCBN_INLINE Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
  friend HVD_SYNCBN_INLINE Scalar fused(Scalar a, Scalar b, Scalar c) { return {hvd_syncbn::fused(a.v, b.v, c.v)}; }
  friend HVD_SYNCBN_INLINE Scalar relu(Scalar a) { return {hvd_syncbn::relu(a.v)}; }
  friend HVD_SYNCBN_INLINE Scalar keep_where_positive(Scalar a, Scalar y) {
    return {hvd_syncbn::keep_where_positive(a.v, y.v)};
  }
  friend HVD_SYNCBN_INLINE Scalar number_or_zero(Scalar a) { return {hvd_syncbn::number_or_zero(a.v)}; }
  friend HVD_SYNCBN_INLINE Scalar operator|(Scalar a, Scalar b) {
    static_assert(sizeof(T) == sizeof(uint64_t), "for float64");
    return {bit_cast<T>(bit_cast<uint64_t>(a.v) | bit_cast<uint64_t>(b.v))};
  }
  friend HVD_SYNCBN_INLINE Scalar operator&(Scalar a, Scalar b) {
    return {bit_cast<T>(bit_cast<uint64_t>(a.v) & bit_cast<uint64_t>(b.v))};
  }
  friend HVD_SYNCBN_INLINE Scalar magnitude(Scalar a) { return {fabs(a.v)}; }
  friend HVD_SYNCBN_INLINE Scalar larger(Scalar a, Scalar b) { return {a.v > b.v ? a.v : b.v}; }
  friend HVD_SYNCBN_INLINE Scalar smaller(Scalar a, Scalar b) { return {a.v < b.v ? a.v : b.v}; }
  friend HVD_SYNCBN_INLINE bool any_above(Scalar a, Scalar b) { return a.v > b.v; }
  friend HVD_SYNCBN_INLINE bool any_nonzero(Scalar a) { return a.v != 0; }
};
using S64 = Scalar<double>;
using S32 = Scalar<float>;

#if defined(__AVX512F__) || defined(__AVX2__)

template <bool kStream>
HVD_SYNCBN_INLINE void put(void* p, __m128i v) {
  kStream ? _mm_stream_si128(static_cast<__m128i*>(p), v) : _mm_storeu_si128(static_cast<__m128i*>(p), v);
}
template <bool kStream>
HVD_SYNCBN_INLINE void put(void* p, __m256i v) {
  kStream ? _mm256_stream_si256(static_cast<__m256i*>(p), v) : _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
template <bool kStream>
HVD_SYNCBN_INLINE void put(float* p, __m256 v) {
  kStream ? _mm256_stream_ps(p, v) : _mm256_storeu_ps(p, v);
}
template <bool kStream>
HVD_SYNCBN_INLINE void put(double* p, __m256d v) {
  kStream ? _mm256_stream_pd(p, v) : _mm256_storeu_pd(p, v);
}
// The bits of the double 2^52; below them, those of an integer up to 2^52.
constexpr int64_t kTwoTo52 = int64_t{0x433} << 52;
// Orders streaming stores before all later stores.
HVD_SYNCBN_INLINE void end_stream() { _mm_sfence(); }

HVD_SYNCBN_INLINE __m256d fold_four(__m256d r0, __m256d r1, __m256d r2, __m256d r3) {
  const __m256d s01 = _mm256_add_pd(_mm256_permute2f128_pd(r0, r1, 0x20), _mm256_permute2f128_pd(r0, r1, 0x31));
  const __m256d s23 = _mm256_add_pd(_mm256_permute2f128_pd(r2, r3, 0x20), _mm256_permute2f128_pd(r2, r3, 0x31));
  return _mm256_permute4x64_pd(_mm256_hadd_pd(s01, s23), 0xd8);  // rows 0, 2, 1, 3 in order
}

#else

HVD_SYNCBN_INLINE void end_stream() {}

#endif

#if defined(__AVX512F__)

template <bool kStream>
HVD_SYNCBN_INLINE void put(float* p, __m512 v) {
  kStream ? _mm512_stream_ps(p, v) : _mm512_storeu_ps(p, v);
}
template <bool kStream>
HVD_SYNCBN_INLINE void put(double* p, __m512d v) {
  kStream ? _mm512_stream_pd(p, v) : _mm512_storeu_pd(p, v);
}

struct F32 {
  static constexpr int N = 16;
  using Value = float;
  __m512 v;
  static HVD_SYNCBN_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static HVD_SYNCBN_INLINE F32 load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static HVD_SYNCBN_INLINE F32 load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static HVD_SYNCBN_INLINE F32 splat(float value) { return {_mm512_set1_ps(value)}; }
  HVD_SYNCBN_INLINE F32 canonical() const {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return {_mm512_mask_mov_ps(v, nan, _mm512_set1_ps(canonical_nan<float>()))};
  }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(float* p) const {
    put<kStream>(p, canonical().v);
  }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(Half* p) const {
    put<kStream>(p, _mm512_cvtps_ph(canonical().v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(canonical().v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    put<kStream>(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  friend HVD_SYNCBN_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F32 fused(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend HVD_SYNCBN_INLINE F32 keep_where_positive(F32 a, F32 y) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, _mm512_setzero_ps(), _CMP_NLE_UQ), a.v)};
  }
  friend HVD_SYNCBN_INLINE F32 relu(F32 a) { return keep_where_positive(a, a); }
  friend HVD_SYNCBN_INLINE F32 number_or_zero(F32 a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v)};
  }
};

struct I64 {
  __m512i v;
  HVD_SYNCBN_INLINE I64() = default;
  HVD_SYNCBN_INLINE I64(__m512i bits) : v(bits) {}
  HVD_SYNCBN_INLINE I64(int64_t value) : v(_mm512_set1_epi64(value)) {}
  // out[i] of lane j: p[8 * j + i].
  static HVD_SYNCBN_INLINE void load_columns(const int64_t* p, I64* out) {
    const __m512i rows = _mm512_setr_epi64(0, 8, 16, 24, 32, 40, 48, 56);
    for (int i = 0; i < 8; ++i) out[i] = _mm512_i64gather_epi64(rows, p + i, 8);
  }
  friend HVD_SYNCBN_INLINE I64 operator+(I64 a, I64 b) { return _mm512_add_epi64(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 operator-(I64 a, I64 b) { return _mm512_sub_epi64(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 operator&(I64 a, I64 b) { return _mm512_and_si512(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 operator^(I64 a, I64 b) { return _mm512_xor_si512(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 where_negative(I64 a) { return _mm512_srai_epi64(a.v, 63); }
  friend HVD_SYNCBN_INLINE bool any_nonzero(I64 a) { return _mm512_test_epi64_mask(a.v, a.v) != 0; }
};
template <int kBits>
HVD_SYNCBN_INLINE I64 shift_right(I64 a) {
  return _mm512_srai_epi64(a.v, kBits);
}

struct F64 {
  static constexpr int N = 8;
  using Value = double;
  using Bits = I64;
  __m512d v;
  static HVD_SYNCBN_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static HVD_SYNCBN_INLINE F64 load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static HVD_SYNCBN_INLINE F64 load(const Half* p) {
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static HVD_SYNCBN_INLINE F64 load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)))};
  }
  static HVD_SYNCBN_INLINE F64 splat(double value) { return {_mm512_set1_pd(value)}; }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(double* p) const {
    const __mmask8 nan = _mm512_cmp_pd_mask(v, v, _CMP_UNORD_Q);
    put<kStream>(p, _mm512_mask_mov_pd(v, nan, _mm512_set1_pd(canonical_nan<double>())));
  }
  HVD_SYNCBN_INLINE void keep(double* p) const { _mm512_storeu_pd(p, v); }
  friend HVD_SYNCBN_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator-(F64 a) { return {_mm512_xor_pd(_mm512_set1_pd(-0.0), a.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 square_root(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
  friend HVD_SYNCBN_INLINE F64 fused(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend HVD_SYNCBN_INLINE F64 keep_where_positive(F64 a, F64 y) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y.v, _mm512_setzero_pd(), _CMP_NLE_UQ), a.v)};
  }
  friend HVD_SYNCBN_INLINE F64 relu(F64 a) { return keep_where_positive(a, a); }
  friend HVD_SYNCBN_INLINE F64 number_or_zero(F64 a) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.v, a.v, _CMP_ORD_Q), a.v)};
  }
  friend HVD_SYNCBN_INLINE F64 operator|(F64 a, F64 b) { return {_mm512_or_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator&(F64 a, F64 b) { return {_mm512_and_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 magnitude(F64 a) { return {_mm512_abs_pd(a.v)}; }
  friend HVD_SYNCBN_INLINE F64 larger(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 smaller(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE bool any_above(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
  friend HVD_SYNCBN_INLINE F64 negate_where(I64 negative, F64 a) {
    return {_mm512_xor_pd(a.v, _mm512_castsi512_pd((negative & INT64_MIN).v))};
  }
  friend HVD_SYNCBN_INLINE bool any_nonzero(F64 a) {
    return _mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_NEQ_UQ) != 0;
  }
};
HVD_SYNCBN_INLINE F64 to_double(I64 a) {
  const F64 shifted = {_mm512_castsi512_pd(_mm512_or_si512(a.v, I64(kTwoTo52).v))};
  return shifted - F64::splat(0x1p52);
}

HVD_SYNCBN_INLINE F64 load_part(const float* p, int count) {
  return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>((1 << count) - 1), p))};
}
HVD_SYNCBN_INLINE F64 fold_rows(const F64* rows) {
  __m256d half[8];
  for (int r = 0; r < 8; ++r) {
    half[r] = _mm256_add_pd(_mm512_castpd512_pd256(rows[r].v), _mm512_extractf64x4_pd(rows[r].v, 1));
  }
  const __m256d low = fold_four(half[0], half[1], half[2], half[3]);
  return {_mm512_insertf64x4(_mm512_castpd256_pd512(low), fold_four(half[4], half[5], half[6], half[7]), 1)};
}

#elif defined(__AVX2__)

struct F32 {
  static constexpr int N = 8;
  using Value = float;
  __m256 v;
  static HVD_SYNCBN_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static HVD_SYNCBN_INLINE F32 load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static HVD_SYNCBN_INLINE F32 load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static HVD_SYNCBN_INLINE F32 splat(float value) { return {_mm256_set1_ps(value)}; }
  HVD_SYNCBN_INLINE F32 canonical() const {
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    return {_mm256_blendv_ps(v, _mm256_set1_ps(canonical_nan<float>()), nan)};
  }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(float* p) const {
    put<kStream>(p, canonical().v);
  }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(Half* p) const {
    put<kStream>(p, _mm256_cvtps_ph(canonical().v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(canonical().v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    put<kStream>(p, packed);
  }
  friend HVD_SYNCBN_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F32 fused(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend HVD_SYNCBN_INLINE F32 keep_where_positive(F32 a, F32 y) {
    return {_mm256_and_ps(_mm256_cmp_ps(y.v, _mm256_setzero_ps(), _CMP_NLE_UQ), a.v)};
  }
  friend HVD_SYNCBN_INLINE F32 relu(F32 a) { return keep_where_positive(a, a); }
  friend HVD_SYNCBN_INLINE F32 number_or_zero(F32 a) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q), a.v)};
  }
};

struct I64 {
  __m256i v;
  HVD_SYNCBN_INLINE I64() = default;
  HVD_SYNCBN_INLINE I64(__m256i bits) : v(bits) {}
  HVD_SYNCBN_INLINE I64(int64_t value) : v(_mm256_set1_epi64x(value)) {}
  // out[i] of lane j: p[8 * j + i].
  static HVD_SYNCBN_INLINE void load_columns(const int64_t* p, I64* out) {
    for (int half = 0; half < 8; half += 4) {
      __m256i row[4];
      for (int j = 0; j < 4; ++j) row[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * j + half));
      const __m256i even01 = _mm256_unpacklo_epi64(row[0], row[1]), odd01 = _mm256_unpackhi_epi64(row[0], row[1]);
      const __m256i even23 = _mm256_unpacklo_epi64(row[2], row[3]), odd23 = _mm256_unpackhi_epi64(row[2], row[3]);
      out[half] = _mm256_permute2x128_si256(even01, even23, 0x20);
      out[half + 1] = _mm256_permute2x128_si256(odd01, odd23, 0x20);
      out[half + 2] = _mm256_permute2x128_si256(even01, even23, 0x31);
      out[half + 3] = _mm256_permute2x128_si256(odd01, odd23, 0x31);
    }
  }
  friend HVD_SYNCBN_INLINE I64 operator+(I64 a, I64 b) { return _mm256_add_epi64(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 operator-(I64 a, I64 b) { return _mm256_sub_epi64(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 operator&(I64 a, I64 b) { return _mm256_and_si256(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 operator^(I64 a, I64 b) { return _mm256_xor_si256(a.v, b.v); }
  friend HVD_SYNCBN_INLINE I64 where_negative(I64 a) { return _mm256_cmpgt_epi64(_mm256_setzero_si256(), a.v); }
  friend HVD_SYNCBN_INLINE bool any_nonzero(I64 a) { return !_mm256_testz_si256(a.v, a.v); }
};
template <int kBits>
HVD_SYNCBN_INLINE I64 shift_right(I64 a) {  // there is a logical shift only
  return I64(_mm256_srli_epi64((a ^ INT64_MIN).v, kBits)) - (int64_t{1} << (63 - kBits));
}

struct F64 {
  static constexpr int N = 4;
  using Value = double;
  using Bits = I64;
  __m256d v;
  static HVD_SYNCBN_INLINE F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static HVD_SYNCBN_INLINE F64 load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static HVD_SYNCBN_INLINE F64 load(const Half* p) {
    return {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static HVD_SYNCBN_INLINE F64 load(const BFloat16* p) {
    const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)))};
  }
  static HVD_SYNCBN_INLINE F64 splat(double value) { return {_mm256_set1_pd(value)}; }
  template <bool kStream>
  HVD_SYNCBN_INLINE void store(double* p) const {
    const __m256d nan = _mm256_cmp_pd(v, v, _CMP_UNORD_Q);
    put<kStream>(p, _mm256_blendv_pd(v, _mm256_set1_pd(canonical_nan<double>()), nan));
  }
  HVD_SYNCBN_INLINE void keep(double* p) const { _mm256_storeu_pd(p, v); }
  friend HVD_SYNCBN_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator-(F64 a) { return {_mm256_xor_pd(_mm256_set1_pd(-0.0), a.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 square_root(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
  friend HVD_SYNCBN_INLINE F64 fused(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend HVD_SYNCBN_INLINE F64 keep_where_positive(F64 a, F64 y) {
    return {_mm256_and_pd(_mm256_cmp_pd(y.v, _mm256_setzero_pd(), _CMP_NLE_UQ), a.v)};
  }
  friend HVD_SYNCBN_INLINE F64 relu(F64 a) { return keep_where_positive(a, a); }
  friend HVD_SYNCBN_INLINE F64 number_or_zero(F64 a) {
    return {_mm256_and_pd(_mm256_cmp_pd(a.v, a.v, _CMP_ORD_Q), a.v)};
  }
  friend HVD_SYNCBN_INLINE F64 operator|(F64 a, F64 b) { return {_mm256_or_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 operator&(F64 a, F64 b) { return {_mm256_and_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 magnitude(F64 a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
  friend HVD_SYNCBN_INLINE F64 larger(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE F64 smaller(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
  friend HVD_SYNCBN_INLINE bool any_above(F64 a, F64 b) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)) != 0;
  }
  friend HVD_SYNCBN_INLINE F64 negate_where(I64 negative, F64 a) {
    return {_mm256_xor_pd(a.v, _mm256_castsi256_pd((negative & INT64_MIN).v))};
  }
  friend HVD_SYNCBN_INLINE bool any_nonzero(F64 a) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a.v, _mm256_setzero_pd(), _CMP_NEQ_UQ)) != 0;
  }
};
HVD_SYNCBN_INLINE F64 to_double(I64 a) {
  const F64 shifted = {_mm256_castsi256_pd(_mm256_or_si256(a.v, I64(kTwoTo52).v))};
  return shifted - F64::splat(0x1p52);
}

HVD_SYNCBN_INLINE F64 load_part(const float* p, int count) {
  const __m128i loaded = _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3));
  return {_mm256_cvtps_pd(_mm_maskload_ps(p, loaded))};
}
HVD_SYNCBN_INLINE F64 fold_rows(const F64* rows) { return {fold_four(rows[0].v, rows[1].v, rows[2].v, rows[3].v)}; }

#else  // baseline: plain C++, any machine

using F32 = S32;
using F64 = S64;

HVD_SYNCBN_INLINE F64 fold_rows(const F64* rows) { return rows[0]; }

#endif

template <class T>
HVD_SYNCBN_INLINE F64 load_part(const T* p, int count) {
  T part[F64::N] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return F64::load(part);
}

// The vector type for normalizing elements of T, and its scalar form.
template <class T>
struct VectorOf {
  using Wide = F32;
  using One = S32;
};
template <>
struct VectorOf<double> {
  using Wide = F64;
  using One = S64;
};

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_SIMD_H_
