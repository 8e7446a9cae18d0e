// Forward apply: finishes the reduced packet, then y = relu?((x - pivot) * (scale + scale_lo) + shift +
// shift_lo + residual?), element by element, in the operations of ../common/elementwise.h.
//
// Bytes: x (and the residual) are read once, y is written once, n*c*s elements each; 136 bytes of packet and a few
// vectors per channel and block. The blocks of the first split write the stats and the running statistics.
// Geometry: 256 threads; channel tiles x splits, in whole waves (device.cuh); see apply.cuh for what a block does in
// each layout.
#include "../common/elementwise.h"
#include "../include/hvd_syncbn/cuda.h"
#include "apply.cuh"
#include "reports.h"

namespace hvd_syncbn {
namespace cuda {
namespace {

struct ForwardFinish {
  const int64_t* packet;
  double eps;
  hvd_syncbn_vector gamma, beta;
  hvd_syncbn_running moving;
  hvd_syncbn_vector new_mean, new_var;
  double* stats;
};

// Once per channel and block, so not worth a copy in every kernel.
__device__ __noinline__ Statistics<double> finish_channel(const ForwardFinish& in, int64_t c, int64_t channel,
                                                          int32_t status, bool first) {
  const double nan = canonical_nan<double>();
  const double old_mean = read(in.moving.mean, channel, 0.0), old_var = read(in.moving.var, channel, 1.0);
  const Statistics<double> s = failed(status)         ? Statistics<double>{nan, nan, nan}
                               : in.packet == nullptr ? stored_statistics(old_mean, old_var, in.eps)
                                                      : statistics(in.packet, c, channel, in.eps);
  if (!first) return s;
  in.stats[channel] = s.mean;
  in.stats[c + channel] = s.invstd;
  if (in.packet != nullptr && status == HVD_SYNCBN_OK) {
    const double keep = static_cast<float>(in.moving.old_weight), take = static_cast<float>(in.moving.new_weight);
    const double var = in.moving.unbiased ? unbiased(s.var, static_cast<double>(in.packet[1])) : s.var;
    const bool skip_nonfinite = in.moving.skip_nonfinite != 0;
    write(in.new_mean, channel, running(keep, old_mean, take, s.mean, skip_nonfinite));
    write(in.new_var, channel, running(keep, old_var, take, var, skip_nonfinite));
  } else if (in.new_mean.data != in.moving.mean.data) {
    write(in.new_mean, channel, old_mean);
    write(in.new_var, channel, old_var);
  }
  return s;
}

template <class T>
struct ForwardApply {
  static constexpr int32_t kDirection = HVD_SYNCBN_FORWARD;
  using Value = Compute<T>;
  using Coefficients = ForwardCoefficients<Value>;
  const T* x;
  const T* residual;
  T* y;
  bool relu;
  ForwardFinish in;

  __device__ Coefficients finish(int64_t c, int64_t channel, int32_t status, bool first) const {
    const Statistics<double> s = finish_channel(in, c, channel, status, first);
    return forward_coefficients<Value>(s.mean, s.invstd, read(in.gamma, channel, 1.0), read(in.beta, channel, 0.0));
  }

  template <int kWidth>
  struct Loaded {
    Pack<T, kWidth> x, residual;
  };
  template <int kWidth>
  using Results = Pack<T, kWidth>;

  __device__ void prefetch(int64_t i) const {
    cuda::prefetch(x + i);
    if (residual != nullptr) cuda::prefetch(residual + i);
  }
  template <int kWidth>
  __device__ Loaded<kWidth> load(int64_t i, int64_t) const {
    Loaded<kWidth> loaded;
    loaded.x = load_pack<kWidth>(x + i);
    if (residual != nullptr) loaded.residual = load_pack<kWidth>(residual + i);
    return loaded;
  }
  template <int kWidth>
  __device__ void compute(const Loaded<kWidth>& loaded, int e, const Coefficients& k, Results<kWidth>* results) const {
    const Value at = widen(loaded.x.v[e]);
    Value v = residual != nullptr ? normalized<Value>(at, k.pivot, k.scale, k.scale_lo, k.shift, k.shift_lo,
                                                      widen(loaded.residual.v[e]))
                                  : normalized<Value>(at, k.pivot, k.scale, k.scale_lo, k.shift, k.shift_lo);
    if (relu) v = hvd_syncbn::relu(v);
    narrow(v, &results->v[e]);
  }
  template <int kWidth>
  __device__ void store(int64_t i, const Results<kWidth>& results) const {
    store_pack<kWidth>(y + i, results);
  }
};

template <class T>
cudaError_t run(const hvd_syncbn_shape& shape, const void* x, const void* residual, bool relu, const ForwardFinish& in,
                const Report& report, void* y, void* stream) {
  const ForwardApply<T> op = {static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), relu, in};
  return launch_apply<T>(shape, aligned(x, 16) && aligned(residual, 16) && aligned(y, 16), false, op, report, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace hvd_syncbn

using namespace hvd_syncbn;

extern "C" int32_t hvd_syncbn_cuda_forward_apply(const hvd_syncbn_shape* shape, double eps, const void* x,
                                                 const void* residual, int32_t relu, const int64_t* packet,
                                                 hvd_syncbn_vector gamma, hvd_syncbn_vector beta,
                                                 hvd_syncbn_running running, hvd_syncbn_vector new_mean,
                                                 hvd_syncbn_vector new_var, const char* layer, double* stats, void* y,
                                                 void* stream) {
  const cuda::ForwardFinish in = {packet, eps, gamma, beta, running, new_mean, new_var, stats};
  cuda::Report report = {};
  const cudaError_t error = cuda::make_report(packet, layer, stream, &report);
  if (error != cudaSuccess) return error;
  switch (shape->dtype) {
    case HVD_SYNCBN_FLOAT32:
      return cuda::close_report(report, cuda::run<float>(*shape, x, residual, relu != 0, in, report, y, stream),
                                stream);
    case HVD_SYNCBN_FLOAT64:
      return cuda::close_report(report, cuda::run<double>(*shape, x, residual, relu != 0, in, report, y, stream),
                                stream);
    case HVD_SYNCBN_FLOAT16:
      return cuda::close_report(report, cuda::run<Half>(*shape, x, residual, relu != 0, in, report, y, stream), stream);
    default:
      return cuda::close_report(report, cuda::run<BFloat16>(*shape, x, residual, relu != 0, in, report, y, stream),
                                stream);
  }
}
