// Ranks as processes of one program, for the drivers of collectives: what they share, and sums beside those of one
// process.

#ifndef HVD_SYNCBN_TESTS_RANKS_H
#define HVD_SYNCBN_TESTS_RANKS_H

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gloo/math.h"
#include "horovod/common/gloo/shared_memory.h"

// What the processes have before they share memory: pages of their parent.
struct Parent {
  pthread_barrier_t barrier;
  char bytes[64][512];  // of every rank
  int votes;
  int mapped;
  int wrong;
  int cases;
};

inline Parent* parent;

// Runs a function in a process per rank. Returns their statuses, as of waitpid().
inline std::vector<int> run(int size, const std::function<void(int rank)>& body) {
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

inline void check(bool is_right) {
  __atomic_fetch_add(&parent->cases, 1, __ATOMIC_SEQ_CST);
  __atomic_fetch_add(&parent->wrong, !is_right, __ATOMIC_SEQ_CST);
}

template <typename T>
T value(int rank, size_t i) {
  const auto bits = static_cast<uint32_t>((i * 2654435761u) ^ ((rank + 1) * 40503u)) >> 7;
  return static_cast<T>(static_cast<double>(bits % 97) / (std::numeric_limits<T>::is_integer ? 1 : 8));
}

template <>
inline bool value<bool>(int rank, size_t i) {
  return (i >> rank) % 2 == 1;
}

template <>
inline gloo::float16 value<gloo::float16>(int rank, size_t i) {
  return gloo::cpu_float2half_rn(value<float>(rank, i));
}

// Which rank's values are added to which, one after the other; the result is rank 0's.
using Order = std::vector<std::pair<int, int>>;

inline Order order_of_ranks(int size) {
  Order order;
  for (int rank = 1; rank < size; ++rank) {
    order.push_back({0, rank});
  }
  return order;
}

template <typename T, typename Ranks>
void reduce(Ranks& ranks, int rank, int size, const Order& order,
            horovod::common::SharedMemory::ReduceFunction function, size_t elements) {
  std::vector<std::unique_ptr<T[]>> all;
  for (int r = 0; r < size; ++r) {
    all.emplace_back(new T[elements]);
    for (size_t i = 0; i < elements; ++i) {
      all[r][i] = value<T>(r, i);
    }
  }
  std::unique_ptr<T[]> own(new T[elements]);
  std::copy(all[rank].get(), all[rank].get() + elements, own.get());
  for (const auto& step : order) {
    function(all[step.first].get(), all[step.first].get(), all[step.second].get(), elements);
  }
  ranks.Allreduce(own.get(), elements, sizeof(T), function);
  check(memcmp(own.get(), all[0].get(), elements * sizeof(T)) == 0);
}

template <typename T, typename Ranks>
void reduce(Ranks& ranks, int rank, int size, const Order& order) {
  for (const size_t bytes : {0, 8, 32 * 1024, 32 * 1024 + 8, 256 * 1024, 256 * 1024 + 8}) {
    reduce<T>(ranks, rank, size, order, &gloo::sum<T>, bytes / sizeof(T));
  }
  const horovod::common::SharedMemory::ReduceFunction functions[] = {&gloo::min<T>, &gloo::max<T>, &gloo::product<T>};
  for (const auto function : functions) {
    reduce<T>(ranks, rank, size, order, function, 1001);
  }
}

// Every type and operation, at the sizes around which the algorithm changes, then many in a row, with and without
// spinning: a buffer that is written too early shows.
template <typename Ranks>
void reduce_everything(Ranks& ranks, int rank, int size, const Order& order) {
  reduce<uint8_t>(ranks, rank, size, order);
  reduce<int8_t>(ranks, rank, size, order);
  reduce<uint16_t>(ranks, rank, size, order);
  reduce<int16_t>(ranks, rank, size, order);
  reduce<int32_t>(ranks, rank, size, order);
  reduce<int64_t>(ranks, rank, size, order);
  reduce<gloo::float16>(ranks, rank, size, order);
  reduce<float>(ranks, rank, size, order);
  reduce<double>(ranks, rank, size, order);
  reduce<bool>(ranks, rank, size, order);
  for (int i = 0; i < 2000; ++i) {
    std::unique_ptr<horovod::common::SharedMemory::Spin> spin(i % 2 ? new horovod::common::SharedMemory::Spin
                                                                    : nullptr);
    int64_t sum = i * (rank + 1);
    ranks.Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
    if (sum != static_cast<int64_t>(i) * size * (size + 1) / 2) {
      check(false);
    }
  }
}

// Call it before run().
inline void share() {
  parent =
      static_cast<Parent*>(mmap(nullptr, sizeof(Parent), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

// The last rank ends in the middle of exchanges, and the others wait for it and for one another. `connect(rank)`
// returns a pointer to what sums over the ranks.
template <class Connect>
void one_ends(const std::string& how, int size, const Connect& connect) {
  using Clock = std::chrono::steady_clock;
  run(size, [&](int rank) {
    auto exchange = connect(rank);
    int64_t sum = 1;
    for (int i = 0; i < 100; ++i) {
      exchange->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
    }
    if (rank == size - 1) {
      if (how == "killed") {
        kill(getpid(), SIGKILL);
      } else if (how == "left") {
        exchange.reset();
      } else {
        usleep(1500000);
      }
      return;
    }
    const auto start = Clock::now();
    try {
      exchange->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
      printf("rank %d: no error\n", rank);
    } catch (const std::exception& error) {
      const std::string text = error.what();
      const bool is_soon = Clock::now() - start < std::chrono::milliseconds(1000);
      const auto first = text.find("failed: ");
      printf("rank %d: %s, %s\n", rank, text.substr(first, text.find('.', first) - first).c_str(),
             is_soon ? "within a second" : "late");
    }
    try {
      exchange->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
      printf("rank %d: went on\n", rank);
    } catch (const std::exception&) {
    }
  });
}

#endif  // HVD_SYNCBN_TESTS_RANKS_H
