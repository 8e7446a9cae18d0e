// Ranks of one host that exchange through shared memory: every rank is a process here. Prints what they found.
// Arguments:
//
// reductions RANKS FOLDER: results beside those of one process, at all sizes that are exchanged in different ways
//
// ends HOW RANKS FOLDER: how the others end when the last rank is killed, has left or is stopped
//
// falls_back WHY FOLDER: how many of two ranks share memory in FOLDER where something prevents it
//
// stale FOLDER: whether ranks start beside files of earlier processes, of which they remove some

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gloo/math.h"
#include "horovod/common/gloo/shared_memory.h"
#include "ranks.h"

using horovod::common::SharedMemory;
using std::chrono::milliseconds;

namespace {

SharedMemory::Link link(int rank, int size, const std::function<void(void*)>& received = {}) {
  SharedMemory::Link result;
  result.broadcast = [=](void* data, size_t bytes) {
    if (rank == 0) {
      memcpy(parent->bytes[0], data, bytes);
    }
    pthread_barrier_wait(&parent->barrier);
    memcpy(data, parent->bytes[0], bytes);
    if (received) {
      received(data);
    }
  };
  result.all = [=](bool own) {
    __atomic_fetch_add(&parent->votes, own, __ATOMIC_SEQ_CST);
    pthread_barrier_wait(&parent->barrier);
    return parent->votes == size;
  };
  return result;
}

void reductions(int size, const std::string& folder) {
  run(size, [&](int rank) {
    auto shared = SharedMemory::Connect(link(rank, size), rank, size, 1, milliseconds(20000), folder);
    check(shared != nullptr);
    reduce_everything(*shared, rank, size, order_of_ranks(size));
    reduce<int64_t>(*shared, rank, size, order_of_ranks(size), &gloo::sum<int64_t>, 100001);
    for (const size_t bytes : {size_t{0}, size_t{5}, size_t{256 * 1024 - 8}, size_t{600000}}) {
      const auto text = [&](int r) { return std::string(r % 2 ? bytes / 2 : bytes, static_cast<char>('a' + r)); };
      const auto own = text(rank);
      const auto found = shared->Allgather(own.data(), own.size());
      for (int r = 0; r < size; ++r) {
        check(found[r] == text(r));
      }
    }
  });
  printf("%d ranks: %d of %d wrong\n", size, parent->wrong, parent->cases);
}

void ends(const std::string& how, int size, const std::string& folder) {
  one_ends(how, size,
           [&](int rank) { return SharedMemory::Connect(link(rank, size), rank, size, 1, milliseconds(400), folder); });
}

void falls_back(const std::string& why, const std::string& folder) {
  const int size = 2;
  run(size, [&](int rank) {
    if (why == "full" && rank == 0) {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{8192, 8192};
      setrlimit(RLIMIT_FSIZE, &limit);
    }
    const auto received = [&](void* invitation) {
      if (why == "not the same" && rank == 1) {  // of another mount namespace
        auto* path = static_cast<char*>(invitation);
        const std::string other = std::string(path) + ".other";
        const int from = open(path, O_RDONLY);
        const int to = open(other.c_str(), O_RDWR | O_CREAT, 0600);
        struct stat status;
        fstat(from, &status);
        if (ftruncate(to, status.st_size) != 0) {
          abort();
        }
        memcpy(path, other.c_str(), other.size());
      } else if (why == "not there" && rank == 1) {
        static_cast<char*>(invitation)[1] = '?';
      }
    };
    auto shared = SharedMemory::Connect(link(rank, size, received), rank, size, size, milliseconds(5000), folder);
    __atomic_fetch_add(&parent->mapped, shared != nullptr, __ATOMIC_SEQ_CST);
  });
  printf("%d of %d ranks share memory\n", parent->mapped, size);
}

void stale(const std::string& folder) {
  const auto make = [&](const std::string& name, bool is_old) {
    const auto path = folder + "/" + name;
    const int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
    const timespec times[2] = {{0, is_old ? 0 : UTIME_NOW}, {is_old ? 1000000 : 0, is_old ? 0 : UTIME_NOW}};
    futimens(file, times);
    return file;
  };
  make("horovod-1-old", true);
  make("horovod-1-new", false);
  make("another-old", true);
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_start = 1;
  lock.l_len = 1;
  fcntl(make("horovod-1-locked", true), F_SETLK, &lock);
  run(2, [&](int rank) {
    auto shared = SharedMemory::Connect(link(rank, 2), rank, 2, 2, milliseconds(5000), folder);
    check(shared != nullptr);
  });
  printf("%d of %d wrong\n", parent->wrong, parent->cases);
}

}  // namespace

int main(int count, char** arguments) {
  share();
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.at(0) == "reductions") {
    reductions(std::stoi(words.at(1)), words.at(2));
  } else if (words.at(0) == "ends") {
    ends(words.at(1), std::stoi(words.at(2)), words.at(3));
  } else if (words.at(0) == "falls_back") {
    falls_back(words.at(1), words.at(2));
  } else {
    stale(words.at(1));
  }
  return 0;
}
