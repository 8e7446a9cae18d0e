// Ranks on several hosts that exchange through connections: every rank is a process here, and hosts are groups of them.
// Arguments:
//
// reductions HOSTS RANKS FOLDER: results beside those of one process, at all sizes, with RANKS ranks on each host
//
// ends HOW HOSTS RANKS FOLDER: how the others end when the last rank is killed, has left or is stopped
//
// begins FIRST HOSTS RANKS FOLDER: whether all ranks begin where all but rank FIRST wait until they are awaited
//
// falls_back HOSTS: how many ranks are connected where one cannot listen
//
// differs: the error where two hosts have tensors of other sizes
//
// messages HOSTS: how many messages the busiest host exchanges, one after the other

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gloo/math.h"
#include "horovod/common/gloo/host_tree.h"
#include "horovod/common/gloo/shared_memory.h"
#include "ranks.h"

using horovod::common::HostTree;
using horovod::common::SharedMemory;
using std::chrono::milliseconds;

namespace {

std::vector<std::string> allgather(int rank, int size, const std::string& own) {
  memcpy(parent->bytes[rank], own.data(), own.size());
  pthread_barrier_wait(&parent->barrier);
  std::vector<std::string> all;
  for (int r = 0; r < size; ++r) {
    all.emplace_back(parent->bytes[r], own.size());
  }
  pthread_barrier_wait(&parent->barrier);
  return all;
}

// Ranks of `per_host` share memory in a folder; addresses are of this machine.
std::unique_ptr<HostTree> connect(int rank, int hosts, int per_host, milliseconds timeout,
                                  const std::string& folder = "", const char* ip = "127.0.0.1") {
  const int size = hosts * per_host;
  const int first = rank / per_host * per_host;
  std::unique_ptr<SharedMemory> host;
  if (per_host > 1) {
    SharedMemory::Link link;
    link.broadcast = [=](void* data, size_t bytes) {
      const auto all = allgather(rank, size, std::string(static_cast<char*>(data), bytes));
      memcpy(data, all[first].data(), bytes);
    };
    link.all = [=](bool own) {
      const auto all = allgather(rank, size, own ? "1" : "0");
      for (int r = first; r < first + per_host; ++r) {
        own = own && all[r] == "1";
      }
      return own;
    };
    host = SharedMemory::Connect(link, rank - first, per_host, 1, timeout, folder);
    check(host != nullptr);
  }
  sockaddr_storage address = {};
  auto* here = reinterpret_cast<sockaddr_in*>(&address);
  here->sin_family = AF_INET;
  inet_pton(AF_INET, ip, &here->sin_addr);
  return HostTree::Connect([=](const std::string& own) { return allgather(rank, size, own); }, rank, address,
                           std::move(host), true, timeout);
}

int largest_power(int hosts) {
  int power = 1;
  while (2 * power <= hosts) {
    power *= 2;
  }
  return power;
}

// The ranks of a host one after the other, then the hosts by recursive doubling.
Order order_of_hosts(int hosts, int per_host) {
  Order order;
  for (int rank = 0; rank < hosts * per_host; ++rank) {
    if (rank % per_host > 0) {
      order.push_back({rank / per_host * per_host, rank});
    }
  }
  const int power = largest_power(hosts);
  for (int host = power; host < hosts; ++host) {
    order.push_back({(host - power) * per_host, host * per_host});
  }
  for (int bit = 1; bit < power; bit *= 2) {
    for (int host = 0; host < power; host += 2 * bit) {
      order.push_back({host * per_host, (host + bit) * per_host});
    }
  }
  return order;
}

void reductions(int hosts, int per_host, const std::string& folder) {
  run(hosts * per_host, [&](int rank) {
    auto tree = connect(rank, hosts, per_host, milliseconds(20000), folder);
    check(tree != nullptr);
    reduce_everything(*tree, rank, hosts * per_host, order_of_hosts(hosts, per_host));
  });
  printf("%d hosts of %d: %d of %d wrong\n", hosts, per_host, parent->wrong, parent->cases);
}

void ends(const std::string& how, int hosts, int per_host, const std::string& folder) {
  one_ends(how, hosts * per_host, [&](int rank) { return connect(rank, hosts, per_host, milliseconds(400), folder); });
}

void begins(int first, int hosts, int per_host, const std::string& folder) {
  const int size = hosts * per_host;
  run(size, [&](int rank) {
    auto tree = connect(rank, hosts, per_host, milliseconds(20000), folder);
    for (int i = 0; i < 20; ++i) {
      while (rank != first && !tree->IsAwaited()) {
        usleep(100);
      }
      int64_t sum = rank;
      tree->Allreduce(&sum, 1, sizeof(sum), &gloo::sum<int64_t>);
      check(sum == static_cast<int64_t>(size) * (size - 1) / 2);
      pthread_barrier_wait(&parent->barrier);
      check(!tree->IsAwaited());
      pthread_barrier_wait(&parent->barrier);
    }
  });
  printf("%d of %d wrong\n", parent->wrong, parent->cases);
}

void falls_back(int hosts) {
  run(hosts, [&](int rank) {
    // An address that no machine has.
    const auto tree = connect(rank, hosts, 1, milliseconds(5000), "", rank == hosts - 1 ? "192.0.2.1" : "127.0.0.1");
    __atomic_fetch_add(&parent->mapped, tree != nullptr, __ATOMIC_SEQ_CST);
  });
  printf("%d of %d ranks are connected\n", parent->mapped, hosts);
}

void differs() {
  run(2, [&](int rank) {
    auto tree = connect(rank, 2, 1, milliseconds(5000));
    std::vector<int64_t> values(2 + rank);
    try {
      tree->Allreduce(values.data(), values.size(), 8, &gloo::sum<int64_t>);
      printf("no error\n");
    } catch (const std::exception& error) {
      const std::string text = error.what();
      printf("rank %d: %s\n", rank, text.substr(text.find("failed: ")).c_str());
    }
  });
}

void messages(int hosts) {
  size_t most = 0;
  for (int host = 0; host < hosts; ++host) {
    const auto partners = HostTree::Partners(host, hosts);
    // A host beyond the largest power of two also gets the result.
    const bool hands_back = partners.front() == host + largest_power(hosts);
    most = std::max(most, partners.size() + hands_back);
    for (const int partner : partners) {
      const auto back = HostTree::Partners(partner, hosts);
      check(std::find(back.begin(), back.end(), host) != back.end());
    }
  }
  printf("%d hosts: %zu messages, %d wrong\n", hosts, most, parent->wrong);
}

}  // namespace

int main(int count, char** arguments) {
  share();
  const std::vector<std::string> words(arguments + 1, arguments + count);
  const auto number = [&](int index) { return std::stoi(words.at(index)); };
  if (words.at(0) == "reductions") {
    reductions(number(1), number(2), words.at(3));
  } else if (words.at(0) == "ends") {
    ends(words.at(1), number(2), number(3), words.at(4));
  } else if (words.at(0) == "begins") {
    begins(number(1), number(2), number(3), words.at(4));
  } else if (words.at(0) == "falls_back") {
    falls_back(number(1));
  } else if (words.at(0) == "differs") {
    differs();
  } else {
    messages(number(1));
  }
  return 0;
}
