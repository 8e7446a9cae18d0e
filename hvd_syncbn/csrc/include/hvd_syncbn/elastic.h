// What both adapters add to their errors in an elastic job of Horovod.
#ifndef HVD_SYNCBN_ELASTIC_H_
#define HVD_SYNCBN_ELASTIC_H_

#include <cstdlib>
#include <cstring>

namespace hvd_syncbn {

// Ends the message about a global batch of one value per channel. It is no HorovodInternalError: hvd.elastic.run would
// restore and meet the same batch at once, again and again. Only the launcher can wait for another worker.
inline const char* one_value_advice() {
  const char* const elastic = std::getenv("HOROVOD_ELASTIC");
  if (elastic == nullptr || std::strcmp(elastic, "1") != 0) return "";
  return " If this elastic job has lost ranks: start it with `horovodrun --min-np 2`, or more, which makes those that "
         "are "
         "left wait for another worker, and `--blacklist-cooldown-range 10 100`, which starts one where one has "
         "failed.";
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_ELASTIC_H_
