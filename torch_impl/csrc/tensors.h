// Conversion of tensors to the core's types, for the kernels of both devices.
#ifndef HVD_SYNCBN_TORCH_TENSORS_H_
#define HVD_SYNCBN_TORCH_TENSORS_H_

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "hvd_syncbn/core.h"
#include "hvd_syncbn/elastic.h"
#include "hvd_syncbn/nonfinite.h"

namespace hvd_syncbn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int32_t dtype_code(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return HVD_SYNCBN_FLOAT32;
    case at::kDouble:
      return HVD_SYNCBN_FLOAT64;
    case at::kHalf:
      return HVD_SYNCBN_FLOAT16;
    case at::kBFloat16:
      return HVD_SYNCBN_BFLOAT16;
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float64, float16 or bfloat16. Received: ", type);
  }
}

// Returns whether memory holds [n, spatial..., c]. Faster than `movedim(1, -1).is_contiguous()`, which takes
// microseconds.
inline bool is_channels_last(const Tensor& x) {
  c10::SymInt expected = 1;
  const int64_t last = x.dim() - 1;
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t d = i == 0 ? 1 : i == last ? 0 : last + 1 - i;  // 1, then the spatial ones from the last, then 0
    if (x.sym_size(d) == 1) continue;
    if (x.sym_stride(d) != expected) return x.sym_numel() == 0;
    expected *= x.sym_size(d);
  }
  return true;
}

// An input in one of the core's two layouts; copied only if it is in neither.
struct Input {
  Tensor tensor;
  c10::SymInt channels;
  hvd_syncbn_shape shape;  // not set where sizes are symbols, which only shape functions see
};

inline Input input(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, "expected an input of at least 2 dimensions. Received: ", x.dim());
  const bool first = x.is_contiguous(), last = !first && is_channels_last(x);
  Input in = {first || last ? x : x.contiguous(), x.sym_size(1), {}};
  if (x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return in;
  in.shape = {x.size(0), x.size(1), 1, dtype_code(x.scalar_type()),
              last ? HVD_SYNCBN_CHANNELS_LAST : HVD_SYNCBN_CHANNELS_FIRST};
  for (int64_t d = 2; d < x.dim(); ++d) in.shape.s *= x.size(d);
  return in;
}

// Returns another tensor of x's shape in x's layout.
inline Tensor like(const Input& x, const Tensor& other) {
  if (x.shape.layout == HVD_SYNCBN_CHANNELS_FIRST) return other.contiguous();
  return is_channels_last(other) ? other : other.movedim(1, -1).contiguous().movedim(-1, 1);
}

inline OptionalTensor like(const Input& x, const OptionalTensor& other) {
  return other.has_value() && other->defined() ? OptionalTensor(like(x, *other)) : std::nullopt;
}

inline hvd_syncbn_vector vector(const Input& in, const OptionalTensor& tensor) {
  if (!tensor.has_value() || !tensor->defined()) return {nullptr, 0};
  TORCH_CHECK_VALUE(tensor->numel() == in.shape.c && tensor->is_contiguous(), "expected a contiguous vector of ",
                    in.shape.c, " channels. Received: ", tensor->sizes());
  return {tensor->data_ptr(), dtype_code(tensor->scalar_type())};
}

// Running statistics, and how a batch changes them, as hvd_syncbn_running. Without new_weight, the weights are those of
// a zero-debiased average over `batches`, the number of batches before this one.
struct Running {
  OptionalTensor mean, var, batches;
  double old_weight;
  std::optional<double> new_weight;
  bool unbiased;
  bool skip_nonfinite = true;
};

inline hvd_syncbn_running to_core(const Input& in, const Running& running) {
  hvd_syncbn_running core = {vector(in, running.mean),       vector(in, running.var), running.old_weight,
                             running.new_weight.value_or(0), running.unbiased,        running.skip_nonfinite};
  if (!running.new_weight.has_value()) {
    hvd_syncbn_average_weights(running.old_weight, running.batches->item<int64_t>(), &core.old_weight,
                               &core.new_weight);
  }
  return core;
}

// A tensor with the name that errors use for it.
struct Labeled {
  const char* label;
  const Tensor* tensor;
  Labeled(const char* label, const Tensor& tensor) : label(label), tensor(&tensor) {}
  Labeled(const char* label, const OptionalTensor& tensor)
      : label(label), tensor(tensor.has_value() ? &*tensor : nullptr) {}
};

// Raises if a layer's tensors are on more than one device: a meta tensor among CPU tensors would select the shape
// functions, whose results are uninitialized memory.
inline void check_devices(const Tensor& x, std::initializer_list<Labeled> others, const std::string& layer = "") {
  const c10::Device device = x.device();
  std::string received;
  for (const auto& [label, tensor] : others) {
    if (tensor != nullptr && tensor->defined() && tensor->device() != device) {
      received += std::string(", ") + label + " on " + tensor->device().str();
    }
  }
  TORCH_CHECK_VALUE(
      received.empty(), "expected all tensors of ", layer.empty() ? "a layer" : "layer '" + layer + "'",
      " on one device. Received: input on ", device, received,
      ". Move them with .to(device); from meta, call .to_empty(device=...) on the layer and load its state.");
}

inline const void* data(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->const_data_ptr() : nullptr;
}

// Returns a tensor of these sizes on x's device.
inline Tensor empty(const Tensor& x, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, x.options().dtype(dtype));
}

// The size of a packet is linear in the number of channels, which may be a symbol.
inline Tensor empty_packet(const Input& in) {
  const int64_t header = hvd_syncbn_packet_size(0), channel = hvd_syncbn_packet_size(1) - header;
  return empty(in.tensor, {in.channels * channel + header}, at::kLong);
}

inline int64_t* zeroed(const Tensor& packet) {
  return static_cast<int64_t*>(std::memset(packet.mutable_data_ptr(), 0, packet.nbytes()));
}

// Returns the words of a packet, or null.
inline const int64_t* packet_data(const Input& in, const OptionalTensor& packet) {
  if (!packet.has_value()) return nullptr;
  TORCH_CHECK_VALUE(packet->numel() == hvd_syncbn_packet_size(in.shape.c), "expected a packet of ", in.shape.c,
                    " channels. Received: ", packet->numel(), " words");
  return packet->const_data_ptr<int64_t>();
}

// Returns the memory of a large output.
inline void* output_data(const Tensor& output) {
  void* const memory = output.mutable_data_ptr();
  hvd_syncbn_prefer_huge_pages(memory, static_cast<int64_t>(output.nbytes()));
  return memory;
}

// Raises the error for the status of a packet; `detail` ends the message.
template <typename... Detail>
void raise_failure(int32_t status, const std::string& layer, const Detail&... detail) {
  TORCH_CHECK_VALUE(status != HVD_SYNCBN_RANKS_DISAGREE, "the ranks disagree about layer '", layer,
                    "': number of channels, eps, dtype, hvd-syncbn version, and whether a gradient is needed "
                    "(requires_grad of the input and the parameters, torch.no_grad) have to be the same on every rank.",
                    detail...);
  TORCH_CHECK_VALUE(status != HVD_SYNCBN_CALLS_DIFFER, "the ranks differentiate different calls of layer '", layer,
                    "'. If a layer runs several times, every rank must run the backward passes in the same order.",
                    detail...);
  TORCH_CHECK_VALUE(status != HVD_SYNCBN_ONE_VALUE,
                    "Expected more than 1 value per channel when training, got 1 over all ranks in layer '", layer,
                    "'.", one_value_advice());
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_TORCH_TENSORS_H_
