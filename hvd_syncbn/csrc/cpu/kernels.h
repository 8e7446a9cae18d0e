// The kernels of each instruction-set path; dispatch.cc selects a path at run time.
#ifndef HVD_SYNCBN_CPU_KERNELS_H_
#define HVD_SYNCBN_CPU_KERNELS_H_

#include "../common/exact_sum.h"
#include "../include/hvd_syncbn/core.h"

namespace hvd_syncbn {

// Channels of one unit of the moment kernels. Channels last, full memory bandwidth needs reads of whole rows; channels
// first, small tiles give threads more units.
constexpr int kMaxTile = 2048;
// The pitch of float64 arrays of a tile: with a power of two, all values of a channel would map to one cache set.
constexpr int kPitch = kMaxTile + 56;

inline int tile_width(const hvd_syncbn_shape& shape) {
  if (shape.layout != HVD_SYNCBN_CHANNELS_LAST && shape.s != 1) return shape.s < 1024 ? 64 : 16;
  // With few samples, narrower tiles give every thread a unit.
  const int64_t pieces = shape.n * ((shape.s + kPiece - 1) / kPiece);
  int64_t tiles = shape.c > kMaxTile ? (shape.c + kMaxTile - 1) / kMaxTile : 1;
  while (pieces * tiles < 16 && shape.c / tiles > 128) tiles *= 2;
  return tiles < 2 ? kMaxTile : static_cast<int>(((shape.c + tiles - 1) / tiles + 15) / 16 * 16);
}

#define HVD_SYNCBN_DECLARE_KERNELS(path)                                                                               \
  namespace path {                                                                                                     \
  void forward_moments(const hvd_syncbn_shape& shape, const void* x, const uint8_t* mask, int64_t begin, int64_t end,  \
                       int64_t* packet);                                                                               \
  void backward_moments(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y,                   \
                        const double* stats, int64_t begin, int64_t end, int64_t* packet);                             \
  void forward_apply(const hvd_syncbn_shape& shape, const void* x, const void* residual, int32_t relu,                 \
                     const void* coefficients, int64_t begin, int64_t end, void* y);                                   \
  void backward_apply(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y,                     \
                      const uint8_t* mask, const void* coefficients, int64_t begin, int64_t end, void* dx,             \
                      void* dresidual);                                                                                \
  void forward_finish(const hvd_syncbn_shape& shape, double eps, const int64_t* packet,                                \
                      const hvd_syncbn_vector& gamma, const hvd_syncbn_vector& beta, const hvd_syncbn_running& moving, \
                      double* stats, void* coefficients);                                                              \
  void backward_params(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,                      \
                       const hvd_syncbn_vector& dgamma, const hvd_syncbn_vector& dbeta);                               \
  void backward_finish(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,                      \
                       const hvd_syncbn_vector& gamma, void* coefficients);                                            \
  }

// Not in the instruction-set paths, because they run a few times per data set, not per step (population.cc).
void add_packet(int64_t c, const int64_t* packet, int64_t* total);
int32_t add_batch(int64_t c, const int64_t* packet, int64_t* total);
int32_t population(int64_t c, const int64_t* total, int32_t estimator, int32_t unbiased, double eps,
                   const hvd_syncbn_vector& mean, const hvd_syncbn_vector& variance, const hvd_syncbn_vector& gamma,
                   const hvd_syncbn_vector& beta);

HVD_SYNCBN_DECLARE_KERNELS(baseline)
HVD_SYNCBN_DECLARE_KERNELS(avx2)
HVD_SYNCBN_DECLARE_KERNELS(avx512)

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_KERNELS_H_
