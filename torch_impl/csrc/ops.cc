// PyTorch operators on the core, and their kernels for CPU tensors. They manage tensors, memory and threads; all
// arithmetic is in the core. cuda.cc has the kernels for GPU tensors.
//
//   forward_moments(x) -> packet                          then allreduce_(packet), written in Python
//   forward_apply(x, packet, ...) -> (y, stats)
//   backward_moments(x, dy, y?) -> (packet, dweight, dbias)
//   backward_apply(x, dy, y?, packet) -> (dx, dresidual)
//   backward_check(packet, dweight, dbias) -> (dweight, dbias)   instead, if neither dx nor dresidual is needed
//
// For a frozen layer, which has no packet, on CPUs only:
//
//   frozen_apply(x, ...) -> (y, stats)
//   frozen_backward(dy, y?) -> (dx, dresidual)             backward_moments returns the gradients of its parameters
//
// autograd.cc combines them to a layer. Shape functions are in torch_impl/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "tensors.h"

namespace hvd_syncbn {
namespace {

Tensor empty_output(const Tensor& x) {
  Tensor out = at::empty_like(x);
  hvd_syncbn_prefer_huge_pages(out.mutable_data_ptr(), static_cast<int64_t>(out.nbytes()));
  return out;
}

// Returns the grain size for tasks of at least 64 KiB; dispatching smaller tasks costs more than running them.
int64_t grain(int64_t unit_bytes) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, unit_bytes)); }

Tensor empty_packet(int64_t channels) {
  return at::zeros({hvd_syncbn_packet_size(channels)}, at::TensorOptions().dtype(at::kLong));
}

Tensor coefficients(const hvd_syncbn_shape& shape) {
  return at::empty({hvd_syncbn_coefficients_size(&shape)}, at::TensorOptions().dtype(at::kByte));
}

Tensor forward_moments(const Tensor& x, double eps, int64_t call) {
  const Input in = input(x);
  Tensor packet = empty_packet(in.shape.c);
  int64_t* const words = packet.mutable_data_ptr<int64_t>();
  at::parallel_for(0, hvd_syncbn_moments_units(&in.shape), grain(hvd_syncbn_moments_unit_bytes(&in.shape)),
                   [&](int64_t begin, int64_t end) {
                     hvd_syncbn_forward_moments(&in.shape, in.tensor.const_data_ptr(), nullptr, begin, end, words);
                   });
  hvd_syncbn_forward_close(&in.shape, eps, call, in.shape.n * in.shape.s, words);
  return packet;
}

// Issues a Python warning. TORCH_WARN only prints in operators that libraries register.
void warn(const std::string& message) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("hvd_syncbn::warn", "").typed<void(const std::string&)>();
  op.call(message);
}

// Applies the coefficients of forward_finish.
Tensor apply(const Input& in, const OptionalTensor& residual, bool relu, const Tensor& scratch) {
  const OptionalTensor added = like(in, residual);
  Tensor y = empty_output(in.tensor);
  void* const out = y.mutable_data_ptr();
  at::parallel_for(0, hvd_syncbn_apply_units(&in.shape), grain(hvd_syncbn_apply_unit_bytes(&in.shape)),
                   [&](int64_t begin, int64_t end) {
                     hvd_syncbn_forward_apply(&in.shape, in.tensor.const_data_ptr(), data(added), relu,
                                              scratch.const_data_ptr(), begin, end, out);
                   });
  return y;
}

// Applies the coefficients of backward_finish. `in` may be `dy` if the coefficients do not use x.
std::tuple<Tensor, Tensor> apply_backward(const Input& in, const Tensor& g, const OptionalTensor& output,
                                          bool want_residual, const Tensor& scratch) {
  Tensor dx = empty_output(in.tensor);
  Tensor dresidual = want_residual ? empty_output(in.tensor) : at::empty({0}, in.tensor.options());
  void* const dx_out = dx.mutable_data_ptr();
  void* const dresidual_out = want_residual ? dresidual.mutable_data_ptr() : nullptr;
  at::parallel_for(0, hvd_syncbn_apply_units(&in.shape), grain(2 * hvd_syncbn_apply_unit_bytes(&in.shape)),
                   [&](int64_t begin, int64_t end) {
                     hvd_syncbn_backward_apply(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(), data(output),
                                               nullptr, scratch.const_data_ptr(), begin, end, dx_out, dresidual_out);
                   });
  return {dx, dresidual};
}

std::tuple<Tensor, Tensor> forward_apply(const Tensor& x, const Tensor& packet, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                         const OptionalTensor& batches, double old_weight, double new_weight,
                                         bool unbiased, double eps, bool relu, const std::string& name,
                                         bool needs_gradient) {
  const Input in = input(x);
  check_packet_size(in.shape, packet);
  const int64_t* const words = packet.const_data_ptr<int64_t>();
  raise_failure(hvd_syncbn_check_packet(HVD_SYNCBN_FORWARD, words), name, " This rank has: ", in.shape.c,
                " channels, eps ", eps, ", dtype ", x.scalar_type(), ", ", needs_gradient ? "a" : "no",
                " gradient needed");
  const std::string warning = nonfinite_warning(name, in.shape.c, words);
  if (!warning.empty()) warn(warning);
  const auto [share_of_old, share_of_new] = weights(batches, old_weight, new_weight);
  Tensor stats = at::empty({2, in.shape.c}, at::TensorOptions().dtype(at::kDouble));
  Tensor scratch = coefficients(in.shape);
  hvd_syncbn_forward_finish(&in.shape, eps, words, vector(in.shape, weight), vector(in.shape, bias),
                            vector(in.shape, running_mean), vector(in.shape, running_var), share_of_old, share_of_new,
                            unbiased, stats.mutable_data_ptr<double>(), scratch.mutable_data_ptr());
  return {apply(in, residual, relu, scratch), stats};
}

std::tuple<Tensor, Tensor, Tensor> backward_moments(const Tensor& x, const Tensor& dy, const OptionalTensor& y,
                                                    const Tensor& stats, at::ScalarType parameter_dtype) {
  const Input in = input(x);
  const Tensor g = like(in, dy);
  const OptionalTensor output = like(in, y);
  Tensor packet = empty_packet(in.shape.c);
  int64_t* const words = packet.mutable_data_ptr<int64_t>();
  at::parallel_for(0, hvd_syncbn_moments_units(&in.shape), grain(2 * hvd_syncbn_moments_unit_bytes(&in.shape)),
                   [&](int64_t begin, int64_t end) {
                     hvd_syncbn_backward_moments(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(),
                                                 data(output), stats.const_data_ptr<double>(), begin, end, words);
                   });
  hvd_syncbn_backward_close(&in.shape, stats.const_data_ptr<double>(), in.shape.n * in.shape.s, words);
  const auto options = at::TensorOptions().dtype(parameter_dtype);
  Tensor dweight = at::empty({in.shape.c}, options), dbias = at::empty({in.shape.c}, options);
  hvd_syncbn_backward_params(&in.shape, words, stats.const_data_ptr<double>(), vector(in.shape, dweight),
                             vector(in.shape, dbias));
  return {packet, dweight, dbias};
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& x, const Tensor& dy, const OptionalTensor& y,
                                          const Tensor& packet, const Tensor& stats, const OptionalTensor& weight,
                                          bool want_residual, const std::string& name) {
  const Input in = input(x);
  check_packet_size(in.shape, packet);
  const int64_t* const words = packet.const_data_ptr<int64_t>();
  raise_failure(hvd_syncbn_check_packet(HVD_SYNCBN_BACKWARD, words), name);
  const Tensor g = like(in, dy);
  const OptionalTensor output = like(in, y);
  Tensor scratch = coefficients(in.shape);
  hvd_syncbn_backward_finish(&in.shape, words, stats.const_data_ptr<double>(), vector(in.shape, weight),
                             scratch.mutable_data_ptr());
  return apply_backward(in, g, output, want_residual, scratch);
}

// A compiled graph keeps the collective only if results depend on it, so the gradients pass through this operator. They
// are copies, because an operator must not return its arguments.
std::tuple<Tensor, Tensor> backward_check(const Tensor& packet, const Tensor& dweight, const Tensor& dbias,
                                          const std::string& name) {
  raise_failure(hvd_syncbn_check_packet(HVD_SYNCBN_BACKWARD, packet.const_data_ptr<int64_t>()), name);
  return {dweight.clone(), dbias.clone()};
}

std::tuple<Tensor, Tensor> frozen_apply(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& residual, double eps, bool relu) {
  const Input in = input(x);
  Tensor stats = at::empty({2, in.shape.c}, at::TensorOptions().dtype(at::kDouble));
  Tensor scratch = coefficients(in.shape);
  hvd_syncbn_forward_finish(&in.shape, eps, nullptr, vector(in.shape, weight), vector(in.shape, bias),
                            vector(in.shape, running_mean), vector(in.shape, running_var), 0, 0, false,
                            stats.mutable_data_ptr<double>(), scratch.mutable_data_ptr());
  return {apply(in, residual, relu, scratch), stats};
}

std::tuple<Tensor, Tensor> frozen_backward(const Tensor& dy, const OptionalTensor& y, const Tensor& stats,
                                           const OptionalTensor& weight, bool want_residual) {
  const Input in = input(dy);
  Tensor scratch = coefficients(in.shape);
  hvd_syncbn_backward_finish(&in.shape, nullptr, stats.const_data_ptr<double>(), vector(in.shape, weight),
                             scratch.mutable_data_ptr());
  return apply_backward(in, in.tensor, like(in, y), want_residual, scratch);
}

}  // namespace
}  // namespace hvd_syncbn

TORCH_LIBRARY(hvd_syncbn, m) {
  m.def("forward_moments(Tensor x, float eps, int call=0) -> Tensor");
  m.def(
      "forward_apply(Tensor x, Tensor packet, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? "
      "running_mean, Tensor(b!)? running_var, Tensor? batches, float old_weight, float new_weight, bool unbiased, "
      "float eps, bool relu, str name, bool needs_gradient=False) -> (Tensor y, Tensor stats)");
  m.def(
      "backward_moments(Tensor x, Tensor dy, Tensor? y, Tensor stats, ScalarType parameter_dtype) -> "
      "(Tensor packet, Tensor dweight, Tensor dbias)");
  m.def(
      "backward_apply(Tensor x, Tensor dy, Tensor? y, Tensor packet, Tensor stats, Tensor? weight, "
      "bool want_residual, str name) -> (Tensor dx, Tensor dresidual)");
  m.def("backward_check(Tensor packet, Tensor dweight, Tensor dbias, str name) -> (Tensor, Tensor)");
  m.def(
      "frozen_apply(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, bool relu) -> (Tensor y, Tensor stats)");
  m.def(
      "frozen_backward(Tensor dy, Tensor? y, Tensor stats, Tensor? weight, bool want_residual) -> (Tensor dx, Tensor "
      "dresidual)");
}

TORCH_LIBRARY_IMPL(hvd_syncbn, CPU, m) {
  using namespace hvd_syncbn;
  m.impl("forward_moments", forward_moments);
  m.impl("forward_apply", forward_apply);
  m.impl("backward_moments", backward_moments);
  m.impl("backward_apply", backward_apply);
  m.impl("backward_check", backward_check);
  m.impl("frozen_apply", frozen_apply);
  m.impl("frozen_backward", frozen_backward);
}
