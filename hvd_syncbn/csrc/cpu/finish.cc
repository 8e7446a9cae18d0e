// Per-channel work between the collective and the apply kernels: statistics, running statistics, coefficients,
// parameter gradients.
//
// Traffic: a packet of 136 bytes per channel, a few vectors. One thread.
#include "../common/finish.h"

#include "../common/vectors.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

// The coefficients lie as arrays of c values, one after another.
template <class T>
void write_forward_coefficients(int64_t c, const double* stats, const hvd_syncbn_vector& gamma,
                                const hvd_syncbn_vector& beta, T* out) {
  for (int64_t i = 0; i < c; ++i) {
    const ForwardCoefficients<T> k =
        forward_coefficients<T>(stats[i], stats[c + i], read(gamma, i, 1.0), read(beta, i, 0.0));
    out[i] = k.mean_hi;
    out[c + i] = k.mean_lo;
    out[2 * c + i] = k.scale;
    out[3 * c + i] = k.shift;
  }
}

template <class T>
void write_backward_coefficients(int64_t c, const int64_t* packet, const double* stats, const hvd_syncbn_vector& gamma,
                                 T* out) {
  for (int64_t i = 0; i < c; ++i) {
    const BackwardCoefficients<T> k =
        backward_coefficients<T>(packet, c, i, stats[i], stats[c + i], read(gamma, i, 1.0));
    out[i] = k.mean_hi;
    out[c + i] = k.mean_lo;
    out[2 * c + i] = k.scale;
    out[3 * c + i] = k.c1;
    out[4 * c + i] = k.c2;
  }
}

}  // namespace

void forward_finish(const hvd_syncbn_shape& shape, double eps, const int64_t* packet, const hvd_syncbn_vector& gamma,
                    const hvd_syncbn_vector& beta, const hvd_syncbn_vector& running_mean,
                    const hvd_syncbn_vector& running_var, double old_weight, double new_weight, int32_t unbiased,
                    double* stats, void* coefficients) {
  const int64_t c = shape.c;
  const double n = static_cast<double>(packet[1]);
  const double keep = static_cast<float>(old_weight), take = static_cast<float>(new_weight);
  for (int64_t i = 0; i < c; ++i) {
    const Statistics s = statistics(packet, c, i, eps);
    stats[i] = s.mean;
    stats[c + i] = s.invstd;
    if (packet[1] == 0) continue;
    const double var = unbiased ? hvd_syncbn::unbiased(s.var, n) : s.var;
    write(running_mean, i, running(keep, read(running_mean, i, 0.0), take, s.mean));
    write(running_var, i, running(keep, read(running_var, i, 0.0), take, var));
  }
  if (shape.dtype == HVD_SYNCBN_FLOAT64) {
    write_forward_coefficients<double>(c, stats, gamma, beta, static_cast<double*>(coefficients));
  } else {
    write_forward_coefficients<float>(c, stats, gamma, beta, static_cast<float*>(coefficients));
  }
}

void backward_params(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,
                     const hvd_syncbn_vector& dgamma, const hvd_syncbn_vector& dbeta) {
  for (int64_t i = 0; i < shape.c; ++i) {
    const ParameterGradients g = parameter_gradients(packet, shape.c, i, stats[i], stats[shape.c + i]);
    write(dgamma, i, g.dgamma);
    write(dbeta, i, g.dbeta);
  }
}

void backward_finish(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,
                     const hvd_syncbn_vector& gamma, void* coefficients) {
  if (shape.dtype == HVD_SYNCBN_FLOAT64) {
    write_backward_coefficients<double>(shape.c, packet, stats, gamma, static_cast<double*>(coefficients));
  } else {
    write_backward_coefficients<float>(shape.c, packet, stats, gamma, static_cast<float*>(coefficients));
  }
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn
