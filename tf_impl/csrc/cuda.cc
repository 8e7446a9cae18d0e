// The layer's ops on a GPU, on the op's stream. Nothing here waits for it.
//
// What the CPU kernels return after reading a packet's header, the GPU finds out later; the next op of any layer on
// that device returns it. The collective runs where TensorFlow places Horovod's op.
#include "hvd_syncbn/cuda.h"

#include "layer_op.h"
#include "xla/stream_executor/stream.h"

namespace hvd_syncbn {
namespace {

void* StreamOf(OpKernelContext* ctx) { return ctx->op_device_context()->stream()->platform_specific_handle().stream; }

Status Cuda(int32_t error) {
  return error == 0 ? absl::OkStatus()
                    : absl::InternalError(absl::StrCat("hvd-syncbn: CUDA says: ", hvd_syncbn_cuda_error(error)));
}

// What an earlier op left behind.
Status Earlier() {
  const char* layer;
  const int32_t status = hvd_syncbn_cuda_failure(&layer);
  return Failure(status, layer, "(Found on the GPU, and raised when the host next looked.)");
}

class GpuForwardMomentsOp : public LayerOp {
 public:
  using LayerOp::LayerOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Earlier());
    const Tensor& x = ctx->input(0);
    hvd_syncbn_shape shape;
    OP_REQUIRES_OK(ctx, CoreShape(x, &shape));
    const uint8_t* mask;
    OP_REQUIRES_OK(ctx, Mask(ctx, shape, &mask));
    Tensor* packet;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {hvd_syncbn_packet_size(shape.c)}, &packet));
    OP_REQUIRES_OK(ctx, Cuda(hvd_syncbn_cuda_forward_moments(&shape, x.data(), mask, epsilon_, Data<int64_t>(packet),
                                                             StreamOf(ctx))));
  }
};

class GpuForwardApplyOp : public LayerOp {
 public:
  explicit GpuForwardApplyOp(OpKernelConstruction* ctx) : LayerOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer", &layer_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("relu", &relu_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("old_weight", &old_weight_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("new_weight", &new_weight_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("unbiased_variance", &unbiased_));
  }

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Earlier());
    const Tensor& x = ctx->input(0);
    hvd_syncbn_shape shape;
    OP_REQUIRES_OK(ctx, CoreShape(x, &shape));
    const TensorShape per_channel({shape.c});
    const Tensor *packet, *moving_mean, *moving_variance, *gamma, *beta, *residual;
    OP_REQUIRES_OK(ctx, Input(ctx, "packet", {hvd_syncbn_packet_size(shape.c)}, &packet));
    OP_REQUIRES_OK(ctx, Input(ctx, "moving_mean", per_channel, &moving_mean));
    OP_REQUIRES_OK(ctx, Input(ctx, "moving_variance", per_channel, &moving_variance));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "gamma", per_channel, &gamma));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "beta", per_channel, &beta));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "residual", x.shape(), &residual));
    Tensor *y, *stats, *new_mean, *new_variance;
    OP_REQUIRES_OK(ctx, ctx->allocate_output("y", x.shape(), &y));
    OP_REQUIRES_OK(ctx, ctx->allocate_output("stats", {2, shape.c}, &stats));
    OP_REQUIRES_OK(ctx, ctx->allocate_output("new_moving_mean", per_channel, &new_mean));
    OP_REQUIRES_OK(ctx, ctx->allocate_output("new_moving_variance", per_channel, &new_variance));
    OP_REQUIRES_OK(ctx, Cuda(hvd_syncbn_cuda_forward_apply(
                            &shape, epsilon_, x.data(), Data<const void>(residual), relu_, Data<const int64_t>(packet),
                            Vector(gamma), Vector(beta), Vector(moving_mean), Vector(moving_variance), Vector(new_mean),
                            Vector(new_variance), old_weight_, new_weight_, unbiased_, layer_.c_str(),
                            Data<double>(stats), y->data(), StreamOf(ctx))));
  }

 private:
  std::string layer_;
  bool relu_, unbiased_;
  float old_weight_, new_weight_;
};

class GpuBackwardMomentsOp : public LayerOp {
 public:
  using LayerOp::LayerOp;

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Earlier());
    const Tensor& x = ctx->input(0);
    hvd_syncbn_shape shape;
    OP_REQUIRES_OK(ctx, CoreShape(x, &shape));
    const Tensor *dy, *stats, *y;
    OP_REQUIRES_OK(ctx, Input(ctx, "dy", x.shape(), &dy));
    OP_REQUIRES_OK(ctx, Input(ctx, "stats", {2, shape.c}, &stats));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "y", x.shape(), &y));
    const uint8_t* mask;
    OP_REQUIRES_OK(ctx, Mask(ctx, shape, &mask));
    Tensor *packet, *dgamma, *dbeta;
    OP_REQUIRES_OK(ctx, ctx->allocate_output("packet", {hvd_syncbn_packet_size(shape.c)}, &packet));
    OP_REQUIRES_OK(ctx, ctx->allocate_output("dgamma", {shape.c}, &dgamma));
    OP_REQUIRES_OK(ctx, ctx->allocate_output("dbeta", {shape.c}, &dbeta));
    OP_REQUIRES_OK(ctx, Cuda(hvd_syncbn_cuda_backward_moments(
                            &shape, x.data(), dy->data(), Data<const void>(y), mask, Data<const double>(stats),
                            epsilon_, Data<int64_t>(packet), Vector(dgamma), Vector(dbeta), StreamOf(ctx))));
  }
};

class GpuBackwardApplyOp : public LayerOp {
 public:
  explicit GpuBackwardApplyOp(OpKernelConstruction* ctx) : LayerOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer", &layer_));
  }

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Earlier());
    const Tensor& x = ctx->input(0);
    hvd_syncbn_shape shape;
    OP_REQUIRES_OK(ctx, CoreShape(x, &shape));
    const Tensor *dy, *packet, *stats, *gamma, *y;
    OP_REQUIRES_OK(ctx, Input(ctx, "dy", x.shape(), &dy));
    OP_REQUIRES_OK(ctx, Input(ctx, "packet", {hvd_syncbn_packet_size(shape.c)}, &packet));
    OP_REQUIRES_OK(ctx, Input(ctx, "stats", {2, shape.c}, &stats));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "gamma", TensorShape({shape.c}), &gamma));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "y", x.shape(), &y));
    const uint8_t* mask;
    OP_REQUIRES_OK(ctx, Mask(ctx, shape, &mask));
    Tensor *dx, *dresidual = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, x.shape(), &dx));
    if (ctx->num_outputs() > 1) OP_REQUIRES_OK(ctx, ctx->allocate_output(1, x.shape(), &dresidual));
    OP_REQUIRES_OK(
        ctx, Cuda(hvd_syncbn_cuda_backward_apply(&shape, epsilon_, x.data(), dy->data(), Data<const void>(y), mask,
                                                 Data<const int64_t>(packet), Data<const double>(stats), Vector(gamma),
                                                 layer_.c_str(), dx->data(), Data<void>(dresidual), StreamOf(ctx))));
  }

 private:
  std::string layer_;
};

class GpuKeepOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext*) override {}
};

REGISTER_KERNEL_BUILDER(Name("HvdSyncbnForwardMoments").Device(tensorflow::DEVICE_GPU), GpuForwardMomentsOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnForwardApply").Device(tensorflow::DEVICE_GPU), GpuForwardApplyOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnBackwardMoments").Device(tensorflow::DEVICE_GPU), GpuBackwardMomentsOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnBackwardApply").Device(tensorflow::DEVICE_GPU), GpuBackwardApplyOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnKeep").Device(tensorflow::DEVICE_GPU), GpuKeepOp);

}  // namespace
}  // namespace hvd_syncbn
