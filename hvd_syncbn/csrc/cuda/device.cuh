// What the kernels take from CUDA, and how they are launched.
//
// The tests compile these files as plain C++ too, against tests/cuda_emulator/cuda_emulator.h in place of the CUDA
// headers.
#ifndef HVD_SYNCBN_CUDA_DEVICE_CUH_
#define HVD_SYNCBN_CUDA_DEVICE_CUH_

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <tuple>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

#include "../common/dtypes.h"
#include "../common/exact_sum.h"

namespace hvd_syncbn {
namespace cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Shared memory that a launch may have on every device without opting in; the rest of 48 KiB is left to what a kernel
// declares.
constexpr int64_t kSharedBytes = 47 * 1024;

__device__ inline unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return cuda_emulator::shared_memory();
#endif
}

__device__ inline int64_t add_to(int64_t* sum, int64_t value) {
  return static_cast<int64_t>(
      atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value)));
}

// From the second-level cache: another block wrote it in this launch.
__device__ inline int64_t fresh(const int64_t* word) {
  return static_cast<int64_t>(__ldcg(reinterpret_cast<const long long*>(word)));
}

// Starts a read of the line of this address into the second-level cache. No register waits for it.
__device__ inline void prefetch(const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.L2 [%0];" : : "l"(address));
#else
  cuda_emulator::prefetch(address);
#endif
}

// For the tests: a lane is added up again in float64.
__device__ inline void note_float64_lane() {
#if !defined(__CUDACC__)
  cuda_emulator::note_float64_lane();
#endif
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kWidth elements that travel in one access of up to 16 bytes.
template <class T, int kWidth>
struct Pack {
  T v[kWidth];
};

template <int kBytes>
struct Access;
template <>
struct Access<2> {
  using type = uint16_t;
};
template <>
struct Access<4> {
  using type = uint32_t;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<16> {
  using type = uint4;
};

template <int kWidth, class T>
__device__ inline Pack<T, kWidth> load_pack(const T* from) {
  using Raw = typename Access<kWidth * sizeof(T)>::type;
  return bit_cast<Pack<T, kWidth>>(*reinterpret_cast<const Raw*>(from));
}

template <int kWidth, class T>
__device__ inline void store_pack(T* to, const Pack<T, kWidth>& pack) {
  using Raw = typename Access<kWidth * sizeof(T)>::type;
  *reinterpret_cast<Raw*>(to) = bit_cast<Raw>(pack);
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Bytes of the widest access, up to 16, for which all of the arrays are aligned; an absent array is.
inline int64_t widest_access(std::initializer_list<const void*> arrays) {
  uintptr_t bits = 16;
  for (const void* array : arrays) bits |= reinterpret_cast<uintptr_t>(array);
  return static_cast<int64_t>(bits & (~bits + 1));
}

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int* count) { return device_attribute(cudaDevAttrMultiProcessorCount, count); }

// Whether the current device has so little float64 that integers are faster: 2 operations per cycle and multiprocessor,
// where others have 32 or 64.
inline cudaError_t little_float64(bool* little) {
  int ratio = 0;
  const cudaError_t error = device_attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio, &ratio);
  *little = ratio >= 16;
  return error;
}

// Shared memory that a launch may have at most on the current device: a third of a multiprocessor's, so that three
// blocks run at a time, less what is reserved of it and what a kernel declares.
inline cudaError_t most_shared_bytes(int64_t* bytes) {
  int block = 0, multiprocessor = 0;
  cudaError_t error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &block);
  if (error == cudaSuccess) error = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &multiprocessor);
  *bytes = std::max(kSharedBytes, std::min<int64_t>(block - 1024, multiprocessor / 3 - 2048));
  return error;
}

// Blocks of a kernel that the current device runs at a time. The runtime is asked once per kernel, device and number of
// shared bytes.
inline cudaError_t wave_blocks(const void* kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int64_t>, int64_t> known;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& wave = known[std::make_tuple(kernel, device, shared_bytes)];
  if (wave == 0) {
    int sms, resident;
    error = multiprocessors(&sms);
    if (error != cudaSuccess) return error;
    if (shared_bytes > kSharedBytes) {
      int64_t most;
      error = most_shared_bytes(&most);
      if (error != cudaSuccess) return error;
      // Not of shared_bytes: it would be the limit of other launches of the kernel, too.
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
      if (error != cudaSuccess) return error;
    }
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes);
    if (error != cudaSuccess) return error;
    wave = int64_t{sms} * std::max(resident, 1);
  }
  *blocks = wave;
  return cudaSuccess;
}

// Splits of `tiles` tiles of `turns` turns each, where `wave` blocks run at a time.
//
// The model: blocks run in whole waves, and a block takes as long as it has turns. So a launch takes
// ceil(tiles * splits / wave) * ceil(turns / splits), and at best tiles * turns / wave. Chosen are the fewest splits,
// as every block has work besides its turns, for which 15/16 of the time is used; or, where none of up to kMostWaves
// waves does it, those that use it best. The model has not been measured: blocks do not really wait for the end of a
// wave, and those that run alone get more of the memory's bandwidth.
inline int64_t choose_splits(int64_t tiles, int64_t turns, int64_t wave) {
  constexpr int64_t kMostWaves = 8;
  const int64_t most = std::min(turns, std::max(kMostWaves * wave / tiles, int64_t{1}));
  int64_t best = 1, best_time = ceil_div(tiles, wave) * turns;
  // Fewer splits fill less than 15/16 of one wave, in more time.
  int64_t splits = std::min({ceil_div(15 * wave, 16 * tiles), std::max(wave / tiles, int64_t{1}), most});
  while (splits >= 1 && splits <= most) {
    const int64_t each = ceil_div(turns, splits);
    splits = ceil_div(turns, each);  // more of the same time per block use less of it
    const int64_t time = ceil_div(tiles * splits, wave) * each;
    if (16 * tiles * turns >= 15 * time * wave) return splits;
    if (time <= best_time) {  // shorter blocks even out, and keep more bytes in flight
      best = splits;
      best_time = time;
    }
    if (each == 1) break;
    splits = ceil_div(turns, each - 1);
  }
  return best;
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   Arguments arguments) {
#if defined(__CUDACC__)
  void* parameters[] = {&arguments};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), parameters, shared_bytes,
                          static_cast<cudaStream_t>(stream));
#else
  return cuda_emulator::launch(
      reinterpret_cast<const void*>(kernel), [&] { kernel(arguments); }, blocks, threads, shared_bytes, stream);
#endif
}

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_DEVICE_CUH_
