// The operators' schemas, and their registration for CPU and meta tensors; cuda.cc registers them for GPU tensors.
#include "operators.h"

TORCH_LIBRARY(hvd_syncbn, m) {
  m.def("forward_moments(Tensor x, float eps, int call=0) -> Tensor");
  m.def(
      "forward_apply(Tensor x, Tensor? packet, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? "
      "running_mean, Tensor(b!)? running_var, Tensor? batches, float old_weight, float? new_weight, bool unbiased, "
      "bool skip_nonfinite, float eps, bool relu, str name, bool needs_gradient=False) -> (Tensor y, Tensor stats)");
  m.def(
      "backward_moments(Tensor x, Tensor dy, Tensor? y, Tensor stats, ScalarType parameter_dtype) -> "
      "(Tensor packet, Tensor dweight, Tensor dbias)");
  m.def(
      "backward_apply(Tensor x, Tensor dy, Tensor? y, Tensor? packet, Tensor stats, Tensor? weight, "
      "bool want_residual, str name) -> (Tensor dx, Tensor dresidual)");
  m.def("backward_check(Tensor packet, Tensor dweight, Tensor dbias, str name) -> (Tensor, Tensor)");
  m.def(
      "frozen_apply(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, bool relu) -> (Tensor y, Tensor stats)");
  m.def(
      "frozen_backward(Tensor dy, Tensor? y, Tensor stats, Tensor? weight, bool want_residual) -> (Tensor dx, Tensor "
      "dresidual)");
}

TORCH_LIBRARY_IMPL(hvd_syncbn, CPU, m) { hvd_syncbn::implement<hvd_syncbn::Cpu>(m); }
TORCH_LIBRARY_IMPL(hvd_syncbn, Meta, m) { hvd_syncbn::implement<hvd_syncbn::Meta>(m); }
