// The layer's ops for both devices: conversion to the core's types, run-time checks, and outputs. Each device
// implements Launch.
#ifndef HVD_SYNCBN_TF_LAYER_OP_H_
#define HVD_SYNCBN_TF_LAYER_OP_H_

#include <cstring>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "hvd_syncbn/core.h"
#include "hvd_syncbn/elastic.h"
#include "hvd_syncbn/nonfinite.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace hvd_syncbn {

using tensorflow::DataType;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using Status = absl::Status;

template <class... Parts>
Status InvalidArgument(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

inline int32_t CoreDtype(DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_FLOAT:
      return HVD_SYNCBN_FLOAT32;
    case tensorflow::DT_DOUBLE:
      return HVD_SYNCBN_FLOAT64;
    case tensorflow::DT_HALF:
      return HVD_SYNCBN_FLOAT16;
    default:
      return HVD_SYNCBN_BFLOAT16;
  }
}

inline hvd_syncbn_vector Vector(const Tensor* tensor) {
  return tensor == nullptr ? hvd_syncbn_vector{nullptr, 0}
                           : hvd_syncbn_vector{tensor->data(), CoreDtype(tensor->dtype())};
}

template <class T>
T* Data(const Tensor* tensor) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor->data());
}

// The base of all kernels: the shape of x and the run-time checks of inputs.
class LayerOp : public OpKernel {
 public:
  explicit LayerOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    std::string data_format;
    int64_t bits = 0;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("data_format", &data_format));
    if (ctx->HasAttr("epsilon_bits")) OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon_bits", &bits));
    layout_ = data_format == "channels_first" ? HVD_SYNCBN_CHANNELS_FIRST : HVD_SYNCBN_CHANNELS_LAST;
    std::memcpy(&epsilon_, &bits, sizeof(epsilon_));
  }

 protected:
  // Returns the core's shape of x.
  Status CoreShape(const Tensor& x, hvd_syncbn_shape* shape) const {
    if (x.dims() < 2) return InvalidArgument("Expected x with at least 2 dims. Received: ", x.shape().DebugString());
    const bool first = layout_ == HVD_SYNCBN_CHANNELS_FIRST;
    int64_t spatial = 1;
    for (int i = first ? 2 : 1; i < (first ? x.dims() : x.dims() - 1); ++i) spatial *= x.dim_size(i);
    *shape = {x.dim_size(0), x.dim_size(first ? 1 : x.dims() - 1), spatial, CoreDtype(x.dtype()), layout_};
    return absl::OkStatus();
  }

  static Status Expect(const char* name, const Tensor& tensor, const TensorShape& expected) {
    if (tensor.shape() == expected) return absl::OkStatus();
    return InvalidArgument("Expected ", name, " of shape ", expected.DebugString(),
                           ". Received: ", tensor.shape().DebugString());
  }

  // Returns a required input.
  static Status Input(OpKernelContext* ctx, const char* name, const TensorShape& expected, const Tensor** tensor) {
    TF_RETURN_IF_ERROR(ctx->input(name, tensor));
    return Expect(name, **tensor, expected);
  }

  // Returns an optional input; null if it is missing.
  static Status OptionalInput(OpKernelContext* ctx, const char* name, const TensorShape& expected,
                              const Tensor** tensor) {
    OpInputList list;
    TF_RETURN_IF_ERROR(ctx->input_list(name, &list));
    *tensor = list.size() == 0 ? nullptr : &list[0];
    return *tensor == nullptr ? absl::OkStatus() : Expect(name, **tensor, expected);
  }

  // Returns the mask of shape [n, spatial...]; null if every position counts.
  static Status Mask(OpKernelContext* ctx, const hvd_syncbn_shape& shape, const uint8_t** mask) {
    OpInputList list;
    TF_RETURN_IF_ERROR(ctx->input_list("mask", &list));
    *mask = list.size() == 0 ? nullptr : Data<const uint8_t>(&list[0]);
    if (list.size() == 0 || list[0].NumElements() == shape.n * shape.s) return absl::OkStatus();
    return InvalidArgument("Expected a mask of ", shape.n * shape.s,
                           " positions. Received: ", list[0].shape().DebugString());
  }

  double epsilon_;  // 0 in ops without it
  int32_t layout_;
};

// In a graph it is unknown whether a call will be differentiated. Horovod matches packets by their names.
constexpr int64_t kCallUnknown = 0;

// Returns the error for the status of a layer's packet; `received` ends the message.
template <class... Parts>
Status Failure(int32_t status, const std::string& layer, const Parts&... received) {
  switch (status) {
    case HVD_SYNCBN_RANKS_DISAGREE:
      return InvalidArgument(
          "the ranks disagree about layer '", layer,
          "': number of channels, epsilon, dtype and hvd-syncbn version have to be the same on every "
          "rank. ",
          received...);
    case HVD_SYNCBN_CALLS_DIFFER:
      return InvalidArgument(
          "the ranks differentiate different calls of layer '", layer,
          "'. If a layer runs several times, every rank must run the backward passes in the same order. ", received...);
    case HVD_SYNCBN_ONE_VALUE:
      return InvalidArgument("Expected more than 1 value per channel when training, over all ranks (layer '", layer,
                             "'). ", received..., ".", one_value_advice());
    default:
      return absl::OkStatus();
  }
}

// Logs a warning unless it is empty. A kernel may run in a graph, where Python cannot warn.
inline void Warn(const std::string& warning) {
  if (!warning.empty()) LOG(WARNING) << "hvd-syncbn: " << warning;
}

// An op with the arrays that it reads and writes: Prepare sets all arrays but x, and Launch runs the device's kernel.
template <class Arrays>
class PreparedOp : public LayerOp {
 public:
  using LayerOp::LayerOp;

  void Compute(OpKernelContext* ctx) override {
    Arrays arrays;
    arrays.x = &ctx->input(0);
    OP_REQUIRES_OK(ctx, CoreShape(*arrays.x, &arrays.shape));
    OP_REQUIRES_OK(ctx, Prepare(ctx, &arrays));
    OP_REQUIRES_OK(ctx, Launch(ctx, arrays));
  }

 protected:
  virtual Status Prepare(OpKernelContext* ctx, Arrays* to) const = 0;
  virtual Status Launch(OpKernelContext* ctx, const Arrays& arrays) const = 0;
};

struct ForwardMomentsArrays {
  hvd_syncbn_shape shape;
  const Tensor* x;
  const uint8_t* mask;
  Tensor* packet;
};

class ForwardMomentsOp : public PreparedOp<ForwardMomentsArrays> {
 public:
  using PreparedOp::PreparedOp;

 protected:
  Status Prepare(OpKernelContext* ctx, ForwardMomentsArrays* to) const override {
    TF_RETURN_IF_ERROR(Mask(ctx, to->shape, &to->mask));
    return ctx->allocate_output(0, {hvd_syncbn_packet_size(to->shape.c)}, &to->packet);
  }
};

struct ForwardApplyArrays {
  hvd_syncbn_shape shape;
  const Tensor *x, *packet, *moving_mean, *moving_variance, *gamma, *beta, *residual;
  hvd_syncbn_running running;
  Tensor *y, *stats, *new_mean, *new_variance;
};

class ForwardApplyOp : public PreparedOp<ForwardApplyArrays> {
 public:
  explicit ForwardApplyOp(OpKernelConstruction* ctx) : PreparedOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer", &layer_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("relu", &relu_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("old_weight", &old_weight_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("new_weight", &new_weight_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("unbiased_variance", &unbiased_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("skip_nonfinite", &skip_nonfinite_));
  }

 protected:
  std::string layer_;
  bool relu_, unbiased_, skip_nonfinite_;
  float old_weight_, new_weight_;

  Status Prepare(OpKernelContext* ctx, ForwardApplyArrays* to) const override {
    const TensorShape per_channel({to->shape.c});
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "packet", {hvd_syncbn_packet_size(to->shape.c)}, &to->packet));
    TF_RETURN_IF_ERROR(Input(ctx, "moving_mean", per_channel, &to->moving_mean));
    TF_RETURN_IF_ERROR(Input(ctx, "moving_variance", per_channel, &to->moving_variance));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "gamma", per_channel, &to->gamma));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "beta", per_channel, &to->beta));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "residual", to->x->shape(), &to->residual));
    const Tensor* batches;
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "batches", TensorShape(), &batches));
    to->running = {Vector(to->moving_mean), Vector(to->moving_variance), old_weight_, new_weight_, unbiased_,
                   skip_nonfinite_};
    if (batches != nullptr) {
      hvd_syncbn_average_weights(old_weight_, *Data<const int64_t>(batches), &to->running.old_weight,
                                 &to->running.new_weight);
    }
    TF_RETURN_IF_ERROR(ctx->allocate_output("y", to->x->shape(), &to->y));
    TF_RETURN_IF_ERROR(ctx->allocate_output("stats", {2, to->shape.c}, &to->stats));
    TF_RETURN_IF_ERROR(ctx->allocate_output("new_moving_mean", per_channel, &to->new_mean));
    return ctx->allocate_output("new_moving_variance", per_channel, &to->new_variance);
  }
};

struct BackwardMomentsArrays {
  hvd_syncbn_shape shape;
  const Tensor *x, *dy, *stats, *y;
  const uint8_t* mask;  // only for the count, because dy of every position is summed
  Tensor *packet, *dgamma, *dbeta;
};

class BackwardMomentsOp : public PreparedOp<BackwardMomentsArrays> {
 public:
  using PreparedOp::PreparedOp;

 protected:
  Status Prepare(OpKernelContext* ctx, BackwardMomentsArrays* to) const override {
    TF_RETURN_IF_ERROR(Input(ctx, "dy", to->x->shape(), &to->dy));
    TF_RETURN_IF_ERROR(Input(ctx, "stats", {2, to->shape.c}, &to->stats));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "y", to->x->shape(), &to->y));
    TF_RETURN_IF_ERROR(Mask(ctx, to->shape, &to->mask));
    TF_RETURN_IF_ERROR(ctx->allocate_output("packet", {hvd_syncbn_packet_size(to->shape.c)}, &to->packet));
    TF_RETURN_IF_ERROR(ctx->allocate_output("dgamma", {to->shape.c}, &to->dgamma));
    return ctx->allocate_output("dbeta", {to->shape.c}, &to->dbeta);
  }
};

struct BackwardApplyArrays {
  hvd_syncbn_shape shape;
  const Tensor *x, *dy, *packet, *stats, *gamma, *y;
  const uint8_t* mask;
  Tensor *dx, *dresidual;
};

class BackwardApplyOp : public PreparedOp<BackwardApplyArrays> {
 public:
  explicit BackwardApplyOp(OpKernelConstruction* ctx) : PreparedOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer", &layer_));
  }

 protected:
  std::string layer_;

  Status Prepare(OpKernelContext* ctx, BackwardApplyArrays* to) const override {
    TF_RETURN_IF_ERROR(Input(ctx, "dy", to->x->shape(), &to->dy));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "packet", {hvd_syncbn_packet_size(to->shape.c)}, &to->packet));
    TF_RETURN_IF_ERROR(Input(ctx, "stats", {2, to->shape.c}, &to->stats));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "gamma", TensorShape({to->shape.c}), &to->gamma));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "y", to->x->shape(), &to->y));
    TF_RETURN_IF_ERROR(Mask(ctx, to->shape, &to->mask));
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, to->x->shape(), &to->dx));
    to->dresidual = nullptr;
    return ctx->num_outputs() > 1 ? ctx->allocate_output(1, to->x->shape(), &to->dresidual) : absl::OkStatus();
  }
};

class KeepOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext*) override {}
};

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_TF_LAYER_OP_H_
