// The C interface of the core on NVIDIA GPUs: one launch before the collective and one after, in each direction.
//
// Rules, besides those of core.h:
//  * Pointers are to memory of the current device; `stream` is a cudaStream_t of it. Nothing waits for the device, but
//    hvd_syncbn_cuda_earlier_failure: every function returns when its work is on the stream. All of it can be captured
//    into a CUDA graph.
//  * The bytes are those of core.h's functions, whatever the device, the launch geometry and the order of its blocks.
//  * Functions return 0, or a cudaError_t.
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
// What hvd_syncbn_check_packet tells the host on a CPU, the apply kernels find out on the device. Where ranks disagree
// or the global batch has one value per channel, y, stats and dx become NaN, running statistics stay, and
// hvd_syncbn_cuda_earlier_failure tells, at the same launch on every rank.
#ifndef HVD_SYNCBN_CUDA_H_
#define HVD_SYNCBN_CUDA_H_

#include "core.h"

#ifdef __cplusplus
extern "C" {
#endif

// Overwrites `packet` with this rank's: closed, ready for the collective. mask: NULL, or n*s bytes [n][s]; positions
// with 0 do not count. needs_gradient: as of hvd_syncbn_forward_close.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_forward_moments(const hvd_syncbn_shape* shape, const void* x,
                                                       const uint8_t* mask, double eps, int32_t needs_gradient,
                                                       int64_t* packet, void* stream);

// From a reduced packet: y = relu?(normalised x + residual?); stats, float64 mean[c], invstd[c]; and the running
// statistics, as hvd_syncbn_forward_finish has them, from running_* to new_running_* (which may be the same memory).
// layer: named by hvd_syncbn_cuda_failure.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_forward_apply(
    const hvd_syncbn_shape* shape, double eps, const void* x, const void* residual, int32_t relu, const int64_t* packet,
    hvd_syncbn_vector gamma, hvd_syncbn_vector beta, hvd_syncbn_vector running_mean, hvd_syncbn_vector running_var,
    hvd_syncbn_vector new_running_mean, hvd_syncbn_vector new_running_var, double old_weight, double new_weight,
    int32_t unbiased, const char* layer, double* stats, void* y, void* stream);

// Overwrites `packet`, and writes this rank's dgamma and dbeta (data may be NULL). y: NULL, or the output where the
// fused activation is relu. mask: only its unmasked positions are counted; every dy takes part.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_backward_moments(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                        const void* y, const uint8_t* mask, const double* stats,
                                                        int64_t* packet, hvd_syncbn_vector dgamma,
                                                        hvd_syncbn_vector dbeta, void* stream);

// From a reduced packet: dx, and dresidual (NULL: not wanted).
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_backward_apply(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                      const void* y, const uint8_t* mask, const int64_t* packet,
                                                      const double* stats, hvd_syncbn_vector gamma, const char* layer,
                                                      void* dx, void* dresidual, void* stream);

// How many launches of apply kernels later a failure is told.
#define HVD_SYNCBN_CUDA_LAG 32

// To be called before work goes on the stream: what the apply kernel found wrong that was launched HVD_SYNCBN_CUDA_LAG
// launches before the next one on the current device. HVD_SYNCBN_OK, or HVD_SYNCBN_RANKS_DISAGREE,
// HVD_SYNCBN_CALLS_DIFFER or HVD_SYNCBN_ONE_VALUE and the name of its layer, which stays valid; told once. Waits for
// that kernel, which is over unless the host is that far ahead. Ranks launch the same kernels in the same order, so all
// are told at the same one, and none is left waiting for another's packet. Tells nothing while the stream captures a
// graph.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_earlier_failure(void* stream, const char** layer);

// The oldest failure of the current device that is known and was not told, without waiting; also of graphs' kernels.
HVD_SYNCBN_API int32_t hvd_syncbn_cuda_failure(const char** layer);

// The words for an error that a function returned.
HVD_SYNCBN_API const char* hvd_syncbn_cuda_error(int32_t error);

#ifdef __cplusplus
}
#endif

#endif  // HVD_SYNCBN_CUDA_H_
