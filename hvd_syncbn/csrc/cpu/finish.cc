// Per-channel work between the collective and the apply kernels: statistics, running statistics, coefficients,
// parameter gradients.
//
// Traffic: a packet of 136 bytes per channel, a few vectors. One thread, a vector of channels at a time.
#include "../common/finish.h"

#include "../common/vectors.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

// Of V::N channels: the exact sums that lie from `limbs` on.
template <class V>
HVD_SYNCBN_INLINE DoubleDouble<V> read_sums(const int64_t* limbs) {
  double digits[kDigits * V::N];
  for (int i = 0; i < V::N; ++i) read_digits(limbs + i * kLimbs, V::N, digits + i);
  return add_digits<V>([&](int i) { return V::load(digits + i * V::N); });
}

// Calls wide(i) for channels i .. i + F64::N of which every sum is a number over n > 0 values, one(i) for the others.
template <class Wide, class One>
HVD_SYNCBN_INLINE void for_channels(const int64_t* packet, int64_t c, const Wide& wide, const One& one) {
  for (int64_t i = 0; i < c;) {
    bool numbers = i + F64::N <= c && packet[1] != 0;
    for (int j = 0; numbers && j < F64::N; ++j) numbers = packet[nonfinite_at(i + j)] == 0;
    if (numbers) {
      wide(i);
      i += F64::N;
    } else {
      one(i++);
    }
  }
}

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
  const auto write_one = [&](int64_t i, GradientMeans<double> means) {
    const BackwardCoefficients<T> k = backward_coefficients<T>(stats[i], stats[c + i], read(gamma, i, 1.0), means);
    out[i] = k.mean_hi;
    out[c + i] = k.mean_lo;
    out[2 * c + i] = k.scale;
    out[3 * c + i] = k.c1;
    out[4 * c + i] = k.c2;
  };
  const F64 n = F64::splat(static_cast<double>(packet[1]));
  for_channels(
      packet, c,
      [&](int64_t i) {
        const GradientMeans<F64> means =
            gradient_means(read_sums<F64>(packet + moment_a_at(c, i)), read_sums<F64>(packet + moment_b_at(c, i)), n,
                           F64::load(stats + c + i));
        double dy[F64::N], dyd[F64::N];
        means.dy.keep(dy);
        means.dyd.keep(dyd);
        for (int j = 0; j < F64::N; ++j) write_one(i + j, {dy[j], dyd[j]});
      },
      [&](int64_t i) { write_one(i, gradient_means(packet, c, i, stats[c + i])); });
}

}  // namespace

void forward_finish(const hvd_syncbn_shape& shape, double eps, const int64_t* packet, const hvd_syncbn_vector& gamma,
                    const hvd_syncbn_vector& beta, const hvd_syncbn_vector& running_mean,
                    const hvd_syncbn_vector& running_var, double old_weight, double new_weight, int32_t unbiased,
                    double* stats, void* coefficients) {
  const int64_t c = shape.c;
  const double n = static_cast<double>(packet[1]);
  const double keep = static_cast<float>(old_weight), take = static_cast<float>(new_weight);
  const auto update = [&](int64_t i, double mean, double var) {
    if (packet[1] == 0) return;
    write(running_mean, i, running(keep, read(running_mean, i, 0.0), take, mean));
    write(running_var, i,
          running(keep, read(running_var, i, 0.0), take, unbiased ? hvd_syncbn::unbiased(var, n) : var));
  };
  for_channels(
      packet, c,
      [&](int64_t i) {
        const Statistics<F64> s =
            statistics(read_sums<F64>(packet + moment_a_at(c, i)), read_sums<F64>(packet + moment_b_at(c, i)),
                       F64::splat(n), F64::splat(eps));
        double var[F64::N];
        s.mean.keep(stats + i);
        s.invstd.keep(stats + c + i);
        s.var.keep(var);
        for (int j = 0; j < F64::N; ++j) update(i + j, stats[i + j], var[j]);
      },
      [&](int64_t i) {
        const Statistics<double> s = statistics(packet, c, i, eps);
        stats[i] = s.mean;
        stats[c + i] = s.invstd;
        update(i, s.mean, s.var);
      });
  if (shape.dtype == HVD_SYNCBN_FLOAT64) {
    write_forward_coefficients<double>(c, stats, gamma, beta, static_cast<double*>(coefficients));
  } else {
    write_forward_coefficients<float>(c, stats, gamma, beta, static_cast<float*>(coefficients));
  }
}

void backward_params(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,
                     const hvd_syncbn_vector& dgamma, const hvd_syncbn_vector& dbeta) {
  const int64_t c = shape.c;
  const auto write_one = [&](int64_t i, double dgamma_i, double dbeta_i) {
    write(dgamma, i, dgamma_i);
    write(dbeta, i, dbeta_i);
  };
  for_channels(
      packet, c,
      [&](int64_t i) {
        const F64 invstd = F64::load(stats + c + i);
        const ParameterGradients<F64> g = parameter_gradients(read_sums<F64>(packet + moment_a_at(c, i)),
                                                              read_sums<F64>(packet + moment_b_at(c, i)), invstd);
        double dgamma_i[F64::N], dbeta_i[F64::N];
        g.dgamma.keep(dgamma_i);
        g.dbeta.keep(dbeta_i);
        for (int j = 0; j < F64::N; ++j) write_one(i + j, dgamma_i[j], dbeta_i[j]);
      },
      [&](int64_t i) {
        const ParameterGradients<double> g = parameter_gradients(packet, c, i, stats[i], stats[c + i]);
        write_one(i, g.dgamma, g.dbeta);
      });
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
