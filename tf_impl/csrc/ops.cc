// The layer's four ops: one before and one after the collective, in each direction.
//
//   HvdSyncbnForwardMoments  -> [allreduce] -> HvdSyncbnForwardApply
//   HvdSyncbnBackwardMoments -> [allreduce] -> HvdSyncbnBackwardApply
//
// This file manages tensors, memory, threads and errors; all arithmetic is in the core (hvd_syncbn/core.h). No kernel
// waits for another rank; only Horovod's asynchronous op does.
//
// TensorFlow has no optional inputs, so a list of at most one tensor is used. epsilon is passed as the bits of a
// float64, because a "float" attribute would round it.
//
// The graph optimizer of one rank must not remove a collective that other ranks run (for example if it folds an empty
// batch to a constant). The moment ops therefore have an `unknown` input against folding and merging, and HvdSyncbnKeep
// prevents pruning. If the ops themselves were stateful, TensorFlow would run them one after another, and the branches
// of a graph would wait for each other's collectives.
#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

#include "layer_op.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

namespace hvd_syncbn {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// ---- Registration

#define HVD_SYNCBN_COMMON_ATTRS \
  Attr("T: {half, bfloat16, float, double}").Attr("data_format: {'channels_first', 'channels_last'}")

Status Channels(InferenceContext* c, DimensionHandle* channels) {
  std::string data_format;
  TF_RETURN_IF_ERROR(c->GetAttr("data_format", &data_format));
  ShapeHandle x;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 2, &x));
  *channels = c->RankKnown(x) ? c->Dim(x, data_format == "channels_first" ? 1 : -1) : c->UnknownDim();
  return absl::OkStatus();
}

Status Packet(InferenceContext* c, ShapeHandle* packet) {
  DimensionHandle channels;
  TF_RETURN_IF_ERROR(Channels(c, &channels));
  *packet =
      c->Vector(c->ValueKnown(channels) ? c->MakeDim(hvd_syncbn_packet_size(c->Value(channels))) : c->UnknownDim());
  return absl::OkStatus();
}

REGISTER_OP("HvdSyncbnForwardMoments")
    .HVD_SYNCBN_COMMON_ATTRS.Attr("epsilon_bits: int")
    .Attr("masks: int >= 0")
    .Attr("unknowns: int >= 0")
    .Input("x: T")
    .Input("mask: masks * bool")
    .Input("unknown: unknowns * int32")
    .Output("packet: int64")
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle packet;
      TF_RETURN_IF_ERROR(Packet(c, &packet));
      c->set_output(0, packet);
      return absl::OkStatus();
    });

// Without `packet`, for a frozen layer: by the moving statistics, and gamma and beta have gradients only if it
// `learns`. `mask` is used by the gradient. With `batches`, the number of earlier batches, the weights are those of a
// zero-debiased average, and new_weight is ignored. `stats` is float64: mean and 1 / standard deviation of each
// channel.
REGISTER_OP("HvdSyncbnForwardApply")
    .HVD_SYNCBN_COMMON_ATTRS.Attr("epsilon_bits: int")
    .Attr("U: {half, bfloat16, float, double}")
    .Attr("packets: int >= 0")
    .Attr("gammas: int >= 0")
    .Attr("betas: int >= 0")
    .Attr("residuals: int >= 0")
    .Attr("masks: int >= 0")
    .Attr("counts: int >= 0")
    .Attr("relu: bool")
    .Attr("learns: bool = true")
    .Attr("old_weight: float")
    .Attr("new_weight: float")
    .Attr("unbiased_variance: bool")
    .Attr("skip_nonfinite: bool")
    .Attr("layer: string")
    .Attr("group: string")
    .Input("x: T")
    .Input("packet: packets * int64")
    .Input("moving_mean: U")
    .Input("moving_variance: U")
    .Input("gamma: gammas * U")
    .Input("beta: betas * U")
    .Input("residual: residuals * T")
    .Input("mask: masks * bool")
    .Input("batches: counts * int64")
    .Output("y: T")
    .Output("stats: double")
    .Output("new_moving_mean: U")
    .Output("new_moving_variance: U")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle channels;
      TF_RETURN_IF_ERROR(Channels(c, &channels));
      c->set_output(0, c->input(0));
      c->set_output(1, c->Matrix(2, channels));
      c->set_output(2, c->Vector(channels));
      c->set_output(3, c->Vector(channels));
      return absl::OkStatus();
    });

// dgamma and dbeta are this rank's share, because Horovod's optimizers average parameter gradients. `layer` and `group`
// are for the second derivative, where no group means that the statistics are constants.
REGISTER_OP("HvdSyncbnBackwardMoments")
    .HVD_SYNCBN_COMMON_ATTRS.Attr("U: {half, bfloat16, float, double}")
    .Attr("ys: int >= 0")
    .Attr("masks: int >= 0")
    .Attr("unknowns: int >= 0")
    .Attr("layer: string")
    .Attr("group: string")
    .Input("x: T")
    .Input("dy: T")
    .Input("stats: double")
    .Input("y: ys * T")
    .Input("mask: masks * bool")
    .Input("unknown: unknowns * int32")
    .Output("packet: int64")
    .Output("dgamma: U")
    .Output("dbeta: U")
    .SetShapeFn([](InferenceContext* c) {
      DimensionHandle channels;
      ShapeHandle packet;
      TF_RETURN_IF_ERROR(Channels(c, &channels));
      TF_RETURN_IF_ERROR(Packet(c, &packet));
      c->set_output(0, packet);
      c->set_output(1, c->Vector(channels));
      c->set_output(2, c->Vector(channels));
      return absl::OkStatus();
    });

REGISTER_OP("HvdSyncbnBackwardApply")
    .HVD_SYNCBN_COMMON_ATTRS.Attr("packets: int >= 0")
    .Attr("gamma_types: list({half, bfloat16, float, double}) >= 0")
    .Attr("ys: int >= 0")
    .Attr("masks: int >= 0")
    .Attr("residuals: int >= 0")
    .Attr("layer: string")
    .Attr("group: string")
    .Input("x: T")
    .Input("dy: T")
    .Input("packet: packets * int64")
    .Input("stats: double")
    .Input("gamma: gamma_types")
    .Input("y: ys * T")
    .Input("mask: masks * bool")
    .Output("dx: T")
    .Output("dresidual: residuals * T")
    .SetShapeFn([](InferenceContext* c) {
      for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->input(0));
      return absl::OkStatus();
    });

// A no-op after each collective. TensorFlow prunes neither a stateful op nor its inputs.
REGISTER_OP("HvdSyncbnKeep")
    .Attr("T: {int64, double}")
    .Input("packet: T")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

// ---- Kernels for the CPU

// Runs `work` on [0, units) in TensorFlow's threads. A unit costs about one cycle per byte that it reads.
void Run(OpKernelContext* ctx, int64_t units, int64_t unit_bytes, std::function<void(int64_t, int64_t)> work) {
  const auto& threads = *ctx->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(threads.num_threads, threads.workers, units, unit_bytes, std::move(work));
}

// Returns the number of unmasked positions.
int64_t Unmasked(const hvd_syncbn_shape& shape, const uint8_t* mask) {
  const int64_t positions = shape.n * shape.s;
  return mask == nullptr ? positions : positions - std::count(mask, mask + positions, 0);
}

// Returns the error in the header of a reduced packet. A frozen layer has none.
Status CheckPacket(int32_t direction, const Tensor& x, const hvd_syncbn_shape& shape, double epsilon,
                   const Tensor* packet, const std::string& layer) {
  if (packet == nullptr) return absl::OkStatus();
  const int32_t status = hvd_syncbn_check_packet(direction, Data<const int64_t>(packet));
  if (status == HVD_SYNCBN_RANKS_DISAGREE) {
    return Failure(status, layer, "Received on this rank: channels=", shape.c, ", epsilon=", epsilon,
                   ", dtype=", tensorflow::DataTypeString(x.dtype()));
  }
  return Failure(status, layer, "Received on this rank: input of shape ", x.shape().DebugString());
}

void PreferHugePages(const Tensor* output) {
  if (output != nullptr) hvd_syncbn_prefer_huge_pages(output->data(), static_cast<int64_t>(output->TotalBytes()));
}

Status Coefficients(OpKernelContext* ctx, const hvd_syncbn_shape& shape, Tensor* coefficients) {
  return ctx->allocate_temp(tensorflow::DT_UINT8, {hvd_syncbn_coefficients_size(&shape)}, coefficients);
}

class CpuForwardMomentsOp : public ForwardMomentsOp {
 public:
  using ForwardMomentsOp::ForwardMomentsOp;

  Status Launch(OpKernelContext* ctx, const ForwardMomentsArrays& arrays) const override {
    const hvd_syncbn_shape& shape = arrays.shape;
    int64_t* const packet = Data<int64_t>(arrays.packet);
    std::memset(packet, 0, arrays.packet->TotalBytes());
    Run(ctx, hvd_syncbn_moments_units(&shape), hvd_syncbn_moments_unit_bytes(&shape), [&](int64_t begin, int64_t end) {
      hvd_syncbn_forward_moments(&shape, arrays.x->data(), arrays.mask, begin, end, packet);
    });
    hvd_syncbn_forward_close(&shape, epsilon_, kCallUnknown, Unmasked(shape, arrays.mask), packet);
    return absl::OkStatus();
  }
};

class CpuForwardApplyOp : public ForwardApplyOp {
 public:
  using ForwardApplyOp::ForwardApplyOp;

  Status Launch(OpKernelContext* ctx, const ForwardApplyArrays& arrays) const override {
    const hvd_syncbn_shape& shape = arrays.shape;
    TF_RETURN_IF_ERROR(CheckPacket(HVD_SYNCBN_FORWARD, *arrays.x, shape, epsilon_, arrays.packet, layer_));
    const auto* const packet = Data<const int64_t>(arrays.packet);
    if (packet != nullptr) Warn(count_nonfinite(layer_, shape.c, packet));
    PreferHugePages(arrays.y);
    std::memcpy(arrays.new_mean->data(), arrays.moving_mean->data(), arrays.moving_mean->TotalBytes());
    std::memcpy(arrays.new_variance->data(), arrays.moving_variance->data(), arrays.moving_variance->TotalBytes());
    Tensor coefficients;
    TF_RETURN_IF_ERROR(Coefficients(ctx, shape, &coefficients));
    hvd_syncbn_running running = arrays.running;
    running.mean = Vector(arrays.new_mean);
    running.var = Vector(arrays.new_variance);
    hvd_syncbn_forward_finish(&shape, epsilon_, packet, Vector(arrays.gamma), Vector(arrays.beta), running,
                              Data<double>(arrays.stats), coefficients.data());
    Run(ctx, hvd_syncbn_apply_units(&shape), hvd_syncbn_apply_unit_bytes(&shape), [&](int64_t begin, int64_t end) {
      hvd_syncbn_forward_apply(&shape, arrays.x->data(), Data<const void>(arrays.residual), relu_, coefficients.data(),
                               begin, end, arrays.y->data());
    });
    return absl::OkStatus();
  }
};

class CpuBackwardMomentsOp : public BackwardMomentsOp {
 public:
  using BackwardMomentsOp::BackwardMomentsOp;

  Status Launch(OpKernelContext* ctx, const BackwardMomentsArrays& arrays) const override {
    const hvd_syncbn_shape& shape = arrays.shape;
    const double* const stats = Data<const double>(arrays.stats);
    int64_t* const packet = Data<int64_t>(arrays.packet);
    std::memset(packet, 0, arrays.packet->TotalBytes());
    Run(ctx, hvd_syncbn_moments_units(&shape), hvd_syncbn_moments_unit_bytes(&shape), [&](int64_t begin, int64_t end) {
      hvd_syncbn_backward_moments(&shape, arrays.x->data(), arrays.dy->data(), Data<const void>(arrays.y), stats, begin,
                                  end, packet);
    });
    hvd_syncbn_backward_close(&shape, stats, Unmasked(shape, arrays.mask), packet);
    hvd_syncbn_backward_params(&shape, packet, stats, Vector(arrays.dgamma), Vector(arrays.dbeta));
    return absl::OkStatus();
  }
};

class CpuBackwardApplyOp : public BackwardApplyOp {
 public:
  using BackwardApplyOp::BackwardApplyOp;

  Status Launch(OpKernelContext* ctx, const BackwardApplyArrays& arrays) const override {
    const hvd_syncbn_shape& shape = arrays.shape;
    TF_RETURN_IF_ERROR(CheckPacket(HVD_SYNCBN_BACKWARD, *arrays.x, shape, epsilon_, arrays.packet, layer_));
    PreferHugePages(arrays.dx);
    PreferHugePages(arrays.dresidual);
    Tensor coefficients;
    TF_RETURN_IF_ERROR(Coefficients(ctx, shape, &coefficients));
    hvd_syncbn_backward_finish(&shape, Data<const int64_t>(arrays.packet), Data<const double>(arrays.stats),
                               Vector(arrays.gamma), coefficients.data());
    Run(ctx, hvd_syncbn_apply_units(&shape), hvd_syncbn_apply_unit_bytes(&shape), [&](int64_t begin, int64_t end) {
      hvd_syncbn_backward_apply(&shape, arrays.x->data(), arrays.dy->data(), Data<const void>(arrays.y), arrays.mask,
                                coefficients.data(), begin, end, arrays.dx->data(), Data<void>(arrays.dresidual));
    });
    return absl::OkStatus();
  }
};

REGISTER_KERNEL_BUILDER(Name("HvdSyncbnForwardMoments").Device(tensorflow::DEVICE_CPU), CpuForwardMomentsOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnForwardApply").Device(tensorflow::DEVICE_CPU), CpuForwardApplyOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnBackwardMoments").Device(tensorflow::DEVICE_CPU), CpuBackwardMomentsOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnBackwardApply").Device(tensorflow::DEVICE_CPU), CpuBackwardApplyOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnKeep").Device(tensorflow::DEVICE_CPU), KeepOp);

}  // namespace
}  // namespace hvd_syncbn
