// Runs the kernels of hvd_syncbn/csrc/cuda on the CPU: just as much of CUDA as they use, as plain C++17.
//
// A block's threads are fibers of one thread of the host. A fiber runs until it waits for others (a barrier, a shuffle)
// and then the next one does; the order of the threads of a block and of the blocks of a launch is drawn anew for every
// launch. So a barrier that is missing, or that not every thread reaches, shows. What does not: races between threads
// that no order of fibers brings out, between blocks that run at the same time, and the cost of anything. For those a
// machine with a GPU has compute-sanitizer (benchmarks/gpu).
#ifndef CUDA_EMULATOR_H_
#define CUDA_EMULATOR_H_

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8)));
struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using cudaError_t = int;
using cudaStream_t = void*;
namespace cuda_emulator {
struct Event;
}
using cudaEvent_t = cuda_emulator::Event*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrSingleToDoublePrecisionPerfRatio = 87,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaHostAllocMapped = 2, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

namespace cuda_emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Event {
  bool recorded = false;
};
inline const cudaStream_t kCapturing = reinterpret_cast<cudaStream_t>(1);  // the stream that captures a graph

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_emulator: %s\n", what);
  abort();
}

// Where some of the threads of a block wait for one another.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Fiber {
  dim3 thread;
  bool done = false;
  bool started = false;
  jmp_buf at;
};

struct Machine {
  // Every device that tests have set; the current one is another than those before.
  struct Device {
    int multiprocessors, resident, shared_bytes, float64_ratio;
    bool operator==(const Device& other) const {
      return multiprocessors == other.multiprocessors && resident == other.resident &&
             shared_bytes == other.shared_bytes && float64_ratio == other.float64_ratio;
    }
  };
  std::vector<Device> devices = {{4, 4, 64 * 1024, 2}};
  std::map<std::pair<const void*, int>, int> shared_limits;  // by kernel and device, where one has opted in
  int device = 0;
  uint64_t seed = 0;

  // Of the last launch.
  int64_t blocks = 0;
  std::vector<const void*> prefetched;
  int64_t integers = 0;       // conversions to integers
  int64_t float64_lanes = 0;  // lanes that were added up again in float64
  int64_t occupancy_calls = 0;

  // Of the block that runs.
  dim3 block, block_size, grid_size;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  int current = 0;
  int running = 0;     // fibers that have not ended
  bool moved = false;  // whether any fiber got on since the last look
  jmp_buf scheduler;
  ucontext_t first_context;
  Barrier whole_block;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchange;  // what a thread shows the others of its warp

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void use(const Device& wanted) {
    device = static_cast<int>(std::find(devices.begin(), devices.end(), wanted) - devices.begin());
    if (device == static_cast<int>(devices.size())) devices.push_back(wanted);
  }

  void yield() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
  }

  void wait(Barrier* barrier, int count) {
    moved = true;
    if (++barrier->arrived == count) {
      barrier->arrived = 0;
      ++barrier->generation;
      return;
    }
    const uint64_t mine = barrier->generation;
    while (barrier->generation == mine) yield();
    moved = true;
  }

  static void enter() {
    Machine& m = get();
    m.kernel();
    m.fibers[m.current].done = true;
    m.moved = true;
    --m.running;
    _longjmp(m.scheduler, 1);
  }

  void resume(int i) {
    current = i;
    if (_setjmp(scheduler) != 0) return;
    Fiber& fiber = fibers[i];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
    fail("setcontext returned");
  }

  void run_block(const std::vector<int>& order) {
    const int threads = static_cast<int>(block_size.x);
    fibers.assign(threads, Fiber());
    warps.assign((threads + kWarp - 1) / kWarp, Barrier());
    exchange.assign(threads, 0);
    whole_block = Barrier();
    // What a kernel reads before it writes it is not 0.
    std::fill(shared.begin(), shared.end(), 0xa5);
    while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStackBytes]);
    running = threads;
    for (int i = 0; i < threads; ++i) fibers[i].thread.x = static_cast<unsigned>(i);
    while (running > 0) {
      moved = false;
      for (int i : order) {
        if (!fibers[i].done) resume(i);
      }
      if (!moved) fail("deadlock: some threads wait at a barrier that others never reach");
    }
    if (whole_block.arrived != 0) fail("a block ended with threads at a barrier");
  }
};

inline unsigned char* shared_memory() { return Machine::get().shared.data(); }

inline void prefetch(const void* address) { Machine::get().prefetched.push_back(address); }

inline void note_float64_lane() { ++Machine::get().float64_lanes; }

inline cudaError_t launch(const void* function, const std::function<void()>& kernel, int64_t blocks, int threads,
                          size_t shared_bytes, void*) {
  Machine& m = Machine::get();
  const auto limit = m.shared_limits.find({function, m.device});
  const int most = limit == m.shared_limits.end() ? 48 * 1024 : limit->second;
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || shared_bytes > static_cast<size_t>(most)) {
    return cudaErrorInvalidValue;
  }
  std::mt19937_64 random(m.seed++);
  std::vector<int> order(threads), block_order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::iota(block_order.begin(), block_order.end(), 0);
  std::shuffle(block_order.begin(), block_order.end(), random);
  m.kernel = kernel;
  m.blocks = blocks;
  m.prefetched.clear();
  m.integers = m.float64_lanes = 0;
  m.block_size = {static_cast<unsigned>(threads), 1, 1};
  m.grid_size = {static_cast<unsigned>(blocks), 1, 1};
  m.shared.resize(shared_bytes);
  for (int block : block_order) {
    std::shuffle(order.begin(), order.end(), random);
    m.block = {static_cast<unsigned>(block), 0, 0};
    m.run_block(order);
  }
  return cudaSuccess;
}

template <class T>
T shuffle(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 8, "the kernels shuffle 8 bytes");
  Machine& m = Machine::get();
  if (mask != 0xffffffffu) fail("the kernels shuffle whole warps");
  const int me = m.current, warp = me / kWarp;
  memcpy(&m.exchange[me], &value, sizeof(T));
  m.wait(&m.warps[warp], kWarp);
  T other;
  memcpy(&other, &m.exchange[me ^ lane_mask], sizeof(T));
  m.wait(&m.warps[warp], kWarp);
  return other;
}

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::Machine::get().fibers[cuda_emulator::Machine::get().current].thread)
#define blockIdx (cuda_emulator::Machine::get().block)

inline void __syncthreads() {
  cuda_emulator::Machine& m = cuda_emulator::Machine::get();
  m.wait(&m.whole_block, static_cast<int>(m.block_size.x));
}
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_emulator::shuffle(mask, value, lane_mask);
}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  const unsigned long long old = *to;
  *to += value;
  return old;
}
inline int __float2int_rz(float value) {
  ++cuda_emulator::Machine::get().integers;
  if (value != value) return 0;
  return value >= 0x1p31f ? INT32_MAX : value <= -0x1p31f ? INT32_MIN : static_cast<int>(value);
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

// ---- The host's side

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_emulator::Machine::get().device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto& properties = cuda_emulator::Machine::get().devices[device];
  *value = attribute == cudaDevAttrMultiProcessorCount                ? properties.multiprocessors
           : attribute == cudaDevAttrSingleToDoublePrecisionPerfRatio ? properties.float64_ratio
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? properties.shared_bytes
                                                                      : properties.shared_bytes - 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  cuda_emulator::Machine& m = cuda_emulator::Machine::get();
  if (value > m.devices[m.device].shared_bytes - 1024) return cudaErrorInvalidValue;
  m.shared_limits[{kernel, m.device}] = value;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  cuda_emulator::Machine& m = cuda_emulator::Machine::get();
  ++m.occupancy_calls;
  *blocks = m.devices[m.device].resident;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** host, size_t bytes, unsigned) {
  *host = malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
// A kernel has run when its launch returns, so events have nothing to wait for; but they are made, recorded, waited
// for.
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new cuda_emulator::Event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  if (event == nullptr) cuda_emulator::fail("an event that was not made is recorded");
  event->recorded = true;
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event == nullptr || !event->recorded) cuda_emulator::fail("an event that was not recorded is waited for");
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == cuda_emulator::kCapturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }

#endif  // CUDA_EMULATOR_H_
