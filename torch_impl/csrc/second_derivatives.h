// Second derivatives of the layers in autograd.cc.
#ifndef HVD_SYNCBN_TORCH_SECOND_DERIVATIVES_H_
#define HVD_SYNCBN_TORCH_SECOND_DERIVATIVES_H_

#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <string>

#include "tensors.h"

namespace hvd_syncbn {

// What a backward pass had besides x, dy and the weight.
struct BackwardPass {
  Tensor y;      // the output, if the activation is relu
  Tensor stats;  // mean and 1 / standard deviation, float64
  std::optional<std::string> group;
  std::string name;
  bool is_synchronized;  // the statistics are functions of x; else constants
};

// Makes the results {dx, dweight, dbias, dresidual} of a backward pass differentiable.
void record(const Tensor& x, const Tensor& dy, const Tensor& weight, const BackwardPass& pass,
            torch::autograd::variable_list* gradients);

// Returns the sum of a tensor over the ranks of a group, in place or not.
Tensor sum_over_ranks(const Tensor& packet, const std::string& name, const std::optional<std::string>& group);

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_TORCH_SECOND_DERIVATIVES_H_
