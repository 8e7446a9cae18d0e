// The table of one instruction-set path's kernels; dispatch.cc picks a table at run time.
#ifndef HVD_SYNCBN_CPU_KERNELS_H_
#define HVD_SYNCBN_CPU_KERNELS_H_

#include "../include/hvd_syncbn/core.h"

namespace hvd_syncbn {

// Channels that one unit of the moment kernels covers, at most. Channels last, memory is read at speed only if (nearly)
// whole rows are; the sums of 1024 channels stay in the second-level cache, and with them 32 lanes of 512. Channels
// first, small tiles give threads more units.
constexpr int kMaxTile = 1024;
constexpr int kMaxLaneTile = 512;

inline int tile_width(const hvd_syncbn_shape& shape) {
  if (shape.layout == HVD_SYNCBN_CHANNELS_LAST || shape.s == 1) {
    const int widest = shape.s == 1 ? kMaxTile : kMaxLaneTile;
    const int64_t tiles = (shape.c + widest - 1) / widest;
    return tiles < 2 ? widest : static_cast<int>(((shape.c + tiles - 1) / tiles + 15) / 16 * 16);
  }
  return shape.s < 1024 ? 64 : 16;
}

#define HVD_SYNCBN_DECLARE_KERNELS(path)                                                                              \
  namespace path {                                                                                                    \
  void forward_moments(const hvd_syncbn_shape& shape, const void* x, const uint8_t* mask, int64_t begin, int64_t end, \
                       int64_t* packet);                                                                              \
  void backward_moments(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y,                  \
                        const double* stats, int64_t begin, int64_t end, int64_t* packet);                            \
  void forward_apply(const hvd_syncbn_shape& shape, const void* x, const void* residual, int32_t relu,                \
                     const void* coefficients, int64_t begin, int64_t end, void* y);                                  \
  void backward_apply(const hvd_syncbn_shape& shape, const void* x, const void* dy, const void* y,                    \
                      const uint8_t* mask, const void* coefficients, int64_t begin, int64_t end, void* dx,            \
                      void* dresidual);                                                                               \
  void forward_finish(const hvd_syncbn_shape& shape, double eps, const int64_t* packet,                               \
                      const hvd_syncbn_vector& gamma, const hvd_syncbn_vector& beta,                                  \
                      const hvd_syncbn_vector& running_mean, const hvd_syncbn_vector& running_var, double old_weight, \
                      double new_weight, int32_t unbiased, double* stats, void* coefficients);                        \
  void backward_params(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,                     \
                       const hvd_syncbn_vector& dgamma, const hvd_syncbn_vector& dbeta);                              \
  void backward_finish(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,                     \
                       const hvd_syncbn_vector& gamma, void* coefficients);                                           \
  }

HVD_SYNCBN_DECLARE_KERNELS(baseline)
HVD_SYNCBN_DECLARE_KERNELS(avx2)
HVD_SYNCBN_DECLARE_KERNELS(avx512)

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CPU_KERNELS_H_
