// The C interface of the core on NVIDIA GPUs: one launch before the collective and one after, in each direction.
//
// Rules, besides those of core.h:
//  * Pointers are to memory of the current device; `stream` is a cudaStream_t of it. Functions return after enqueuing
//    their work on the stream; only hvd_syncbn_cuda_earlier_failure waits for the device. All work can be captured into
//    a CUDA graph.
//  * Results are bitwise identical to those of core.h's functions, for any device, launch geometry and block order.
//  * Functions return 0 or a cudaError_t.
//
// One training step of one layer:
//
//   forward:   hvd_syncbn_cuda_forward_moments(x -> packet)
//              [ allreduce(packet, Sum) ]
//              hvd_syncbn_cuda_forward_apply(x, packet -> y, stats, running statistics)
//   backward:  hvd_syncbn_cuda_backward_moments(x, dy -> packet, dgamma, dbeta)
//              [ allreduce(packet, Sum) ]
//              hvd_syncbn_cuda_backward_apply(x, dy, packet -> dx, dresidual)
//
// The apply kernels check the packet's header on the device. If ranks disagree or the global batch has one value per
// channel, y, stats and dx become NaN, running statistics do not change, and hvd_syncbn_cuda_earlier_failure returns
// the status, at the same launch on every rank.
#ifndef HVD_SYNCBN_CUDA_H_
#define HVD_SYNCBN_CUDA_H_

#include "core.h"

#ifdef __cplusplus
extern "C" {
#endif

// Writes this rank's closed packet, ready for the collective. mask: NULL, or n*s bytes [n][s]; positions with 0 do not
// count. call: as for hvd_syncbn_forward_close.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_forward_moments(const hvd_syncbn_shape* shape, const void* x,
                                                       const uint8_t* mask, double eps, int64_t call, int64_t* packet,
                                                       void* stream);

// Computes from a reduced packet y = relu?(normalized x + residual?); stats, float64 mean[c], invstd[c]; and the
// running statistics as hvd_syncbn_forward_finish does, from `running` to new_mean and new_var (which may be the same
// memory). layer: the name that hvd_syncbn_cuda_failure returns.
// packet: NULL for a frozen layer, which is normalized by its running statistics and does not change them. Such a
// launch checks nothing and is not counted.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_forward_apply(const hvd_syncbn_shape* shape, double eps, const void* x,
                                                     const void* residual, int32_t relu, const int64_t* packet,
                                                     hvd_syncbn_vector gamma, hvd_syncbn_vector beta,
                                                     hvd_syncbn_running running, hvd_syncbn_vector new_mean,
                                                     hvd_syncbn_vector new_var, const char* layer, double* stats,
                                                     void* y, void* stream);

// Writes this rank's closed packet, dgamma and dbeta (whose data may be NULL). y: NULL, or the output if the fused
// activation is relu. mask: only for the count of unmasked positions; every dy is summed.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_backward_moments(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                        const void* y, const uint8_t* mask, const double* stats,
                                                        int64_t* packet, hvd_syncbn_vector dgamma,
                                                        hvd_syncbn_vector dbeta, void* stream);

// Computes dx and, unless it is NULL, dresidual from a reduced packet. packet: NULL for a frozen layer, where dx does
// not depend on x.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_backward_apply(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                      const void* y, const uint8_t* mask, const int64_t* packet,
                                                      const double* stats, hvd_syncbn_vector gamma, const char* layer,
                                                      void* dx, void* dresidual, void* stream);

// The number of launches of apply kernels after which a failure is reported.
#define HVD_SYNCBN_CUDA_LAG 32

// Must be called before work is enqueued. Returns the status of the apply kernel that was launched HVD_SYNCBN_CUDA_LAG
// launches before the next one on the current device: HVD_SYNCBN_OK, or HVD_SYNCBN_RANKS_DISAGREE,
// HVD_SYNCBN_CALLS_DIFFER, HVD_SYNCBN_ONE_VALUE or HVD_SYNCBN_NONFINITE (which is no failure, but is returned in the
// same way) with the name of its layer, which stays valid. A failure is returned once. Waits for that kernel, which has
// finished unless the host is that far ahead. Ranks launch the same kernels in the same order, so all report a failure
// at the same launch, and no rank waits for a packet of another. Returns HVD_SYNCBN_OK while the stream captures a
// graph.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_earlier_failure(void* stream, const char** layer);

// Returns the oldest known failure of the current device that was not returned before, without waiting; includes
// failures of kernels in graphs.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_failure(const char** layer);

// Returns the message for an error code.
HVD_SYNCBN_API const char* hvd_syncbn_cuda_error(int32_t error);

#ifdef __cplusplus
}
#endif

#endif  // HVD_SYNCBN_CUDA_H_
