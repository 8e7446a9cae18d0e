// Statistics of a data set from the packets of its batches (docs/protocol.md, 9).
//
// Traffic: a packet of 136 bytes per channel and batch. One thread.
#include "../common/finish.h"
#include "../common/vectors.h"
#include "kernels.h"

namespace hvd_syncbn {

void add_packet(int64_t c, const int64_t* packet, int64_t* total) {
  total[1] += packet[1];
  for (int64_t i = kHeader; i < packet_size(c); ++i) total[i] += packet[i];
  for (int64_t i = 0; i < c; ++i) {
    normalize(total + moment_a_at(c, i));
    normalize(total + moment_b_at(c, i));
  }
}

int32_t add_batch(int64_t c, const int64_t* packet, int64_t* total) {
  const int64_t n = packet[1];
  if (n < 2) return n == 0 ? HVD_SYNCBN_EMPTY : HVD_SYNCBN_ONE_VALUE;
  total[1] += 1;
  for (int64_t i = 0; i < c; ++i) {
    const Statistics<double> s = statistics(packet, c, i, 0);  // a NaN counts as nonfinite
    int64_t* const mean = total + moment_a_at(c, i);
    int64_t* const var = total + moment_b_at(c, i);
    deposit(s.mean, mean, total + nonfinite_at(i));
    deposit(unbiased(s.var, static_cast<double>(n)), var, total + nonfinite_at(i));
    normalize(mean);
    normalize(var);
  }
  return HVD_SYNCBN_OK;
}

int32_t population(int64_t c, const int64_t* total, int32_t estimator, int32_t unbiased, double eps,
                   const hvd_syncbn_vector& mean, const hvd_syncbn_vector& variance, const hvd_syncbn_vector& gamma,
                   const hvd_syncbn_vector& beta) {
  const int64_t n = total[1];
  if (n == 0) return HVD_SYNCBN_EMPTY;
  if (n == 1 && estimator == HVD_SYNCBN_POOLED) return HVD_SYNCBN_ONE_VALUE;
  const double count = static_cast<double>(n);
  for (int64_t i = 0; i < c; ++i) {
    Statistics<double> s;
    if (estimator == HVD_SYNCBN_POOLED) {
      s = statistics(total, c, i, eps);
      if (unbiased) s.var = hvd_syncbn::unbiased(s.var, count);
    } else if (total[nonfinite_at(i)] != 0) {
      s.mean = s.var = canonical_nan<double>();
    } else {
      s.mean = divide(read_sum(total + moment_a_at(c, i)), count).hi;
      s.var = divide(read_sum(total + moment_b_at(c, i)), count).hi;
    }
    write(mean, i, s.mean);
    write(variance, i, s.var);
    write(gamma, i, square_root(read(variance, i, s.var) + eps));
    write(beta, i, read(mean, i, s.mean));
  }
  return HVD_SYNCBN_OK;
}

}  // namespace hvd_syncbn
