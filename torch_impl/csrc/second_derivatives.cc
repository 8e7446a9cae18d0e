// Second derivatives. A backward pass that is itself recorded (create_graph=True) returns what the kernels compute; the
// derivatives of its results come from PyTorch's differentiable operations, in float64, with the sums allreduced. Their
// bits depend on the split of the batch.
#include "second_derivatives.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>
#include <vector>

namespace hvd_syncbn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The sum over the ranks; its gradient is the sum of the ranks' gradients.
class DifferentiableSum : public torch::autograd::Function<DifferentiableSum> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& values, const std::string& name,
                        const std::optional<std::string>& group) {
    ctx->saved_data["name"] = name;
    ctx->saved_data["group"] = group;
    return sum_over_ranks(values.clone(), name, group);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    return {apply(gradients[0].contiguous(), ctx->saved_data["name"].toStringRef() + ".gradient",
                  ctx->saved_data["group"].toOptional<std::string>()),
            Tensor(), Tensor()};
  }
};

// The first derivatives {dx, dweight, dbias, dresidual} as differentiable functions of x, dy and the weight.
variable_list first_derivatives(const Tensor& x, const Tensor& dy, const Tensor& weight, const BackwardPass& pass) {
  std::vector<int64_t> shape(dy.dim(), 1), others;
  shape[1] = dy.size(1);
  for (int64_t d = 0; d < dy.dim(); ++d) {
    if (d != 1) others.push_back(d);
  }
  const auto per_channel = [&](const Tensor& vector) { return vector.reshape(shape); };
  const auto sum = [&](const Tensor& values) { return values.sum(others); };

  Tensor invstd = pass.stats[1], g = dy.to(at::kDouble);
  if (pass.y.defined()) g = g * (pass.y > 0);
  const Tensor dbias = sum(g);
  // A frozen layer keeps no x if no parameter learns.
  if (!x.defined()) return {per_channel(weight.defined() ? weight * invstd : invstd) * g, Tensor(), dbias, g};
  Tensor centered = x.to(at::kDouble) - per_channel(pass.stats[0]), n;
  if (pass.is_synchronized) {
    const int64_t c = dy.size(1), count = c == 0 ? 0 : x.numel() / c;
    const Tensor sums = DifferentiableSum::apply(
        at::cat({sum(centered), sum(centered.square()), at::full({1}, count, centered.options())}),
        pass.name + ".second.statistics", pass.group);
    n = sums.slice(0, 2 * c);
    // Zero but for rounding, as the statistics that were subtracted are exact; what counts is its derivative.
    const Tensor mean = sums.slice(0, 0, c) / n;
    const Tensor var = sums.slice(0, c, 2 * c) / n - mean.square();
    centered = centered - per_channel(mean);
    invstd = (invstd.pow(-2) + (var - var.detach())).rsqrt();
  }
  const Tensor normalized = centered * per_channel(invstd), dweight = sum(g * normalized);
  Tensor dx = g;
  if (pass.is_synchronized) {
    const Tensor sums =
        DifferentiableSum::apply(at::stack({dbias, dweight}), pass.name + ".second.gradients", pass.group);
    dx = g - (per_channel(sums[0]) + normalized * per_channel(sums[1])) / n;
  }
  return {per_channel(weight.defined() ? weight * invstd : invstd) * dx, dweight, dbias, g};
}

// What a backward pass computed, and which of {dx, dweight, dbias, dresidual} that is.
struct Results {
  variable_list tensors;
  std::vector<int64_t> which;
};

// Identity in the results of a backward pass.
class Recorded : public torch::autograd::Function<Recorded> {
 public:
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& x, const Tensor& dy,
                               const OptionalTensor& weight, const Results& results, const BackwardPass& pass) {
    ctx->save_for_backward({x.value_or(Tensor()), dy, weight.value_or(Tensor()), pass.y, pass.stats});
    ctx->saved_data["which"] = results.which;
    ctx->saved_data["name"] = pass.name;
    ctx->saved_data["group"] = pass.group;
    ctx->saved_data["is_synchronized"] = pass.is_synchronized;
    return results.tensors;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const bool is_recorded = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    const variable_list saved = ctx->get_saved_variables();
    const BackwardPass pass{saved[3], saved[4], ctx->saved_data["group"].toOptional<std::string>(),
                            ctx->saved_data["name"].toStringRef(), ctx->saved_data["is_synchronized"].toBool()};
    variable_list given, wanted;
    std::vector<size_t> places;
    size_t tensors = 0;
    for (size_t i = 0; i < 3; ++i) {
      if (!saved[i].defined()) {
        given.emplace_back();
        continue;
      }
      const bool wants = ctx->needs_input_grad(tensors++);
      // An alias, because dy may be a function of x, whose history belongs to the caller.
      given.push_back(is_recorded ? saved[i].alias() : saved[i].detach().set_requires_grad(wants));
      if (wants) {
        wanted.push_back(given[i]);
        places.push_back(i);
      }
    }
    const variable_list all = first_derivatives(given[0], given[1], given[2], pass);
    variable_list results, weights;
    const std::vector<int64_t> which = ctx->saved_data["which"].toIntVector();
    for (size_t k = 0; k < which.size(); ++k) {
      const Tensor& result = all[which[k]];
      if (!result.requires_grad()) continue;
      results.push_back(result);
      weights.push_back(gradients[k].to(at::kDouble));
    }
    variable_list found(5);
    if (results.empty()) return found;
    const variable_list second = torch::autograd::grad(results, wanted, weights, std::nullopt, is_recorded, true);
    for (size_t k = 0; k < places.size(); ++k) found[places[k]] = second[k];
    return found;
  }
};

}  // namespace

void record(const Tensor& x, const Tensor& dy, const Tensor& weight, const BackwardPass& pass,
            variable_list* gradients) {
  Results results;
  for (size_t i = 0; i < 4; ++i) {
    const Tensor& gradient = (*gradients)[i];
    if (!gradient.defined() || gradient.is_same(dy)) continue;  // dy has its own history
    results.tensors.push_back(gradient);
    results.which.push_back(static_cast<int64_t>(i));
  }
  if (results.which.empty()) return;
  const auto optional = [](const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; };
  const variable_list recorded = Recorded::apply(optional(x), dy, optional(weight), results, pass);
  for (size_t k = 0; k < recorded.size(); ++k) (*gradients)[results.which[k]] = recorded[k];
}

}  // namespace hvd_syncbn
