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
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gloo/math.h"
#include "horovod/common/gloo/shared_memory.h"

using horovod::common::SharedMemory;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

namespace {

// What the processes have before they share memory: pages of their parent.
struct Parent {
  pthread_barrier_t barrier;
  char bytes[512];
  int votes;
  int mapped;
  int wrong;
  int cases;
};

Parent* parent;

SharedMemory::Link link(int rank, int size, const std::function<void(void*)>& received = {}) {
  SharedMemory::Link result;
  result.broadcast = [=](void* data, size_t bytes) {
    if (rank == 0) {
      memcpy(parent->bytes, data, bytes);
    }
    pthread_barrier_wait(&parent->barrier);
    memcpy(data, parent->bytes, bytes);
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

// Runs a function in a process per rank. Returns their statuses, as of waitpid().
std::vector<int> run(int size, const std::function<void(int rank)>& body) {
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&parent->barrier, &attributes, size);
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    children.push_back(fork());
    if (children.back() == 0) {
      alarm(50);
      body(rank);
      fflush(stdout);
      _exit(0);
    }
  }
  std::vector<int> statuses(size);
  for (int rank = 0; rank < size; ++rank) {
    waitpid(children[rank], &statuses[rank], 0);
  }
  return statuses;
}

void check(bool is_right) {
  __atomic_fetch_add(&parent->cases, 1, __ATOMIC_SEQ_CST);
  __atomic_fetch_add(&parent->wrong, !is_right, __ATOMIC_SEQ_CST);
}

template <typename T>
T value(int rank, size_t i) {
  const auto bits = static_cast<uint32_t>((i * 2654435761u) ^ ((rank + 1) * 40503u)) >> 7;
  return static_cast<T>(static_cast<double>(bits % 97) / (std::numeric_limits<T>::is_integer ? 1 : 8));
}

template <>
bool value<bool>(int rank, size_t i) {
  return (i >> rank) % 2 == 1;
}

template <>
gloo::float16 value<gloo::float16>(int rank, size_t i) {
  return gloo::cpu_float2half_rn(value<float>(rank, i));
}

template <typename T>
void reduce(SharedMemory& shared, int rank, int size, SharedMemory::ReduceFunction function, size_t elements) {
  std::unique_ptr<T[]> own(new T[elements]), expected(new T[elements]), other(new T[elements]);
  for (size_t i = 0; i < elements; ++i) {
    own[i] = value<T>(rank, i);
    expected[i] = value<T>(0, i);
  }
  for (int r = 1; r < size; ++r) {
    for (size_t i = 0; i < elements; ++i) {
      other[i] = value<T>(r, i);
    }
    function(expected.get(), expected.get(), other.get(), elements);
  }
  shared.Allreduce(own.get(), elements, sizeof(T), function);
  check(memcmp(own.get(), expected.get(), elements * sizeof(T)) == 0);
}

template <typename T>
void reduce(SharedMemory& shared, int rank, int size) {
  for (const size_t bytes : {0, 8, 32 * 1024, 32 * 1024 + 8, 256 * 1024, 256 * 1024 + 8}) {
    reduce<T>(shared, rank, size, &gloo::sum<T>, bytes / sizeof(T));
  }
  const SharedMemory::ReduceFunction functions[] = {&gloo::min<T>, &gloo::max<T>, &gloo::product<T>};
  for (const auto function : functions) {
    reduce<T>(shared, rank, size, function, 1001);
  }
}

void reductions(int size, const std::string& folder) {
  run(size, [&](int rank) {
    auto shared = SharedMemory::Connect(link(rank, size), rank, size, 1, milliseconds(20000), folder);
    check(shared != nullptr);
    reduce<uint8_t>(*shared, rank, size);
    reduce<int8_t>(*shared, rank, size);
    reduce<uint16_t>(*shared, rank, size);
    reduce<int16_t>(*shared, rank, size);
    reduce<int32_t>(*shared, rank, size);
    reduce<int64_t>(*shared, rank, size);
    reduce<gloo::float16>(*shared, rank, size);
    reduce<float>(*shared, rank, size);
    reduce<double>(*shared, rank, size);
    reduce<bool>(*shared, rank, size);
    reduce<int64_t>(*shared, rank, size, &gloo::sum<int64_t>, 100001);
    // Many in a row, with and without spinning: a buffer that is written too early shows.
    for (int i = 0; i < 2000; ++i) {
      std::unique_ptr<SharedMemory::Spin> spin(i % 2 ? new SharedMemory::Spin : nullptr);
      int64_t sum = i * (rank + 1);
      shared->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
      if (sum != static_cast<int64_t>(i) * size * (size + 1) / 2) {
        check(false);
      }
    }
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

// The last rank ends in the middle of exchanges, and the others wait for it and for one another.
void ends(const std::string& how, int size, const std::string& folder) {
  run(size, [&](int rank) {
    auto shared = SharedMemory::Connect(link(rank, size), rank, size, 1, milliseconds(400), folder);
    int64_t sum = 1;
    for (int i = 0; i < 100; ++i) {
      shared->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
    }
    if (rank == size - 1) {
      if (how == "killed") {
        kill(getpid(), SIGKILL);
      } else if (how == "left") {
        shared.reset();
      } else {
        usleep(1500000);
      }
      return;
    }
    const auto start = Clock::now();
    try {
      shared->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
      printf("rank %d: no error\n", rank);
    } catch (const std::exception& error) {
      const std::string text = error.what();
      const bool is_soon = Clock::now() - start < milliseconds(1000);
      const auto first = text.find("failed: ");
      printf("rank %d: %s, %s\n", rank, text.substr(first, text.find('.', first) - first).c_str(),
             is_soon ? "within a second" : "late");
    }
    try {
      shared->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
      printf("rank %d: went on\n", rank);
    } catch (const std::exception&) {
    }
  });
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
  parent =
      static_cast<Parent*>(mmap(nullptr, sizeof(Parent), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
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
