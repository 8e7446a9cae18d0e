// Forward moments: sum x and sum x^2 of every piece, in float64, added exactly to the packet.
//
// Bytes: x is read once, n*c*s elements; the packet, 136 bytes per channel, is set to zero, added to once per block,
// and closed by the last block of each channel tile. Geometry: 128 threads; channel tiles x splits, in
// whole waves (device.cuh); see moments.cuh for what a block does in each layout.
#include "../include/hvd_syncbn/cuda.h"
#include "moments.cuh"

namespace hvd_syncbn {
namespace cuda {
namespace {

template <class T>
struct ForwardTerms {
  using Type = T;
  using Lanes = Float64Lanes;
  using Element = T;
  static constexpr bool kUsesMean = false;
  const T* x;
  const uint8_t* mask;

  template <int kWidth>
  struct Loaded {
    Pack<T, kWidth> x;
    bool counts;
  };
  template <int kWidth>
  __device__ Loaded<kWidth> load(int64_t i, int64_t row) const {
    // Wide accesses are for batches without a mask.
    return {load_pack<kWidth>(x + i), kWidth > 1 || mask == nullptr || mask[row] != 0};
  }
  template <int kWidth>
  __device__ Element element(const Loaded<kWidth>& loaded, int e) const {
    return loaded.counts ? loaded.x.v[e] : T{};
  }
  __device__ Term term(Element x, double) const {
    const double v = widen(x);
    return {v, v};
  }
};

template <class T>
struct IntegerTerms : ForwardTerms<T> {
  using Lanes = IntegerLanes<T>;
};

template <class T>
cudaError_t run(const hvd_syncbn_shape& shape, const void* x, const Closing& closing, void* stream) {
  const int64_t access = closing.mask == nullptr ? widest_access({x}) : sizeof(T);
  const ForwardTerms<T> terms = {static_cast<const T*>(x), closing.mask};
  if constexpr (sizeof(T) == 2) {
    bool little;
    const cudaError_t error = little_float64(&little);
    if (error != cudaSuccess) return error;
    // Lanes of other short pieces have one element or two.
    if (little && (shape.s == 1 || shape.s > kShortPiece)) {
      return launch_moments(shape, access, IntegerTerms<T>{terms}, closing, stream);
    }
  }
  return launch_moments(shape, access, terms, closing, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace hvd_syncbn

using namespace hvd_syncbn;

extern "C" int32_t hvd_syncbn_cuda_forward_moments(const hvd_syncbn_shape* shape, const void* x, const uint8_t* mask,
                                                   double eps, int64_t call, int64_t* packet, void* stream) {
  cuda::Closing closing = {};
  closing.packet = packet;
  closing.digest = forward_digest(eps, shape->dtype, shape->c, call);
  closing.count = shape->n * shape->s;
  closing.mask = mask;
  switch (shape->dtype) {
    case HVD_SYNCBN_FLOAT32:
      return cuda::run<float>(*shape, x, closing, stream);
    case HVD_SYNCBN_FLOAT64:
      return cuda::run<double>(*shape, x, closing, stream);
    case HVD_SYNCBN_FLOAT16:
      return cuda::run<Half>(*shape, x, closing, stream);
    default:
      return cuda::run<BFloat16>(*shape, x, closing, stream);
  }
}
