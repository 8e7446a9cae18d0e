// How a thread adds up the terms of a lane (docs/protocol.md, 1): in float64, or in integers, to the same bits.
//
// IntegerLanes are for forward moments of 16-bit elements on GPUs with little float64. A lane's elements are counted in
// units of 2^e, their sum in 32 bits and the sum of their squares in 64 bits. Both are what float64 gives if
//   1. every element is a whole number of units, and below 2^29 of them (so that 32 squares fit 64 bits), and
//   2. the sum of squares is at most 2^53 units^2.
// By 2, every partial sum of squares is a whole number of units^2 of at most 2^53, which float64 holds exactly. The
// same holds for the partial sums of up to 32 elements: by Cauchy-Schwarz they are at most sqrt(32 * 2^53) = 2^29
// units. So float64 rounds nowhere, whatever the order. A nonzero element with p significant bits (8 in bfloat16, 11 in
// float16) is a whole number of units if its magnitude is at least 2^(e + p - 1). 32 elements of the magnitude 2^24
// units are the limit of 2, so exponents of a lane may spread 24 - p binades, 16 or 13, and more if few are that large.
// Both are checked for every lane. One that fails them, as with NaN and infinity, is added up again in float64.
#ifndef HVD_SYNCBN_CUDA_LANE_SUMS_CUH_
#define HVD_SYNCBN_CUDA_LANE_SUMS_CUH_

#include <type_traits>

#include "exact_sums.cuh"

namespace hvd_syncbn {
namespace cuda {

struct Term {
  double a, d;
};

struct Moments {
  double a = 0, b = 0;

  __device__ void add(const Term& term) {
    a += term.a;
    b = fused(term.a, term.d, b);
  }
  __device__ void add(const Moments& other) {
    a += other.a;
    b += other.b;
  }
};

// Positions at, at + 32, ... of a piece in float64. offset, row: of its first position; step: between two positions.
// Not inlined, for it is rare and would cost its callers registers.
template <class Terms>
__device__ __noinline__ Moments float64_lane(Terms terms, double mean, int64_t offset, int64_t step, int64_t row,
                                             int at, int length) {
  note_float64_lane();
  Moments sum;
  for (; at < length; at += kLanes) {
    sum.add(terms.term(terms.element(terms.template load<1>(offset + at * step, row + at), 0), mean));
  }
  return sum;
}

struct Float64Lanes {
  static constexpr bool kIntegers = false;
  using Lane = Moments;

  template <class Terms>
  __device__ void add(Lane* lane, const Terms& terms, typename Terms::Element element, double mean) const {
    lane->add(terms.term(element, mean));
  }
  __device__ bool exact(const Lane&) const { return true; }
  __device__ Moments moments(const Lane& lane) const { return lane; }
  __device__ void follow(const Moments&, int) {}
};

template <class T>
class IntegerLanes {
 public:
  static constexpr bool kIntegers = true;
  struct Lane {
    uint32_t sum = 0;
    uint64_t squares = 0;
    // Of the bits of all magnitudes, which are ordered as these are: the largest, and the smallest but 0, minus 1.
    uint32_t most = 0, least = 0xffffffffu;
  };

  template <class Terms>
  __device__ void add(Lane* lane, const Terms&, T element, double) const {
    const float value = widen(element);
    const uint32_t magnitude = bit_cast<uint32_t>(value) & 0x7fffffffu;
    const int32_t units = __float2int_rz(value * bit_cast<float>(float_bits(-exponent_)));
    lane->sum += static_cast<uint32_t>(units);
    lane->squares += static_cast<uint64_t>(int64_t{units} * units);
    lane->most = magnitude > lane->most ? magnitude : lane->most;
    lane->least = magnitude - 1 < lane->least ? magnitude - 1 : lane->least;
  }

  // Whether the sums are those of float64.
  __device__ bool exact(const Lane& lane) const {
    constexpr bool kHalf = std::is_same<T, Half>::value;
    // Every float16 is a whole number of 2^-24, also those with fewer significant bits.
    const uint32_t whole = kHalf && exponent_ <= -24 ? 1 : float_bits(exponent_ + (kHalf ? 10 : 7));
    return lane.least >= whole - 1 && lane.most < float_bits(exponent_ + 29) && lane.squares <= uint64_t{1} << 53;
  }

  __device__ Moments moments(const Lane& lane) const {
    Moments moments;
    moments.a = static_cast<double>(static_cast<int32_t>(lane.sum)) * power_of_two(exponent_);
    moments.b = static_cast<double>(static_cast<int64_t>(lane.squares)) * power_of_two(2 * exponent_);
    return moments;
  }

  // Chooses the unit for the next lane, after one of so many elements: 32 elements like these have a sum of squares of
  // 2^50 to 2^53 units^2.
  __device__ void follow(const Moments& moments, int elements) {
    const int biased = static_cast<int>(bit_cast<uint64_t>(moments.b) >> 52) & 0x7ff;
    if (biased == 0 || biased == 0x7ff) return;  // 0, NaN or infinite
    const int of_elements = static_cast<int>(bit_cast<uint32_t>(static_cast<float>(elements)) >> 23) - 127;
    const int exponent = (biased - 1023 - of_elements + 5 - 50) >> 1;
    // Neither do squares of units fall below what a packet holds, nor sums of squares exceed it.
    exponent_ = exponent < kLeastExponent ? kLeastExponent : exponent > kMostExponent ? kMostExponent : exponent;
  }

 private:
  static constexpr int kLeastExponent = kLsbExp / 2, kMostExponent = 50;

  static __device__ uint32_t float_bits(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }

  int exponent_ = -23;  // for elements of about 1
};

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_LANE_SUMS_CUH_
