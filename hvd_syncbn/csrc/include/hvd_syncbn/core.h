// The C interface of the core: every number that synchronized batch norm computes, for both adapters.
//
// Rules:
//  * Nothing here knows a framework, owns a thread or calls a collective. The caller brings memory and threads.
//  * A kernel takes a range of work units [begin, end) of `hvd_syncbn_moments_units(...)` or
//    `hvd_syncbn_apply_units(...)`; any split of the range, on any number of threads, in any order, gives the same
//    bytes. Moment kernels may add to one packet from many threads at once.
//  * Pointers are to contiguous memory: [n][c][s] for channels first, [n][s][c] for channels last. Any alignment.
//  * The floating-point environment of the calling thread (flush-to-zero, rounding) does not matter and is kept.
//  * The numbers are those of docs/protocol.md; its Python twin is hvd_syncbn/protocol.py.
//
// One training step of one layer:
//
//   forward:   memset(packet, 0)
//              hvd_syncbn_forward_moments(units, x -> packet)         any number of calls
//              hvd_syncbn_forward_close(packet)                       carries, header
//              [ allreduce(packet, Sum) ]
//              hvd_syncbn_check_packet(FORWARD, packet)               do all ranks agree?
//              hvd_syncbn_forward_finish(packet -> stats, coefficients, running statistics)
//              hvd_syncbn_forward_apply(units, x -> y)                any number of calls
//   backward:  memset(packet, 0)
//              hvd_syncbn_backward_moments(units, x, dy -> packet)
//              hvd_syncbn_backward_close(stats, packet)
//              hvd_syncbn_backward_params(packet -> dgamma, dbeta)    local to the rank: before the collective
//              [ allreduce(packet, Sum) ]
//              hvd_syncbn_check_packet(BACKWARD, packet)              is it the same call on all ranks?
//              hvd_syncbn_backward_finish(packet, stats -> coefficients)
//              hvd_syncbn_backward_apply(units, x, dy -> dx)
//
// Statistics of a data set, of one layer:
//
//   memset(total, 0)
//   of every batch:  hvd_syncbn_add_packet(packet -> total)                          "pooled": this rank's packets
//                    [ allreduce(packet, Sum) ]  hvd_syncbn_add_batch(packet -> total)   "batches": reduced packets
//   [ allreduce(total, Sum) ]                                                        "pooled"
//   hvd_syncbn_population(total -> stored mean and variance)
#ifndef HVD_SYNCBN_CORE_H_
#define HVD_SYNCBN_CORE_H_

#include <stdint.h>

#if defined(_WIN32)
#define HVD_SYNCBN_API
#else
#define HVD_SYNCBN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  HVD_SYNCBN_FLOAT32 = 0,
  HVD_SYNCBN_FLOAT64 = 1,
  HVD_SYNCBN_FLOAT16 = 2,
  HVD_SYNCBN_BFLOAT16 = 3,
};

enum {
  HVD_SYNCBN_CHANNELS_FIRST = 0,  // [n][c][s]
  HVD_SYNCBN_CHANNELS_LAST = 1,   // [n][s][c]
};

enum {
  HVD_SYNCBN_FORWARD = 0,
  HVD_SYNCBN_BACKWARD = 1,
};

// What hvd_syncbn_check_packet found.
enum {
  HVD_SYNCBN_OK = 0,
  HVD_SYNCBN_RANKS_DISAGREE =
      1,                        // forward: eps, dtype, protocol version or the need of a gradient differ between ranks
  HVD_SYNCBN_ONE_VALUE = 2,     // one value per channel in the global batch: no variance to speak of
  HVD_SYNCBN_EMPTY = 3,         // no value at all: nothing to normalise, running statistics stay
  HVD_SYNCBN_CALLS_DIFFER = 4,  // backward: the ranks differentiate different calls of the layer
};

// The logical input x[n, c, s] of one rank: samples, channels, flattened spatial positions (1 for 2-D input).
typedef struct {
  int64_t n, c, s;
  int32_t dtype;   // of x, y, residual and their gradients
  int32_t layout;  // of the same
} hvd_syncbn_shape;

// A per-channel vector of the framework's: `data` may be NULL (gamma: 1, beta: 0, gradient: not wanted).
typedef struct {
  void* data;
  int32_t dtype;
} hvd_syncbn_vector;

// int64 words in the packet of `channels` channels.
HVD_SYNCBN_API int64_t hvd_syncbn_packet_size(int64_t channels);

// Bytes of the coefficient scratch that *_finish writes and *_apply reads, for either direction.
HVD_SYNCBN_API int64_t hvd_syncbn_coefficients_size(const hvd_syncbn_shape* shape);

// Work units of the moment kernels and of the apply kernels; and about how many bytes of x one unit reads, from which a
// caller takes the grain of its thread pool.
HVD_SYNCBN_API int64_t hvd_syncbn_moments_units(const hvd_syncbn_shape* shape);
HVD_SYNCBN_API int64_t hvd_syncbn_apply_units(const hvd_syncbn_shape* shape);
HVD_SYNCBN_API int64_t hvd_syncbn_moments_unit_bytes(const hvd_syncbn_shape* shape);
HVD_SYNCBN_API int64_t hvd_syncbn_apply_unit_bytes(const hvd_syncbn_shape* shape);

// Adds the moments of units [begin, end) to `packet` (zeroed by the caller; atomic adds).
// mask: NULL, or n*s bytes [n][s]; positions with 0 do not count.
HVD_SYNCBN_API void hvd_syncbn_forward_moments(const hvd_syncbn_shape* shape, const void* x, const uint8_t* mask,
                                               int64_t begin, int64_t end, int64_t* packet);

// y: NULL, or the layer's output where the fused activation is relu (its sign masks dy).
// stats: float64 mean[c], invstd[c], as hvd_syncbn_forward_finish wrote them.
HVD_SYNCBN_API void hvd_syncbn_backward_moments(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                const void* y, const double* stats, int64_t begin, int64_t end,
                                                int64_t* packet);

// Propagates carries and writes the header. count: values per channel on this rank (n*s, or the unmasked positions).
// needs_gradient: 1 if this rank will differentiate this call, which has to be the same on every rank; 0 if not, or if
// that is not known on any rank.
HVD_SYNCBN_API void hvd_syncbn_forward_close(const hvd_syncbn_shape* shape, double eps, int32_t needs_gradient,
                                             int64_t count, int64_t* packet);
HVD_SYNCBN_API void hvd_syncbn_backward_close(const hvd_syncbn_shape* shape, const double* stats, int64_t count,
                                              int64_t* packet);

// Reads the header of a reduced packet: HVD_SYNCBN_OK or what is wrong. Same answer on every rank.
HVD_SYNCBN_API int32_t hvd_syncbn_check_packet(int32_t direction, const int64_t* packet);

// The number of channels that are not finite on at least one rank, from a reduced packet of c channels.
HVD_SYNCBN_API int64_t hvd_syncbn_nonfinite_channels(int64_t c, const int64_t* packet);

// Reduced packet -> stats (float64 mean[c], invstd[c]), coefficients for forward_apply, and the running statistics in
// place: new = f32(old_weight) * old + f32(new_weight) * batch statistic; `unbiased` picks var*n/(n-1) (PyTorch) or var
// (Keras). running_mean.data and running_var.data may be NULL. An empty global batch changes no running statistic,
// and a channel that is not finite in the batch keeps its own.
// packet: NULL for a frozen layer, which is normalised by its running statistics and leaves them as they are.
HVD_SYNCBN_API void hvd_syncbn_forward_finish(const hvd_syncbn_shape* shape, double eps, const int64_t* packet,
                                              hvd_syncbn_vector gamma, hvd_syncbn_vector beta,
                                              hvd_syncbn_vector running_mean, hvd_syncbn_vector running_var,
                                              double old_weight, double new_weight, int32_t unbiased, double* stats,
                                              void* coefficients);

// The weights for hvd_syncbn_forward_finish of an average without a bias at its start (Caffe's): s = old_weight * s + 1
// with every batch, the batch's weight is 1 / s and that of the old statistics 1 - 1 / s. old_weight 1 averages over
// all batches alike. batches: how many there were before this one.
HVD_SYNCBN_API void hvd_syncbn_average_weights(double old_weight, int64_t batches, double* weight_of_old,
                                               double* weight_of_new);

// y = relu?(normalised x + residual?). residual: NULL or shaped as x. relu: 0 or 1.
HVD_SYNCBN_API void hvd_syncbn_forward_apply(const hvd_syncbn_shape* shape, const void* x, const void* residual,
                                             int32_t relu, const void* coefficients, int64_t begin, int64_t end,
                                             void* y);

// Closed local packet of the backward direction -> this rank's dgamma and dbeta.
HVD_SYNCBN_API void hvd_syncbn_backward_params(const hvd_syncbn_shape* shape, const int64_t* packet,
                                               const double* stats, hvd_syncbn_vector dgamma, hvd_syncbn_vector dbeta);

// Reduced packet of the backward direction -> coefficients for backward_apply.
// packet: NULL for a frozen layer, through whose statistics no gradient flows: dx is then a * dy, whatever x is.
HVD_SYNCBN_API void hvd_syncbn_backward_finish(const hvd_syncbn_shape* shape, const int64_t* packet,
                                               const double* stats, hvd_syncbn_vector gamma, void* coefficients);

// dx, and dresidual (NULL: not wanted), which is dy masked by the activation. mask and y as in the moments: a masked
// position took no part in the statistics, so its dx is a*dy alone.
HVD_SYNCBN_API void hvd_syncbn_backward_apply(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                              const void* y, const uint8_t* mask, const void* coefficients,
                                              int64_t begin, int64_t end, void* dx, void* dresidual);

// What `total` of a data set holds.
enum {
  HVD_SYNCBN_POOLED = 0,   // the sums of all its values: hvd_syncbn_add_packet
  HVD_SYNCBN_BATCHES = 1,  // the sums of its global batches' means and unbiased variances: hvd_syncbn_add_batch
};

// Adds a closed packet to `total`, which is laid out as a packet: count, nonfinite counters and exact sums, whose
// carries are propagated, so that any number of packets can follow and 2^22 ranks' totals can be summed. The other
// words of the header are left alone.
HVD_SYNCBN_API void hvd_syncbn_add_packet(int64_t channels, const int64_t* packet, int64_t* total);

// Adds the mean and the unbiased variance of a reduced packet's batch to `total`, each as an exact sum, and counts the
// batch. HVD_SYNCBN_EMPTY, HVD_SYNCBN_ONE_VALUE: the batch has no (unbiased) variance, `total` stays.
HVD_SYNCBN_API int32_t hvd_syncbn_add_batch(int64_t channels, const int64_t* packet, int64_t* total);

// Population statistics from the `total` of all ranks: `unbiased` picks var*n/(n-1) or var where it is
// HVD_SYNCBN_POOLED; HVD_SYNCBN_BATCHES is always unbiased. gamma and beta, where their data is not NULL, become
// sqrt(variance + eps) and mean, of the vectors just written: what makes the layer the identity.
// HVD_SYNCBN_EMPTY, HVD_SYNCBN_ONE_VALUE: nothing is written.
HVD_SYNCBN_API int32_t hvd_syncbn_population(int64_t channels, const int64_t* total, int32_t estimator,
                                             int32_t unbiased, double eps, hvd_syncbn_vector mean,
                                             hvd_syncbn_vector variance, hvd_syncbn_vector gamma,
                                             hvd_syncbn_vector beta);

// Asks the system for huge pages under a fresh output of 4 MiB or more: faulting it in page by page can take longer
// than the arithmetic. A hint; where it is refused, nothing is lost but time.
HVD_SYNCBN_API void hvd_syncbn_prefer_huge_pages(void* data, int64_t bytes);

// The instruction-set path in use ("baseline", "avx2", "avx512"), and every one that this machine can run,
// comma-separated.
HVD_SYNCBN_API const char* hvd_syncbn_isa(void);
HVD_SYNCBN_API const char* hvd_syncbn_isas(void);
// Switches the path for this process (tests); 0, or -1 where this machine cannot run it. HVD_SYNCBN_ISA does so at
// load.
HVD_SYNCBN_API int32_t hvd_syncbn_set_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif  // HVD_SYNCBN_CORE_H_
