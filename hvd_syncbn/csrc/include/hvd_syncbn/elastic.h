// Advice that both adapters add to errors in an elastic job.
#ifndef HVD_SYNCBN_ELASTIC_H_
#define HVD_SYNCBN_ELASTIC_H_

#include <cstdlib>
#include <cstring>

namespace hvd_syncbn {

// Returns the end of the message about a global batch of one value per channel. The error is not a
// HorovodInternalError, because hvd.elastic.run would restore and fail on the same batch in an endless loop. Only the
// launcher can wait for another worker.
inline const char* one_value_advice() {
  const char* const elastic = std::getenv("HOROVOD_ELASTIC");
  if (elastic == nullptr || std::strcmp(elastic, "1") != 0) return "";
  return " If this elastic job has lost ranks, start it with `horovodrun --min-np 2` or more, so that the remaining "
         "ranks wait for another worker, and with `--blacklist-cooldown-range 10 100`, so that a worker is restarted "
         "on a host where one failed.";
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_ELASTIC_H_
