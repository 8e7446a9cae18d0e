// Backward apply: finishes the reduced packet, then dx = unit * ((scale + scale_lo) * dy + slope * x + shift +
// shift_lo), element by element, in the operations of ../common/elementwise.h; with a fused relu dy is masked by the
// output first, and the masked dy is the residual's gradient.
//
// Bytes: x and dy (and y) are read once, dx (and dresidual) are written once, n*c*s elements each; 136 bytes of packet
// and a few vectors per channel and block.
// Geometry: as forward_apply.cu.
#include "../common/elementwise.h"
#include "../include/hvd_syncbn/cuda.h"
#include "apply.cuh"
#include "reports.h"

namespace hvd_syncbn {
namespace cuda {
namespace {

struct BackwardFinish {
  const int64_t* packet;
  const double* stats;
  hvd_syncbn_vector gamma;
};

// Once per channel and block, so not worth a copy in every kernel.
template <class Value>
__device__ __noinline__ BackwardCoefficients<Value> finish_channel(const BackwardFinish& in, int64_t c, int64_t channel,
                                                                   int32_t status) {
  if (failed(status)) {
    const Value nan = canonical_nan<Value>();
    return {nan, nan, nan, nan, nan, nan};
  }
  const double invstd = in.stats[c + channel];
  return backward_coefficients<Value>(
      in.stats[channel], invstd, read(in.gamma, channel, 1.0),
      in.packet == nullptr ? GradientMeans<double>{0, 0} : gradient_means(in.packet, c, channel, invstd));
}

template <class T>
struct BackwardApply {
  static constexpr int32_t kDirection = HVD_SYNCBN_BACKWARD;
  using Value = Compute<T>;
  using Coefficients = BackwardCoefficients<Value>;
  const T* x;
  const T* dy;
  const T* y;
  const uint8_t* mask;
  T* dx;
  T* dresidual;
  BackwardFinish in;

  __device__ Coefficients finish(int64_t c, int64_t channel, int32_t status, bool) const {
    return finish_channel<Value>(in, c, channel, status);
  }

  template <int kWidth>
  struct Loaded {
    Pack<T, kWidth> x, dy, y;
    bool counts;
  };
  template <int kWidth>
  struct Results {
    Pack<T, kWidth> dx, dresidual;
  };

  __device__ void prefetch(int64_t i) const {
    cuda::prefetch(x + i);
    cuda::prefetch(dy + i);
    if (y != nullptr) cuda::prefetch(y + i);
  }
  template <int kWidth>
  __device__ Loaded<kWidth> load(int64_t i, int64_t row) const {
    Loaded<kWidth> loaded;
    loaded.x = load_pack<kWidth>(x + i);
    loaded.dy = load_pack<kWidth>(dy + i);
    if (y != nullptr) loaded.y = load_pack<kWidth>(y + i);
    loaded.counts = mask == nullptr || mask[row] != 0;
    return loaded;
  }
  template <int kWidth>
  __device__ void compute(const Loaded<kWidth>& loaded, int e, const Coefficients& k, Results<kWidth>* results) const {
    Value g = widen(loaded.dy.v[e]);
    if (y != nullptr) g = keep_where_positive(g, widen(loaded.y.v[e]));
    const Value dx_e = loaded.counts ? input_gradient<Value>(widen(loaded.x.v[e]), g, k.unit, k.scale, k.scale_lo,
                                                             k.slope, k.shift, k.shift_lo)
                                     : input_gradient<Value>(g, k.unit, k.scale, k.scale_lo);
    narrow(dx_e, &results->dx.v[e]);
    narrow(g, &results->dresidual.v[e]);
  }
  template <int kWidth>
  __device__ void store(int64_t i, const Results<kWidth>& results) const {
    store_pack<kWidth>(dx + i, results.dx);
    if (dresidual != nullptr) store_pack<kWidth>(dresidual + i, results.dresidual);
  }
};

template <class T>
cudaError_t run(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y, const uint8_t* mask,
                const BackwardFinish& in, const Report& report, void* dx, void* dresidual, void* stream) {
  const BackwardApply<T> op = {static_cast<const T*>(x),
                               static_cast<const T*>(dy),
                               static_cast<const T*>(y),
                               mask,
                               static_cast<T*>(dx),
                               static_cast<T*>(dresidual),
                               in};
  const bool whole = aligned(x, 16) && aligned(dy, 16) && aligned(y, 16) && aligned(dx, 16) && aligned(dresidual, 16);
  return launch_apply<T>(shape, whole, mask != nullptr, op, report, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace hvd_syncbn

using namespace hvd_syncbn;

extern "C" int32_t hvd_syncbn_cuda_backward_apply(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                  const void* y, const uint8_t* mask, const int64_t* packet,
                                                  const double* stats, hvd_syncbn_vector gamma, const char* layer,
                                                  void* dx, void* dresidual, void* stream) {
  const cuda::BackwardFinish in = {packet, stats, gamma};
  cuda::Report report = {};
  const cudaError_t error = cuda::make_report(packet, layer, stream, &report);
  if (error != cudaSuccess) return error;
  switch (shape->dtype) {
    case HVD_SYNCBN_FLOAT32:
      return cuda::close_report(report, cuda::run<float>(*shape, x, dy, y, mask, in, report, dx, dresidual, stream),
                                stream);
    case HVD_SYNCBN_FLOAT64:
      return cuda::close_report(report, cuda::run<double>(*shape, x, dy, y, mask, in, report, dx, dresidual, stream),
                                stream);
    case HVD_SYNCBN_FLOAT16:
      return cuda::close_report(report, cuda::run<Half>(*shape, x, dy, y, mask, in, report, dx, dresidual, stream),
                                stream);
    default:
      return cuda::close_report(report, cuda::run<BFloat16>(*shape, x, dy, y, mask, in, report, dx, dresidual, stream),
                                stream);
  }
}
