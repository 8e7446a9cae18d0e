// The C interface of the core, which does all arithmetic of synchronized batch norm for both adapters.
//
// Rules:
//  * The core depends on no framework, creates no threads and calls no collectives. The caller provides memory and
//    threads.
//  * A kernel processes a range [begin, end) of the work units counted by `hvd_syncbn_moments_units(...)` or
//    `hvd_syncbn_apply_units(...)`. Results are bitwise identical for any split of the range, number of threads and
//    order. Moment kernels may add to one packet from many threads at once.
//  * Memory is contiguous: [n][c][s] for channels first, [n][s][c] for channels last. Pointers may have any alignment.
//  * The floating-point environment of the calling thread (flush-to-zero, rounding) has no effect and is restored.
//  * The formulas are those of docs/protocol.md. hvd_syncbn/protocol.py is the Python reference.
//
// One training step of one layer:
//
//   forward:   memset(packet, 0)
//              hvd_syncbn_forward_moments(units, x -> packet)         any number of calls
//              hvd_syncbn_forward_close(packet)                       carries, header
//              [ allreduce(packet, Sum) ]
//              hvd_syncbn_check_packet(FORWARD, packet)               fails if the ranks disagree
//              hvd_syncbn_forward_finish(packet -> stats, coefficients, running statistics)
//              hvd_syncbn_forward_apply(units, x -> y)                any number of calls
//   backward:  memset(packet, 0)
//              hvd_syncbn_backward_moments(units, x, dy -> packet)
//              hvd_syncbn_backward_close(stats, packet)
//              hvd_syncbn_backward_params(packet -> dgamma, dbeta)    this rank's share, before the collective
//              [ allreduce(packet, Sum) ]
//              hvd_syncbn_check_packet(BACKWARD, packet)              fails if the ranks differentiate different calls
//              hvd_syncbn_backward_finish(packet, stats -> coefficients)
//              hvd_syncbn_backward_apply(units, x, dy -> dx)
//
// Statistics of a data set for one layer:
//
//   memset(total, 0)
//   for every batch: hvd_syncbn_add_packet(packet -> total)                          "pooled": this rank's packets
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

// Results of hvd_syncbn_check_packet.
enum {
  HVD_SYNCBN_OK = 0,
  HVD_SYNCBN_RANKS_DISAGREE = 1,  // forward: eps, dtype, protocol version or the need for a gradient differ
  HVD_SYNCBN_ONE_VALUE = 2,       // one value per channel in the global batch: the unbiased variance is undefined
  HVD_SYNCBN_EMPTY = 3,           // no values in the global batch: running statistics are not updated
  HVD_SYNCBN_CALLS_DIFFER = 4,    // backward: the ranks differentiate different calls of the layer
  HVD_SYNCBN_NONFINITE = 5,       // only GPUs: channels are not finite. Not an error
};

// The logical input x[n, c, s] of one rank: samples, channels, flattened spatial positions (1 for 2-D input).
typedef struct {
  int64_t n, c, s;
  int32_t dtype;   // of x, y, residual and their gradients
  int32_t layout;  // of the same tensors
} hvd_syncbn_shape;

// A per-channel vector owned by the framework. `data` may be NULL (gamma: 1, beta: 0, gradient: not needed).
typedef struct {
  void* data;
  int32_t dtype;
} hvd_syncbn_vector;

// Running statistics, and how a batch changes them: new = f32(old_weight) * old + f32(new_weight) * batch statistic.
// `unbiased` selects var*n/(n-1) (PyTorch) or var (Keras). `skip_nonfinite`: a channel that is not finite in the batch
// keeps its running statistics; otherwise they become NaN. The data of mean and var may be NULL.
typedef struct {
  hvd_syncbn_vector mean, var;
  double old_weight, new_weight;
  int32_t unbiased;
  int32_t skip_nonfinite;
} hvd_syncbn_running;

// Returns the number of int64 words in a packet of `channels` channels.
HVD_SYNCBN_API int64_t hvd_syncbn_packet_size(int64_t channels);

// Returns the size in bytes of the coefficients that *_finish writes and *_apply reads, for either direction.
HVD_SYNCBN_API int64_t hvd_syncbn_coefficients_size(const hvd_syncbn_shape* shape);

// Return the number of work units of the moment and apply kernels, and approximately how many bytes of x a unit reads,
// from which the caller computes the grain size of its thread pool.
HVD_SYNCBN_API int64_t hvd_syncbn_moments_units(const hvd_syncbn_shape* shape);
HVD_SYNCBN_API int64_t hvd_syncbn_apply_units(const hvd_syncbn_shape* shape);
HVD_SYNCBN_API int64_t hvd_syncbn_moments_unit_bytes(const hvd_syncbn_shape* shape);
HVD_SYNCBN_API int64_t hvd_syncbn_apply_unit_bytes(const hvd_syncbn_shape* shape);

// Adds the moments of units [begin, end) to `packet` (zeroed by the caller; atomic adds).
// mask: NULL, or n*s bytes [n][s]; positions with 0 do not count.
HVD_SYNCBN_API void hvd_syncbn_forward_moments(const hvd_syncbn_shape* shape, const void* x, const uint8_t* mask,
                                               int64_t begin, int64_t end, int64_t* packet);

// y: NULL, or the layer's output if the fused activation is relu (its sign masks dy).
// stats: float64 mean[c], invstd[c] from hvd_syncbn_forward_finish.
HVD_SYNCBN_API void hvd_syncbn_backward_moments(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                                const void* y, const double* stats, int64_t begin, int64_t end,
                                                int64_t* packet);

// Propagates carries and writes the header. count: values per channel on this rank (n*s, or the unmasked positions).
// call: hvd_syncbn_call_number, or 0 if that is unknown. Must be equal on all ranks.
HVD_SYNCBN_API void hvd_syncbn_forward_close(const hvd_syncbn_shape* shape, double eps, int64_t call, int64_t count,
                                             int64_t* packet);

// The number of a call in its forward packet. name: of the collective. needs_gradient: 1 if this rank will
// differentiate the call, 0 if not or if unknown.
HVD_SYNCBN_API int64_t hvd_syncbn_call_number(const char* name, int32_t needs_gradient);

HVD_SYNCBN_API void hvd_syncbn_backward_close(const hvd_syncbn_shape* shape, const double* stats, int64_t count,
                                              int64_t* packet);

// Returns the status in the header of a reduced packet, which is the same on every rank.
HVD_SYNCBN_API int32_t hvd_syncbn_check_packet(int32_t direction, const int64_t* packet);

// Returns the number of channels that are not finite on at least one rank, from a reduced packet of c channels; 0 for a
// sum of batches, which has no digest and whose batches were seen before.
HVD_SYNCBN_API int64_t hvd_syncbn_nonfinite_channels(int64_t c, const int64_t* packet);

// Adds `batches` to this process's count of a layer's batches with channels that are not finite, and returns the count.
HVD_SYNCBN_API int64_t hvd_syncbn_count_nonfinite(const char* layer, int64_t batches);

// Computes from a reduced packet stats (float64 mean[c], invstd[c]) and the coefficients for forward_apply, and updates
// the running statistics in place. An empty global batch does not change them.
// packet: NULL for a frozen layer, which is normalized by its running statistics and does not change them.
HVD_SYNCBN_API void hvd_syncbn_forward_finish(const hvd_syncbn_shape* shape, double eps, const int64_t* packet,
                                              hvd_syncbn_vector gamma, hvd_syncbn_vector beta,
                                              hvd_syncbn_running running, double* stats, void* coefficients);

// Computes the weights of a zero-debiased average (Caffe's) for hvd_syncbn_forward_finish: s = old_weight * s + 1 with
// every batch; the batch's weight is 1 / s and that of the old statistics 1 - 1 / s. With old_weight 1 all batches have
// equal weight. batches: the number of batches before this one.
HVD_SYNCBN_API void hvd_syncbn_average_weights(double old_weight, int64_t batches, double* weight_of_old,
                                               double* weight_of_new);

// Computes y = relu?(normalized x + residual?). residual: NULL, or of the shape of x. relu: 0 or 1.
HVD_SYNCBN_API void hvd_syncbn_forward_apply(const hvd_syncbn_shape* shape, const void* x, const void* residual,
                                             int32_t relu, const void* coefficients, int64_t begin, int64_t end,
                                             void* y);

// Computes this rank's dgamma and dbeta from its own closed backward packet.
HVD_SYNCBN_API void hvd_syncbn_backward_params(const hvd_syncbn_shape* shape, const int64_t* packet,
                                               const double* stats, hvd_syncbn_vector dgamma, hvd_syncbn_vector dbeta);

// Computes the coefficients for backward_apply from a reduced backward packet.
// packet: NULL for a frozen layer. Its statistics have no gradient, so dx is a * dy and does not depend on x.
HVD_SYNCBN_API void hvd_syncbn_backward_finish(const hvd_syncbn_shape* shape, const int64_t* packet,
                                               const double* stats, hvd_syncbn_vector gamma, void* coefficients);

// Computes dx and, unless it is NULL, dresidual, which is dy masked by the activation. mask and y: as for the moments;
// a masked position does not affect the statistics, so its dx is a * dy.
HVD_SYNCBN_API void hvd_syncbn_backward_apply(const hvd_syncbn_shape* shape, const void* x, const void* dy,
                                              const void* y, const uint8_t* mask, const void* coefficients,
                                              int64_t begin, int64_t end, void* dx, void* dresidual);

// The contents of the `total` of a data set.
enum {
  HVD_SYNCBN_POOLED = 0,   // sums of all values: hvd_syncbn_add_packet
  HVD_SYNCBN_BATCHES = 1,  // sums of the means and unbiased variances of global batches: hvd_syncbn_add_batch
};

// Adds a closed packet to `total`, which has the layout of a packet: count, nonfinite counters and exact sums. Carries
// are propagated, so that any number of packets and the totals of 2^22 ranks can be added. The other words of the
// header do not change.
HVD_SYNCBN_API void hvd_syncbn_add_packet(int64_t channels, const int64_t* packet, int64_t* total);

// Adds the mean and the unbiased variance of a reduced packet's batch to `total`, each as an exact sum, and counts the
// batch. HVD_SYNCBN_EMPTY, HVD_SYNCBN_ONE_VALUE: the batch has no unbiased variance, and `total` does not change.
HVD_SYNCBN_API int32_t hvd_syncbn_add_batch(int64_t channels, const int64_t* packet, int64_t* total);

// Writes population statistics from the `total` of all ranks. For HVD_SYNCBN_POOLED, `unbiased` selects var*n/(n-1) or
// var; HVD_SYNCBN_BATCHES is always unbiased. gamma and beta, unless their data is NULL, become sqrt(variance + eps)
// and mean of the written vectors, which makes the layer the identity.
// HVD_SYNCBN_EMPTY, HVD_SYNCBN_ONE_VALUE: nothing is written.
HVD_SYNCBN_API int32_t hvd_syncbn_population(int64_t channels, const int64_t* total, int32_t estimator,
                                             int32_t unbiased, double eps, hvd_syncbn_vector mean,
                                             hvd_syncbn_vector variance, hvd_syncbn_vector gamma,
                                             hvd_syncbn_vector beta);

// Requests huge pages for a new output of 4 MiB or more, because page faults can take longer than the arithmetic. This
// is only a hint to the system.
HVD_SYNCBN_API void hvd_syncbn_prefer_huge_pages(void* data, int64_t bytes);

// Return the instruction-set path in use ("baseline", "avx2", "avx512"), and all that this machine can run, separated
// by commas.
HVD_SYNCBN_API const char* hvd_syncbn_isa(void);
HVD_SYNCBN_API const char* hvd_syncbn_isas(void);
// Switches the path of this process (for tests) and returns 0, or -1 if this machine cannot run it. The environment
// variable HVD_SYNCBN_ISA sets the path at load time.
HVD_SYNCBN_API int32_t hvd_syncbn_set_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif  // HVD_SYNCBN_CORE_H_
