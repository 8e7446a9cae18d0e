// The layer in training as one operator, and its gradient: the operators of operators.h with the collective between
// them. torch.compile looks through this operator at those it calls.
//
// In C++ because Python takes longer for a call than the kernels of a small layer.
#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "operators.h"
#include "second_derivatives.h"

namespace hvd_syncbn {

Tensor sum_over_distributed(const Tensor& packet, const std::string& name, const std::string& group);  // distributed.cc

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

// The part of a group's key before the colon is its engine.
Tensor sum_over_ranks(const Tensor& packet, const std::string& name, const std::optional<std::string>& group) {
  static const auto horovod =
      find_operator<void(const Tensor&, const std::string&, const std::string&)>("hvd_syncbn::allreduce_");
  if (!group.has_value()) return packet;
  const std::string collective = "hvd_syncbn." + name;
  if (group->rfind("distributed:", 0) == 0) return sum_over_distributed(packet, collective, *group);
  horovod.call(packet, collective, *group);
  return packet;
}

namespace {

// Everything that is not differentiated.
struct Options {
  Running running;
  double eps;
  bool relu;
  bool needs_gradient;               // this rank will differentiate: the same on every rank, or an error
  std::optional<std::string> group;  // the ranks that share the batch, as ranks.py knows them; none: this rank is alone
  std::string name;
  OptionalTensor total;   // to which the reduced packet is added
  OptionalTensor packet;  // the reduced packet, if the ranks have summed it before
};

bool requires_grad(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

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

// Returns the packet of the batch of all ranks.
Tensor reduced_packet(const Tensor& x, double eps, const std::optional<std::string>& group, const std::string& name,
                      bool needs_gradient) {
  static const auto moments = find_operator<decltype(forward_moments<Cpu>)>("hvd_syncbn::forward_moments");
  check_no_transform(name);
  return sum_over_ranks(moments.call(x, eps, hvd_syncbn_call_number(name.c_str(), needs_gradient)), name + ".forward",
                        group);
}

// What a backward pass reads, and which gradients it returns.
struct Saved {
  Tensor x, weight, stats, y;  // y with relu only
  std::string name;
  std::optional<std::string> group;
  bool want_x, want_weight, want_bias, want_residual;
};

// Those that are not wanted may be undefined. An undefined dresidual is dy: without an activation they are equal.
struct Gradients {
  Tensor dx, dweight, dbias, dresidual;
};

std::tuple<Tensor, Tensor, Tensor> gradient_moments(const Saved& saved, const Tensor& dy) {
  static const auto moments = find_operator<decltype(backward_moments<Cpu>)>("hvd_syncbn::backward_moments");
  const at::ScalarType parameter_dtype = saved.weight.defined() ? saved.weight.scalar_type() : at::kFloat;
  return moments.call(saved.x, dy, saved.y, saved.stats, parameter_dtype);
}

// The part that both layers share. A layer has `kIsSynchronized`, `forward_and_stats`, `saves_x` and `differentiate`.
template <class Layer>
class BatchNorm : public torch::autograd::Function<Layer> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const Options& options) {
    const bool saves_x = Layer::saves_x(weight, bias);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, stats] = Layer::forward_and_stats(x, weight, bias, residual, options);
    ctx->save_for_backward({saves_x ? x : Tensor(), weight.value_or(Tensor()), stats, options.relu ? y : Tensor()});
    ctx->saved_data["bias_dtype"] = bias.has_value() ? std::optional(bias->scalar_type()) : std::nullopt;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["group"] = options.group;
    ctx->saved_data["name"] = options.name;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const variable_list tensors = ctx->get_saved_variables();
    const Tensor &x = tensors[0], &weight = tensors[1], &stats = tensors[2], &y = tensors[3];
    const auto group = ctx->saved_data["group"].toOptional<std::string>();
    const std::string& name = ctx->saved_data["name"].toStringRef();
    const auto bias_dtype = ctx->saved_data["bias_dtype"].toOptional<at::ScalarType>();
    // needs_input_grad counts the tensors that there are.
    size_t input = 0;
    const auto wanted = [&](bool exists) { return exists && ctx->needs_input_grad(input++); };
    const Saved saved = {x,
                         weight,
                         stats,
                         y,
                         name,
                         group,
                         wanted(true),
                         wanted(weight.defined()),
                         wanted(bias_dtype.has_value()),
                         wanted(ctx->saved_data["has_residual"].toBool())};
    variable_list results;
    {
      const at::AutoGradMode once(false);
      const Gradients gradients = Layer::differentiate(saved, dy[0]);
      results = {saved.want_x ? gradients.dx : Tensor(), saved.want_weight ? gradients.dweight : Tensor(),
                 saved.want_bias ? gradients.dbias.to(*bias_dtype) : Tensor(),
                 !saved.want_residual            ? Tensor()
                 : gradients.dresidual.defined() ? gradients.dresidual
                                                 : dy[0],
                 Tensor()};
    }
    if (at::GradMode::is_enabled()) {
      record(x, dy[0], weight, {y, stats, group, name, Layer::kIsSynchronized}, &results);
    }
    return results;
  }
};

class SyncBatchNorm : public BatchNorm<SyncBatchNorm> {
 public:
  static constexpr bool kIsSynchronized = true;

  static bool saves_x(const OptionalTensor&, const OptionalTensor&) { return true; }

  static std::tuple<Tensor, Tensor> forward_and_stats(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      const Options& options) {
    static const auto apply = find_operator<decltype(forward_apply<Cpu>)>("hvd_syncbn::forward_apply");
    const Tensor packet = options.packet.has_value()
                              ? *options.packet
                              : reduced_packet(x, options.eps, options.group, options.name, options.needs_gradient);
    const Running& running = options.running;
    auto result = apply.call(x, packet, weight, bias, residual, running.mean, running.var, running.batches,
                             running.old_weight, running.new_weight, running.unbiased, running.skip_nonfinite,
                             options.eps, options.relu, options.name, options.needs_gradient);
    // Together with the statistics: what comes next may raise, as checkpointing does to stop early.
    if (running.batches.has_value()) running.batches->add_(1);
    if (options.total.has_value()) options.total->add_(packet);
    return result;
  }

  static Gradients differentiate(const Saved& saved, const Tensor& dy) {
    static const auto apply = find_operator<decltype(backward_apply<Cpu>)>("hvd_syncbn::backward_apply");
    static const auto check = find_operator<decltype(backward_check<Cpu>)>("hvd_syncbn::backward_check");
    // One result has to come from the packet: a compiled graph leaves out the collective otherwise.
    const bool only_residual = !(saved.want_x || saved.want_weight || saved.want_bias);
    const bool masks_residual = saved.want_residual && (saved.y.defined() || only_residual);
    auto [packet, dweight, dbias] = gradient_moments(saved, dy);
    // Whatever is wanted here: another rank may need the packet.
    packet = sum_over_ranks(packet, saved.name + ".backward", saved.group);
    Tensor dx, dresidual;
    if (saved.want_x || masks_residual) {
      std::tie(dx, dresidual) =
          apply.call(saved.x, dy, saved.y, packet, saved.stats, saved.weight, masks_residual, saved.name);
    } else {
      std::tie(dweight, dbias) = check.call(packet, dweight, dbias, saved.name);
    }
    return {dx, dweight, dbias, masks_residual ? dresidual : Tensor()};
  }
};

class FrozenBatchNorm : public BatchNorm<FrozenBatchNorm> {
 public:
  static constexpr bool kIsSynchronized = false;

  // Only the gradients of parameters need x.
  static bool saves_x(const OptionalTensor& weight, const OptionalTensor& bias) {
    return requires_grad(weight) || requires_grad(bias);
  }

  static std::tuple<Tensor, Tensor> forward_and_stats(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      const Options& options) {
    static const auto apply = find_operator<decltype(frozen_apply<Cpu>)>("hvd_syncbn::frozen_apply");
    return apply.call(x, *options.running.mean, *options.running.var, weight, bias, residual, options.eps,
                      options.relu);
  }

  static Gradients differentiate(const Saved& saved, const Tensor& dy) {
    static const auto apply = find_operator<decltype(frozen_backward<Cpu>)>("hvd_syncbn::frozen_backward");
    const bool masks_residual = saved.want_residual && saved.y.defined();
    Tensor packet, dweight, dbias, dx, dresidual;  // a packet of this rank alone
    if (saved.want_weight || saved.want_bias) std::tie(packet, dweight, dbias) = gradient_moments(saved, dy);
    if (saved.want_x || masks_residual) {
      std::tie(dx, dresidual) = apply.call(dy, saved.y, saved.stats, saved.weight, masks_residual);
    }
    return {dx, dweight, dbias, masks_residual ? dresidual : Tensor()};
  }
};

Tensor frozen_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const Tensor& running_mean, const Tensor& running_var,
                         double eps, bool relu) {
  check_devices(x, {{"weight", weight},
                    {"bias", bias},
                    {"residual", residual},
                    {"running_mean", running_mean},
                    {"running_var", running_var}});
  const Options options{{running_mean, running_var, std::nullopt, 0, 0, false}, eps, relu, false, std::nullopt, ""};
  return FrozenBatchNorm::apply(x, weight, bias, residual, options);
}

Tensor sync_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& batches, double old_weight,
                       std::optional<double> new_weight, bool unbiased, bool skip_nonfinite, double eps, bool relu,
                       std::optional<std::string> group, const std::string& name, const OptionalTensor& total,
                       const OptionalTensor& packet) {
  check_no_transform(name);
  check_devices(x,
                {{"weight", weight},
                 {"bias", bias},
                 {"residual", residual},
                 {"running_mean", running_mean},
                 {"running_var", running_var},
                 {"num_batches_tracked", batches},
                 {"total", total},
                 {"packet", packet}},
                name);
  TORCH_CHECK_VALUE(new_weight.has_value() || batches.has_value(),
                    "expected two weights, or that of the old statistics and the number of batches");
  const bool needs_gradient = at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(weight) ||
                                                             requires_grad(bias) || requires_grad(residual));
  const Running running{running_mean, running_var, batches, old_weight, new_weight, unbiased, skip_nonfinite};
  const Options options{running, eps, relu, needs_gradient, group, name, total, packet};
  return SyncBatchNorm::apply(x, weight, bias, residual, options);
}

}  // namespace
}  // namespace hvd_syncbn

// vmap asks for a rule before it calls an operator.
TORCH_LIBRARY_IMPL(hvd_syncbn, FuncTorchBatched, m) {
  m.impl("sync_batch_norm", hvd_syncbn::sync_batch_norm);
  m.impl("reduced_packet", hvd_syncbn::reduced_packet);
}

TORCH_LIBRARY_FRAGMENT(hvd_syncbn, m) {
  m.def(
      "sync_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float old_weight, float? new_weight, bool unbiased, "
      "bool skip_nonfinite, float eps, bool relu, str? group, str name, Tensor(d!)? total=None, Tensor? packet=None) "
      "-> Tensor",
      hvd_syncbn::sync_batch_norm);
  m.def("reduced_packet(Tensor x, float eps, str? group, str name, bool needs_gradient) -> Tensor",
        hvd_syncbn::reduced_packet);
  m.def(
      "frozen_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor "
      "running_var, float eps, bool relu) -> Tensor",
      hvd_syncbn::frozen_batch_norm);
}
