// Access to the elements of a framework's per-channel vectors of any type.
#ifndef HVD_SYNCBN_COMMON_VECTORS_H_
#define HVD_SYNCBN_COMMON_VECTORS_H_

#include "../include/hvd_syncbn/core.h"
#include "dtypes.h"

namespace hvd_syncbn {

// Calls work with a typed pointer to the elements, unless `data` is NULL.
template <class Work>
HVD_SYNCBN_HD void with_elements(const hvd_syncbn_vector& vector, const Work& work) {
  if (vector.data == nullptr) return;
  switch (vector.dtype) {
    case HVD_SYNCBN_FLOAT32:
      return work(static_cast<float*>(vector.data));
    case HVD_SYNCBN_FLOAT64:
      return work(static_cast<double*>(vector.data));
    case HVD_SYNCBN_FLOAT16:
      return work(static_cast<Half*>(vector.data));
    default:
      return work(static_cast<BFloat16*>(vector.data));
  }
}

HVD_SYNCBN_HD double read(const hvd_syncbn_vector& vector, int64_t i, double absent) {
  double value = absent;
  with_elements(vector, [&](const auto* elements) { value = widen(elements[i]); });
  return value;
}

HVD_SYNCBN_HD void write(const hvd_syncbn_vector& vector, int64_t i, double value) {
  with_elements(vector, [&](auto* elements) { narrow(value, elements + i); });
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_VECTORS_H_
