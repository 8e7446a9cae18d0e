// The layer in training as one operator, and its gradient: the kernels of ops.cc or cuda.cc with the collective between
// them. torch.compile looks through this operator at those it calls.
//
// In C++ because Python takes longer for a call than the kernels of a small layer.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "tensors.h"

namespace hvd_syncbn {

Tensor sum_over_distributed(const Tensor& packet, const std::string& name, const std::string& group);  // distributed.cc

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Everything that is not differentiated.
struct Options {
  OptionalTensor running_mean, running_var;
  OptionalTensor batches;  // before this one
  bool average;            // whether their average has no bias at its start; else by the weights
  double old_weight, new_weight;
  bool unbiased;
  double eps;
  bool relu;
  bool needs_gradient;               // this rank will differentiate: the same on every rank, or an error
  std::optional<std::string> group;  // the ranks that share the batch, as ranks.py knows them; none: this rank is alone
  std::string name;
};

// Returns the packet summed over the ranks of a group, in place or not. The part of a group's key before the colon is
// its engine.
Tensor sum_over_ranks(const Tensor& packet, const std::string& layer, const std::optional<std::string>& group) {
  static const auto horovod =
      find_operator<void(const Tensor&, const std::string&, const std::string&)>("hvd_syncbn::allreduce_");
  if (!group.has_value()) return packet;
  const std::string name = "hvd_syncbn." + layer;
  if (group->rfind("distributed:", 0) == 0) return sum_over_distributed(packet, name, *group);
  horovod.call(packet, name, *group);
  return packet;
}

// Inside a transform of torch.func a gradient would have to be a function of Python's.
void check_no_transform(const std::string& name) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK(false,
                "hvd-syncbn: torch.func (grad, vmap, jvp, ...) does not go through synchronized batch normalization in "
                "training. Differentiate with torch.autograd, or call .eval() on layer '",
                name, "' first");
  }
}

// Identity in value; differentiating it raises.
Tensor not_differentiable(const Tensor& gradient) {
  if (!gradient.defined()) return gradient;
  Tensor input = gradient.detach();
  input.set_requires_grad(true);
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      "hvd-syncbn: synchronized batch normalization cannot be differentiated twice", 1);
  return (*error)({std::move(input)})[0];
}

// Saved: x, the per-channel float64 stats, and with relu the output.
class SyncBatchNorm : public torch::autograd::Function<SyncBatchNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const Options& options) {
    static const auto moments = find_operator<ForwardMoments>("hvd_syncbn::forward_moments");
    static const auto apply = find_operator<ForwardApply>("hvd_syncbn::forward_apply");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor packet = sum_over_ranks(
        moments.call(x, options.eps, hvd_syncbn_call_number(options.name.c_str(), options.needs_gradient)),
        options.name + ".forward", options.group);
    auto [y, stats] =
        apply.call(x, packet, weight, bias, residual, options.running_mean, options.running_var,
                   options.average ? options.batches : std::nullopt, options.old_weight, options.new_weight,
                   options.unbiased, options.eps, options.relu, options.name, options.needs_gradient);
    // Together with the statistics: what comes next may raise, as checkpointing does to stop early.
    if (options.batches.has_value()) options.batches->add_(1);
    ctx->save_for_backward({x, weight.value_or(Tensor()), stats, options.relu ? y : Tensor()});
    ctx->saved_data["bias_dtype"] = bias.has_value() ? std::optional(bias->scalar_type()) : std::nullopt;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["group"] = options.group;
    ctx->saved_data["name"] = options.name;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    variable_list gradients;
    {
      const at::AutoGradMode once(false);
      gradients = differentiate(ctx, dy[0]);
    }
    if (at::GradMode::is_enabled()) {
      for (Tensor& gradient : gradients) gradient = not_differentiable(gradient);
    }
    return gradients;
  }

 private:
  static variable_list differentiate(AutogradContext* ctx, const Tensor& dy) {
    static const auto moments = find_operator<BackwardMoments>("hvd_syncbn::backward_moments");
    static const auto apply = find_operator<BackwardApply>("hvd_syncbn::backward_apply");
    static const auto check = find_operator<BackwardCheck>("hvd_syncbn::backward_check");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &stats = saved[2], &y = saved[3];
    const auto bias_dtype = ctx->saved_data["bias_dtype"].toOptional<at::ScalarType>();
    const std::string& name = ctx->saved_data["name"].toStringRef();
    // needs_input_grad counts the tensors that there are.
    size_t tensors = 0;
    const auto wanted = [&](bool exists) { return exists && ctx->needs_input_grad(tensors++); };
    const bool want_x = wanted(true), want_weight = wanted(weight.defined()),
               want_bias = wanted(bias_dtype.has_value());
    const bool want_residual = wanted(ctx->saved_data["has_residual"].toBool());
    // Without an activation the residual's gradient is dy itself, but one result has to come from the packet: a
    // compiled graph leaves out the collective otherwise.
    const bool masks_residual = want_residual && (y.defined() || !(want_x || want_weight || want_bias));

    auto [packet, dweight, dbias] = moments.call(x, dy, y, stats, weight.defined() ? weight.scalar_type() : at::kFloat);
    // Whatever is wanted here: another rank may need the packet.
    packet = sum_over_ranks(packet, name + ".backward", ctx->saved_data["group"].toOptional<std::string>());
    Tensor dx, dresidual;
    if (want_x || masks_residual) {
      std::tie(dx, dresidual) = apply.call(x, dy, y, packet, stats, weight, masks_residual, name);
    } else {
      std::tie(dweight, dbias) = check.call(packet, dweight, dbias, name);
    }
    if (!masks_residual) dresidual = dy;
    return {want_x ? dx : Tensor(), want_weight ? dweight : Tensor(), want_bias ? dbias.to(*bias_dtype) : Tensor(),
            want_residual ? dresidual : Tensor(), Tensor()};
  }
};

// Saved: the per-channel float64 stats, with relu the output, and x only where a parameter learns.
class FrozenBatchNorm : public torch::autograd::Function<FrozenBatchNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const Tensor& running_mean, const Tensor& running_var,
                        double eps, bool relu) {
    static const auto apply = find_operator<FrozenApply>("hvd_syncbn::frozen_apply");
    const auto learns = [](const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); };
    const bool keeps_x = learns(weight) || learns(bias);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, stats] = apply.call(x, running_mean, running_var, weight, bias, residual, eps, relu);
    ctx->save_for_backward({keeps_x ? x : Tensor(), weight.value_or(Tensor()), stats, relu ? y : Tensor()});
    ctx->saved_data["bias_dtype"] = bias.has_value() ? std::optional(bias->scalar_type()) : std::nullopt;
    ctx->saved_data["has_residual"] = residual.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    variable_list gradients;
    {
      const at::AutoGradMode once(false);
      gradients = differentiate(ctx, dy[0]);
    }
    if (at::GradMode::is_enabled()) {
      for (Tensor& gradient : gradients) gradient = not_differentiable(gradient);
    }
    return gradients;
  }

 private:
  static variable_list differentiate(AutogradContext* ctx, const Tensor& dy) {
    static const auto moments = find_operator<BackwardMoments>("hvd_syncbn::backward_moments");
    static const auto apply = find_operator<FrozenBackward>("hvd_syncbn::frozen_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &stats = saved[2], &y = saved[3];
    const auto bias_dtype = ctx->saved_data["bias_dtype"].toOptional<at::ScalarType>();
    // needs_input_grad counts the tensors that there are.
    size_t tensors = 0;
    const auto wanted = [&](bool exists) { return exists && ctx->needs_input_grad(tensors++); };
    const bool want_x = wanted(true), want_weight = wanted(weight.defined()),
               want_bias = wanted(bias_dtype.has_value());
    const bool want_residual = wanted(ctx->saved_data["has_residual"].toBool());
    const bool masks_residual = want_residual && y.defined();

    Tensor dweight, dbias, dx, dresidual;
    if (want_weight || want_bias) {
      Tensor packet;  // this rank's alone, and only for its parameters' gradients
      std::tie(packet, dweight, dbias) =
          moments.call(x, dy, y, stats, weight.defined() ? weight.scalar_type() : at::kFloat);
    }
    if (want_x || masks_residual) std::tie(dx, dresidual) = apply.call(dy, y, stats, weight, masks_residual);
    if (!masks_residual) dresidual = dy;
    return {want_x ? dx : Tensor(),
            want_weight ? dweight : Tensor(),
            want_bias ? dbias.to(*bias_dtype) : Tensor(),
            want_residual ? dresidual : Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor frozen_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const Tensor& running_mean, const Tensor& running_var,
                         double eps, bool relu) {
  const OptionalTensor mean = running_mean, var = running_var;
  check_devices(
      x,
      {{"weight", &weight}, {"bias", &bias}, {"residual", &residual}, {"running_mean", &mean}, {"running_var", &var}},
      "");
  return FrozenBatchNorm::apply(x, weight, bias, residual, running_mean, running_var, eps, relu);
}

Tensor sync_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& batches,
                       std::optional<double> old_weight, std::optional<double> new_weight, bool unbiased, double eps,
                       bool relu, std::optional<std::string> group, const std::string& name) {
  check_no_transform(name);
  check_devices(x,
                {{"weight", &weight},
                 {"bias", &bias},
                 {"residual", &residual},
                 {"running_mean", &running_mean},
                 {"running_var", &running_var},
                 {"num_batches_tracked", &batches}},
                name);
  const bool average = !new_weight.has_value();
  TORCH_CHECK_VALUE(old_weight.has_value() && (!average || batches.has_value()),
                    "expected two weights, or that of the old statistics and the number of batches");
  const auto differentiated = [](const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->requires_grad();
  };
  const bool needs_gradient = at::GradMode::is_enabled() && (x.requires_grad() || differentiated(weight) ||
                                                             differentiated(bias) || differentiated(residual));
  const Options options{running_mean, running_var, batches, average,        *old_weight, new_weight.value_or(0),
                        unbiased,     eps,         relu,    needs_gradient, group,       name};
  return SyncBatchNorm::apply(x, weight, bias, residual, options);
}

}  // namespace
}  // namespace hvd_syncbn

// vmap asks for a rule before it calls an operator.
TORCH_LIBRARY_IMPL(hvd_syncbn, FuncTorchBatched, m) { m.impl("sync_batch_norm", hvd_syncbn::sync_batch_norm); }

TORCH_LIBRARY_FRAGMENT(hvd_syncbn, m) {
  m.def(
      "sync_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float? old_weight, float? new_weight, bool unbiased, "
      "float eps, bool relu, str? group, str name) -> Tensor",
      hvd_syncbn::sync_batch_norm);
  m.def(
      "frozen_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor "
      "running_var, float eps, bool relu) -> Tensor",
      hvd_syncbn::frozen_batch_norm);
}
