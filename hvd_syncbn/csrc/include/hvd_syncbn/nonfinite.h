// The warning of both adapters about channels that are not finite.
#ifndef HVD_SYNCBN_NONFINITE_H_
#define HVD_SYNCBN_NONFINITE_H_

#include <mutex>
#include <string>
#include <unordered_set>

#include "hvd_syncbn/core.h"

namespace hvd_syncbn {

// The text of the warning where channels of a reduced forward packet are not finite, once per layer; otherwise empty.
inline std::string nonfinite_warning(const std::string& layer, int64_t c, const int64_t* packet) {
  const int64_t channels = hvd_syncbn_nonfinite_channels(c, packet);
  if (channels == 0) return {};
  static std::mutex mutex;
  static std::unordered_set<std::string> warned;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!warned.insert(layer).second) return {};
  return "layer '" + layer +
         "': the input is NaN, infinite or out of range on at least one rank. In these channels the " +
         "output is NaN, and the running statistics keep their values. Check the input, the learning rate and, with "
         "mixed " +
         "precision, the loss scale. This warning is shown once per layer. Received: " + std::to_string(channels) +
         " of " + std::to_string(c) + " channels that are not finite";
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_NONFINITE_H_
