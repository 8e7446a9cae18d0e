// Elements of a framework's per-channel vectors, whatever type it keeps them in.
#ifndef HVD_SYNCBN_COMMON_VECTORS_H_
#define HVD_SYNCBN_COMMON_VECTORS_H_

#include "../include/hvd_syncbn/core.h"
#include "dtypes.h"

namespace hvd_syncbn {

HVD_SYNCBN_HD double read(const hvd_syncbn_vector& vector, int64_t i, double absent) {
  if (vector.data == nullptr) return absent;
  switch (vector.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return static_cast<const float*>(vector.data)[i];
    case HVD_SYNCBN_FLOAT64:
      return static_cast<const double*>(vector.data)[i];
    case HVD_SYNCBN_FLOAT16:
      return widen(static_cast<const Half*>(vector.data)[i]);
    default:
      return widen(static_cast<const BFloat16*>(vector.data)[i]);
  }
}

HVD_SYNCBN_HD void write(const hvd_syncbn_vector& vector, int64_t i, double value) {
  if (vector.data == nullptr) return;
  switch (vector.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return narrow(value, static_cast<float*>(vector.data) + i);
    case HVD_SYNCBN_FLOAT64:
      return narrow(value, static_cast<double*>(vector.data) + i);
    case HVD_SYNCBN_FLOAT16:
      return narrow(value, static_cast<Half*>(vector.data) + i);
    default:
      return narrow(value, static_cast<BFloat16*>(vector.data) + i);
  }
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_VECTORS_H_
