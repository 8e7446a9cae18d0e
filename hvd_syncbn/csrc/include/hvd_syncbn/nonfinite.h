// The warning of both adapters about channels that are not finite.
#ifndef HVD_SYNCBN_NONFINITE_H_
#define HVD_SYNCBN_NONFINITE_H_

#include <string>

#include "hvd_syncbn/core.h"

namespace hvd_syncbn {

// Counts a batch of a layer with channels that are not finite. Returns the text of the warning for the first one,
// otherwise an empty string. `received` ends the message.
inline std::string count_nonfinite(const std::string& layer, const std::string& received) {
  if (hvd_syncbn_count_nonfinite(layer.c_str(), 1) != 1) return {};
  return "layer '" + layer +
         "': the input is NaN, infinite or out of range on at least one rank. In these channels the output is NaN, and "
         "the running statistics keep their values (with skip_nonfinite=False they become NaN). Check the input, the "
         "learning rate and, with mixed precision, the loss scale. This warning is shown once per layer; diagnose() "
         "shows the number of such batches. Received: " +
         received;
}

// The same for a reduced forward packet, if channels of it are not finite.
inline std::string count_nonfinite(const std::string& layer, int64_t c, const int64_t* packet) {
  const int64_t channels = hvd_syncbn_nonfinite_channels(c, packet);
  if (channels == 0) return {};
  return count_nonfinite(layer,
                         std::to_string(channels) + " of " + std::to_string(c) + " channels that are not finite");
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_NONFINITE_H_
