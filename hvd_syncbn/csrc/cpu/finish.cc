// Per-channel work between the collective and the apply kernels: statistics, running statistics, coefficients,
// parameter gradients.
//
// Traffic: a packet of 136 bytes per channel and a few vectors. One thread.
#include "../common/finish.h"

#include "../common/vectors.h"
#include "kernels.h"
#include "simd.h"

namespace hvd_syncbn {
namespace HVD_SYNCBN_PATH {
namespace {

// Reads the exact sums of V::N channels that start at `limbs`.
template <class V>
HVD_SYNCBN_INLINE DoubleDouble<V> read_sums(const int64_t* limbs) {
  typename V::Bits columns[kLimbs];
  V::Bits::load_columns(limbs, columns);
  return read_limbs<V>(columns);
}

// Calls wide(i) for channels i .. i + F64::N of [begin, end) if all their sums are finite and over n > 0 values, and
// one(i) for the other channels.
template <class Wide, class One>
HVD_SYNCBN_INLINE void for_channels(const int64_t* packet, int64_t begin, int64_t end, const Wide& wide,
                                    const One& one) {
  for (int64_t i = begin; i < end;) {
    if constexpr (F64::N > 1) {
      bool numbers = i + F64::N <= end && packet[1] != 0;
      for (int j = 0; numbers && j < F64::N; ++j) numbers = packet[nonfinite_at(i + j)] == 0;
      if (numbers) {
        wide(i);
        i += F64::N;
        continue;
      }
    }
    one(i++);
  }
}

// Channels are processed in blocks, between loops that are specialized for the types of the arrays.
constexpr int kBlock = 64;

template <class Work>
HVD_SYNCBN_INLINE void for_blocks(int64_t c, const Work& work) {
  for (int64_t begin = 0; begin < c; begin += kBlock) work(begin, c - begin < kBlock ? c : begin + kBlock);
}

HVD_SYNCBN_INLINE void read_block(const hvd_syncbn_vector& vector, int64_t begin, int64_t end, double absent,
                                  double* values) {
  for (int64_t i = begin; i < end && vector.data == nullptr; ++i) values[i - begin] = absent;
  with_elements(vector, [&](const auto* elements) {
    for (int64_t i = begin; i < end; ++i) values[i - begin] = widen(elements[i]);
  });
}

HVD_SYNCBN_INLINE void write_block(const hvd_syncbn_vector& vector, int64_t begin, int64_t end, const double* values) {
  with_elements(vector, [&](auto* elements) {
    for (int64_t i = begin; i < end; ++i) narrow(values[i - begin], elements + i);
  });
}

// Updates running statistics with those of the batch.
void update(const hvd_syncbn_vector& vector, int64_t begin, int64_t end, double keep, double take, bool skip_nonfinite,
            const double* batch) {
  with_elements(vector, [&](auto* elements) {
    for (int64_t i = begin; i < end; ++i) {
      narrow(running(keep, widen(elements[i]), take, batch[i - begin], skip_nonfinite), elements + i);
    }
  });
}

// Reads mean and 1 / standard deviation of a frozen layer from its running statistics.
void read_stored(const hvd_syncbn_running& moving, double eps, int64_t begin, int64_t end, double* mean,
                 double* invstd) {
  double var[kBlock];
  read_block(moving.mean, begin, end, 0.0, mean);
  read_block(moving.var, begin, end, 1.0, var);
  for (int64_t i = 0; i < end - begin; ++i) invstd[i] = stored_statistics(mean[i], var[i], eps).invstd;
}

// Coefficients are stored as consecutive arrays of c values.
template <class T>
HVD_SYNCBN_INLINE void write_forward_coefficients(int64_t begin, int64_t end, int64_t c, const double* stats,
                                                  const double* gamma, const double* beta, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    const ForwardCoefficients<T> k = forward_coefficients<T>(stats[i], stats[c + i], gamma[i - begin], beta[i - begin]);
    out[i] = k.pivot;
    out[c + i] = k.scale;
    out[2 * c + i] = k.scale_lo;
    out[3 * c + i] = k.shift;
    out[4 * c + i] = k.shift_lo;
  }
}

template <class T>
HVD_SYNCBN_INLINE void write_backward_coefficients(int64_t begin, int64_t end, int64_t c, const double* stats,
                                                   const double* gamma, const double* dy, const double* dyd, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    const BackwardCoefficients<T> k =
        backward_coefficients<T>(stats[i], stats[c + i], gamma[i - begin], {dy[i - begin], dyd[i - begin]});
    out[i] = k.unit;
    out[c + i] = k.scale;
    out[2 * c + i] = k.scale_lo;
    out[3 * c + i] = k.slope;
    out[4 * c + i] = k.shift;
    out[5 * c + i] = k.shift_lo;
  }
}

}  // namespace

void forward_finish(const hvd_syncbn_shape& shape, double eps, const int64_t* packet, const hvd_syncbn_vector& gamma,
                    const hvd_syncbn_vector& beta, const hvd_syncbn_running& moving, double* stats,
                    void* coefficients) {
  const int64_t c = shape.c;
  const double keep = static_cast<float>(moving.old_weight), take = static_cast<float>(moving.new_weight);
  for_blocks(c, [&](int64_t begin, int64_t end) {
    double var[kBlock], g[kBlock], b[kBlock];
    if (packet == nullptr) {
      read_stored(moving, eps, begin, end, stats + begin, stats + c + begin);
    } else {
      const double n = static_cast<double>(packet[1]);
      for_channels(
          packet, begin, end,
          [&](auto i) {
            const Statistics<F64> s =
                statistics(read_sums<F64>(packet + moment_a_at(c, i)), read_sums<F64>(packet + moment_b_at(c, i)),
                           F64::splat(n), F64::splat(eps));
            s.mean.keep(stats + i);
            s.invstd.keep(stats + c + i);
            s.var.keep(var + i - begin);
          },
          [&](int64_t i) {
            const Statistics<double> s = statistics(packet, c, i, eps);
            stats[i] = s.mean;
            stats[c + i] = s.invstd;
            var[i - begin] = s.var;
          });
      if (packet[1] != 0) {
        const bool skip_nonfinite = moving.skip_nonfinite != 0;
        update(moving.mean, begin, end, keep, take, skip_nonfinite, stats + begin);
        for (int64_t i = begin; i < end && moving.unbiased; ++i) var[i - begin] = unbiased(var[i - begin], n);
        update(moving.var, begin, end, keep, take, skip_nonfinite, var);
      }
    }
    read_block(gamma, begin, end, 1.0, g);
    read_block(beta, begin, end, 0.0, b);
    if (shape.dtype == HVD_SYNCBN_FLOAT64) {
      write_forward_coefficients(begin, end, c, stats, g, b, static_cast<double*>(coefficients));
    } else {
      write_forward_coefficients(begin, end, c, stats, g, b, static_cast<float*>(coefficients));
    }
  });
}

void backward_params(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,
                     const hvd_syncbn_vector& dgamma, const hvd_syncbn_vector& dbeta) {
  const int64_t c = shape.c;
  for_blocks(c, [&](int64_t begin, int64_t end) {
    double dgamma_of[kBlock], dbeta_of[kBlock];
    for_channels(
        packet, begin, end,
        [&](auto i) {
          const F64 invstd = F64::load(stats + c + i);
          const ParameterGradients<F64> g = parameter_gradients(read_sums<F64>(packet + moment_a_at(c, i)),
                                                                read_sums<F64>(packet + moment_b_at(c, i)), invstd);
          g.dgamma.keep(dgamma_of + i - begin);
          g.dbeta.keep(dbeta_of + i - begin);
        },
        [&](int64_t i) {
          const ParameterGradients<double> g = parameter_gradients(packet, c, i, stats[i], stats[c + i]);
          dgamma_of[i - begin] = g.dgamma;
          dbeta_of[i - begin] = g.dbeta;
        });
    write_block(dgamma, begin, end, dgamma_of);
    write_block(dbeta, begin, end, dbeta_of);
  });
}

void backward_finish(const hvd_syncbn_shape& shape, const int64_t* packet, const double* stats,
                     const hvd_syncbn_vector& gamma, void* coefficients) {
  const int64_t c = shape.c;
  for_blocks(c, [&](int64_t begin, int64_t end) {
    double dy[kBlock] = {}, dyd[kBlock] = {}, g[kBlock];
    if (packet != nullptr) {
      const F64 n = F64::splat(static_cast<double>(packet[1]));
      for_channels(
          packet, begin, end,
          [&](auto i) {
            const GradientMeans<F64> means =
                gradient_means(read_sums<F64>(packet + moment_a_at(c, i)), read_sums<F64>(packet + moment_b_at(c, i)),
                               n, F64::load(stats + c + i));
            means.dy.keep(dy + i - begin);
            means.dyd.keep(dyd + i - begin);
          },
          [&](int64_t i) {
            const GradientMeans<double> means = gradient_means(packet, c, i, stats[c + i]);
            dy[i - begin] = means.dy;
            dyd[i - begin] = means.dyd;
          });
    }
    read_block(gamma, begin, end, 1.0, g);
    if (shape.dtype == HVD_SYNCBN_FLOAT64) {
      write_backward_coefficients(begin, end, c, stats, g, dy, dyd, static_cast<double*>(coefficients));
    } else {
      write_backward_coefficients(begin, end, c, stats, g, dy, dyd, static_cast<float*>(coefficients));
    }
  });
}

}  // namespace HVD_SYNCBN_PATH
}  // namespace hvd_syncbn
