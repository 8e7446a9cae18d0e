// The layer's ops on a GPU, on the op's stream. They wait for the stream only if the host is far ahead.
//
// CPU kernels read a packet's header and return its error at once. The GPU finds the error later; then a later op
// returns it, the same op on every rank if the order of the graph is the same (hvd_syncbn_cuda_earlier_failure). The
// collective runs where TensorFlow places Horovod's op.
#include "hvd_syncbn/cuda.h"

#include "layer_op.h"
#include "xla/stream_executor/stream.h"

namespace hvd_syncbn {
namespace {

void* StreamOf(OpKernelContext* ctx) { return ctx->op_device_context()->stream()->platform_specific_handle().stream; }

Status Cuda(int32_t error) {
  return error == 0 ? absl::OkStatus()
                    : absl::InternalError(absl::StrCat("hvd-syncbn: CUDA error: ", hvd_syncbn_cuda_error(error)));
}

// Returns the error of an earlier op, or warns of its channels that are not finite.
Status Earlier(OpKernelContext* ctx) {
  const char* layer;
  const int32_t status = hvd_syncbn_cuda_earlier_failure(StreamOf(ctx), &layer);
  if (status == HVD_SYNCBN_NONFINITE) {
    Warn(count_nonfinite(
        layer, absl::StrCat("channels that are not finite. (Found on the GPU ", HVD_SYNCBN_CUDA_LAG, " calls ago.)")));
  }
  return Failure(status, layer, "(Found on the GPU ", HVD_SYNCBN_CUDA_LAG, " calls ago.)");
}

class GpuForwardMomentsOp : public ForwardMomentsOp {
 public:
  using ForwardMomentsOp::ForwardMomentsOp;

  Status Launch(OpKernelContext* ctx, const ForwardMomentsArrays& arrays) const override {
    TF_RETURN_IF_ERROR(Earlier(ctx));
    return Cuda(hvd_syncbn_cuda_forward_moments(&arrays.shape, arrays.x->data(), arrays.mask, epsilon_, kCallUnknown,
                                                Data<int64_t>(arrays.packet), StreamOf(ctx)));
  }
};

class GpuForwardApplyOp : public ForwardApplyOp {
 public:
  using ForwardApplyOp::ForwardApplyOp;

  Status Launch(OpKernelContext* ctx, const ForwardApplyArrays& arrays) const override {
    TF_RETURN_IF_ERROR(Earlier(ctx));
    return Cuda(hvd_syncbn_cuda_forward_apply(
        &arrays.shape, epsilon_, arrays.x->data(), Data<const void>(arrays.residual), relu_,
        Data<const int64_t>(arrays.packet), Vector(arrays.gamma), Vector(arrays.beta), arrays.running,
        Vector(arrays.new_mean), Vector(arrays.new_variance), layer_.c_str(), Data<double>(arrays.stats),
        arrays.y->data(), StreamOf(ctx)));
  }
};

class GpuBackwardMomentsOp : public BackwardMomentsOp {
 public:
  using BackwardMomentsOp::BackwardMomentsOp;

  Status Launch(OpKernelContext* ctx, const BackwardMomentsArrays& arrays) const override {
    TF_RETURN_IF_ERROR(Earlier(ctx));
    return Cuda(hvd_syncbn_cuda_backward_moments(&arrays.shape, arrays.x->data(), arrays.dy->data(),
                                                 Data<const void>(arrays.y), arrays.mask,
                                                 Data<const double>(arrays.stats), Data<int64_t>(arrays.packet),
                                                 Vector(arrays.dgamma), Vector(arrays.dbeta), StreamOf(ctx)));
  }
};

class GpuBackwardApplyOp : public BackwardApplyOp {
 public:
  using BackwardApplyOp::BackwardApplyOp;

  Status Launch(OpKernelContext* ctx, const BackwardApplyArrays& arrays) const override {
    TF_RETURN_IF_ERROR(Earlier(ctx));
    return Cuda(hvd_syncbn_cuda_backward_apply(
        &arrays.shape, arrays.x->data(), arrays.dy->data(), Data<const void>(arrays.y), arrays.mask,
        Data<const int64_t>(arrays.packet), Data<const double>(arrays.stats), Vector(arrays.gamma), layer_.c_str(),
        arrays.dx->data(), Data<void>(arrays.dresidual), StreamOf(ctx)));
  }
};

REGISTER_KERNEL_BUILDER(Name("HvdSyncbnForwardMoments").Device(tensorflow::DEVICE_GPU), GpuForwardMomentsOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnForwardApply").Device(tensorflow::DEVICE_GPU).HostMemory("batches"),
                        GpuForwardApplyOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnBackwardMoments").Device(tensorflow::DEVICE_GPU), GpuBackwardMomentsOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnBackwardApply").Device(tensorflow::DEVICE_GPU), GpuBackwardApplyOp);
REGISTER_KERNEL_BUILDER(Name("HvdSyncbnKeep").Device(tensorflow::DEVICE_GPU), KeepOp);

}  // namespace
}  // namespace hvd_syncbn
