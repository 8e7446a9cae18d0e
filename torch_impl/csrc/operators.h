// The PyTorch operators on the core, each defined once for all devices: `Cpu` and `Meta`, which only computes shapes,
// in ops.cc, and `Cuda` in cuda.cc. They manage tensors, memory and threads; all arithmetic is in the core.
//
//   forward_moments(x) -> packet                          then allreduce_(packet), written in Python
//   forward_apply(x, packet, ...) -> (y, stats)
//   backward_moments(x, dy, y?) -> (packet, dweight, dbias)
//   backward_apply(x, dy, y?, packet) -> (dx, dresidual)
//   backward_check(packet, dweight, dbias) -> (dweight, dbias)   instead, if neither dx nor dresidual is needed
//
// For a frozen layer, which has no packet:
//
//   frozen_apply(x, ...) -> (y, stats)
//   frozen_backward(dy, y?) -> (dx, dresidual)             backward_moments returns the gradients of its parameters
//
// autograd.cc combines them to a layer.
#ifndef HVD_SYNCBN_TORCH_OPERATORS_H_
#define HVD_SYNCBN_TORCH_OPERATORS_H_

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>

#include "hvd_syncbn/cuda.h"
#include "tensors.h"

namespace hvd_syncbn {

// The device of one call of an operator, constructed with its input.
struct Cpu {
  static constexpr at::DeviceType kType = at::kCPU;
  explicit Cpu(const Tensor&) {}
};

struct Meta {
  static constexpr at::DeviceType kType = at::kMeta;
  explicit Meta(const Tensor&) {}
};

// Runs `work` on [0, units) in tasks of at least 64 KiB; dispatching smaller tasks costs more than running them.
template <class Work>
void run(int64_t units, int64_t unit_bytes, const Work& work) {
  at::parallel_for(0, units, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, unit_bytes)), work);
}

inline Tensor coefficients(const Input& in) {
  return at::empty({hvd_syncbn_coefficients_size(&in.shape)}, at::TensorOptions().dtype(at::kByte));
}

// Issues a Python warning, none if the message is empty. TORCH_WARN only prints in operators that libraries register.
inline void warn(const std::string& message) {
  if (message.empty()) return;
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("hvd_syncbn::warn", "").typed<void(const std::string&)>();
  op.call(message);
}

// Applies the coefficients of forward_finish.
inline void apply(const Input& in, const OptionalTensor& residual, bool relu, const Tensor& scratch, const Tensor& y) {
  const OptionalTensor added = like(in, residual);
  void* const out = output_data(y);
  run(hvd_syncbn_apply_units(&in.shape), hvd_syncbn_apply_unit_bytes(&in.shape), [&](int64_t begin, int64_t end) {
    hvd_syncbn_forward_apply(&in.shape, in.tensor.const_data_ptr(), data(added), relu, scratch.const_data_ptr(), begin,
                             end, out);
  });
}

// Applies the coefficients of backward_finish.
inline void apply_backward(const Input& in, const Tensor& dy, const OptionalTensor& y, const Tensor& scratch,
                           const Tensor& dx, const Tensor& dresidual) {
  const Tensor g = like(in, dy);
  const OptionalTensor output = like(in, y);
  void* const dx_out = output_data(dx);
  void* const dresidual_out = dresidual.numel() == dx.numel() ? output_data(dresidual) : nullptr;
  run(hvd_syncbn_apply_units(&in.shape), 2 * hvd_syncbn_apply_unit_bytes(&in.shape), [&](int64_t begin, int64_t end) {
    hvd_syncbn_backward_apply(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(), data(output), nullptr,
                              scratch.const_data_ptr(), begin, end, dx_out, dresidual_out);
  });
}

template <class Device>
Tensor forward_moments(const Tensor& x, double eps, int64_t call) {
  const Device device(x);
  const Input in = input(x);
  Tensor packet = empty_packet(in);
  if constexpr (Device::kType == at::kCPU) {
    int64_t* const words = zeroed(packet);
    run(hvd_syncbn_moments_units(&in.shape), hvd_syncbn_moments_unit_bytes(&in.shape), [&](int64_t begin, int64_t end) {
      hvd_syncbn_forward_moments(&in.shape, in.tensor.const_data_ptr(), nullptr, begin, end, words);
    });
    hvd_syncbn_forward_close(&in.shape, eps, call, in.shape.n * in.shape.s, words);
  } else if constexpr (Device::kType == at::kCUDA) {
    device.check(hvd_syncbn_cuda_forward_moments(&in.shape, in.tensor.const_data_ptr(), nullptr, eps, call,
                                                 packet.mutable_data_ptr<int64_t>(), device.stream()));
  }
  return packet;
}

template <class Device>
std::tuple<Tensor, Tensor> forward_apply(const Tensor& x, const OptionalTensor& packet, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                         const OptionalTensor& batches, double old_weight,
                                         std::optional<double> new_weight, bool unbiased, bool skip_nonfinite,
                                         double eps, bool relu, const std::string& name, bool needs_gradient) {
  check_devices(x,
                {{"packet", packet},
                 {"weight", weight},
                 {"bias", bias},
                 {"residual", residual},
                 {"running_mean", running_mean},
                 {"running_var", running_var}},
                name);
  const Device device(x);
  const Input in = input(x);
  Tensor stats = empty(x, {2, in.channels}, at::kDouble), y = at::empty_like(in.tensor);
  if constexpr (Device::kType != at::kMeta) {
    const int64_t* const words = packet_data(in, packet);
    const hvd_syncbn_vector gamma = vector(in, weight), beta = vector(in, bias);
    const hvd_syncbn_running running =
        to_core(in, {running_mean, running_var, batches, old_weight, new_weight, unbiased, skip_nonfinite});
    double* const moments = stats.mutable_data_ptr<double>();
    if constexpr (Device::kType == at::kCPU) {
      if (words != nullptr) {
        raise_failure(hvd_syncbn_check_packet(HVD_SYNCBN_FORWARD, words), name, " This rank has: ", in.shape.c,
                      " channels, eps ", eps, ", dtype ", x.scalar_type(), ", ", needs_gradient ? "a" : "no",
                      " gradient needed");
        warn(count_nonfinite(name, in.shape.c, words));
      }
      Tensor scratch = coefficients(in);
      hvd_syncbn_forward_finish(&in.shape, eps, words, gamma, beta, running, moments, scratch.mutable_data_ptr());
      apply(in, residual, relu, scratch, y);
    } else {
      const OptionalTensor added = like(in, residual);
      device.check(hvd_syncbn_cuda_forward_apply(&in.shape, eps, in.tensor.const_data_ptr(), data(added), relu, words,
                                                 gamma, beta, running, running.mean, running.var, name.c_str(), moments,
                                                 y.mutable_data_ptr(), device.stream()));
    }
  }
  return {y, stats};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward_moments(const Tensor& x, const Tensor& dy, const OptionalTensor& y,
                                                    const Tensor& stats, at::ScalarType parameter_dtype) {
  check_devices(x, {{"dy", dy}, {"y", y}, {"stats", stats}});
  const Device device(x);
  const Input in = input(x);
  Tensor packet = empty_packet(in);
  Tensor dweight = empty(x, {in.channels}, parameter_dtype), dbias = at::empty_like(dweight);
  if constexpr (Device::kType != at::kMeta) {
    const Tensor g = like(in, dy);
    const OptionalTensor output = like(in, y);
    const double* const moments = stats.const_data_ptr<double>();
    const hvd_syncbn_vector dgamma = vector(in, dweight), dbeta = vector(in, dbias);
    if constexpr (Device::kType == at::kCPU) {
      int64_t* const words = zeroed(packet);
      run(hvd_syncbn_moments_units(&in.shape), 2 * hvd_syncbn_moments_unit_bytes(&in.shape),
          [&](int64_t begin, int64_t end) {
            hvd_syncbn_backward_moments(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(), data(output),
                                        moments, begin, end, words);
          });
      hvd_syncbn_backward_close(&in.shape, moments, in.shape.n * in.shape.s, words);
      hvd_syncbn_backward_params(&in.shape, words, moments, dgamma, dbeta);
    } else {
      device.check(hvd_syncbn_cuda_backward_moments(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(),
                                                    data(output), nullptr, moments, packet.mutable_data_ptr<int64_t>(),
                                                    dgamma, dbeta, device.stream()));
    }
  }
  return {packet, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor> backward_apply(const Tensor& x, const Tensor& dy, const OptionalTensor& y,
                                          const OptionalTensor& packet, const Tensor& stats,
                                          const OptionalTensor& weight, bool want_residual, const std::string& name) {
  check_devices(x, {{"dy", dy}, {"y", y}, {"packet", packet}, {"stats", stats}, {"weight", weight}}, name);
  const Device device(x);
  const Input in = input(x);
  Tensor dx = at::empty_like(in.tensor),
         dresidual = want_residual ? at::empty_like(dx) : empty(x, {0}, x.scalar_type());
  if constexpr (Device::kType != at::kMeta) {
    const int64_t* const words = packet_data(in, packet);
    const double* const moments = stats.const_data_ptr<double>();
    const hvd_syncbn_vector gamma = vector(in, weight);
    if constexpr (Device::kType == at::kCPU) {
      if (words != nullptr) raise_failure(hvd_syncbn_check_packet(HVD_SYNCBN_BACKWARD, words), name);
      Tensor scratch = coefficients(in);
      hvd_syncbn_backward_finish(&in.shape, words, moments, gamma, scratch.mutable_data_ptr());
      apply_backward(in, dy, y, scratch, dx, dresidual);
    } else {
      const Tensor g = like(in, dy);
      const OptionalTensor output = like(in, y);
      device.check(
          hvd_syncbn_cuda_backward_apply(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(), data(output),
                                         nullptr, words, moments, gamma, name.c_str(), dx.mutable_data_ptr(),
                                         want_residual ? dresidual.mutable_data_ptr() : nullptr, device.stream()));
    }
  }
  return {dx, dresidual};
}

// A compiled graph keeps the collective only if results depend on it, so the gradients pass through this operator. They
// are copies, because an operator must not return its arguments.
template <class Device>
std::tuple<Tensor, Tensor> backward_check(const Tensor& packet, const Tensor& dweight, const Tensor& dbias,
                                          const std::string& name) {
  const Device device(packet);
  if constexpr (Device::kType == at::kCPU) {
    raise_failure(hvd_syncbn_check_packet(HVD_SYNCBN_BACKWARD, packet.const_data_ptr<int64_t>()), name);
  } else if constexpr (Device::kType == at::kCUDA) {
    // Without elements the kernel only checks the header. It is launched, because all ranks must launch the same ones.
    const hvd_syncbn_shape nothing = {0, 0, 0, HVD_SYNCBN_FLOAT32, HVD_SYNCBN_CHANNELS_FIRST};
    device.check(hvd_syncbn_cuda_backward_apply(&nothing, nullptr, nullptr, nullptr, nullptr,
                                                packet.const_data_ptr<int64_t>(), nullptr, {nullptr, 0}, name.c_str(),
                                                nullptr, nullptr, device.stream()));
  }
  return {dweight.clone(), dbias.clone()};
}

// For a frozen layer: without a packet, by its running statistics.
template <class Device>
std::tuple<Tensor, Tensor> frozen_apply(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& residual, double eps, bool relu) {
  return forward_apply<Device>(x, std::nullopt, weight, bias, residual, running_mean, running_var, std::nullopt, 0, 0,
                               false, true, eps, relu, "", false);
}

// dx does not depend on x, so dy is passed for it.
template <class Device>
std::tuple<Tensor, Tensor> frozen_backward(const Tensor& dy, const OptionalTensor& y, const Tensor& stats,
                                           const OptionalTensor& weight, bool want_residual) {
  return backward_apply<Device>(dy, dy, y, std::nullopt, stats, weight, want_residual, "");
}

// Registers the operators for tensors of a device.
template <class Device>
void implement(torch::Library& library) {
  library.impl("forward_moments", forward_moments<Device>);
  library.impl("forward_apply", forward_apply<Device>);
  library.impl("backward_moments", backward_moments<Device>);
  library.impl("backward_apply", backward_apply<Device>);
  library.impl("backward_check", backward_check<Device>);
  library.impl("frozen_apply", frozen_apply<Device>);
  library.impl("frozen_backward", frozen_backward<Device>);
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_TORCH_OPERATORS_H_
