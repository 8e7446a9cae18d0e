// Backward moments: sum dy and sum dy * (x - mean) of every piece, in float64, added exactly to the packet; and from
// the packet this rank's dgamma and dbeta. With a fused relu dy counts where the output y is positive.
//
// Bytes: x and dy (and y) are read once, n*c*s elements each; the packet as in forward_moments.cu.
// Geometry: as forward_moments.cu.
#include "../common/elementwise.h"
#include "../include/hvd_syncbn/cuda.h"
#include "moments.cuh"

namespace hvd_syncbn {
namespace cuda {
namespace {

template <class T>
struct BackwardTerms {
  using Type = T;
  using Lanes = Float64Lanes;
  struct Element {
    T x, g;
  };
  static constexpr bool kUsesMean = true;
  const T* x;
  const T* dy;
  const T* y;

  template <int kWidth>
  struct Loaded {
    Pack<T, kWidth> x, dy, y;
  };
  template <int kWidth>
  __device__ Loaded<kWidth> load(int64_t i, int64_t) const {
    Loaded<kWidth> loaded;
    loaded.x = load_pack<kWidth>(x + i);
    loaded.dy = load_pack<kWidth>(dy + i);
    if (y != nullptr) loaded.y = load_pack<kWidth>(y + i);
    return loaded;
  }
  template <int kWidth>
  __device__ Element element(const Loaded<kWidth>& loaded, int e) const {
    const bool keeps = y == nullptr || keep_where_positive(Compute<T>{1}, widen(loaded.y.v[e])) != 0;
    return {loaded.x.v[e], keeps ? loaded.dy.v[e] : T{}};
  }
  __device__ Term term(Element element, double mean) const {
    return {widen(element.g), static_cast<double>(widen(element.x)) - mean};
  }
};

template <class T>
cudaError_t run(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const Closing& closing,
                void* stream) {
  const BackwardTerms<T> terms = {static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<const T*>(y)};
  return launch_moments(shape, widest_access({x, dy, y}), terms, closing, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace hvd_syncbn

using namespace hvd_syncbn;

extern "C" int32_t hvd_syncbn_cuda_backward_moments(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                    const void* y, const uint8_t* mask, const double* stats,
                                                    int64_t* packet, hvd_syncbn_vector dgamma, hvd_syncbn_vector dbeta,
                                                    void* stream) {
  cuda::Closing closing = {};
  closing.packet = packet;
  closing.count = shape->n * shape->s;
  closing.mask = mask;
  closing.stats = stats;
  closing.dgamma = dgamma;
  closing.dbeta = dbeta;
  switch (shape->dtype) {
    case HVD_SYNCBN_FLOAT32:
      return cuda::run<float>(*shape, x, dy, y, closing, stream);
    case HVD_SYNCBN_FLOAT64:
      return cuda::run<double>(*shape, x, dy, y, closing, stream);
    case HVD_SYNCBN_FLOAT16:
      return cuda::run<Half>(*shape, x, dy, y, closing, stream);
    default:
      return cuda::run<BFloat16>(*shape, x, dy, y, closing, stream);
  }
}
