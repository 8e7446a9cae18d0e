// One word of pinned host memory per device, which its apply kernels write and hvd_syncbn_cuda_failure reads; and the
// names of layers, which travel to the device as numbers.
#include <deque>
#include <map>
#include <mutex>
#include <string>

#include "../include/hvd_syncbn/cuda.h"
#include "reports.h"

namespace hvd_syncbn {
namespace cuda {
namespace {

struct Word {
  int64_t* host = nullptr;
  int64_t* device = nullptr;
};

struct Registry {
  std::mutex mutex;
  std::map<int, Word> words;  // of a device
  std::deque<std::string> layers;
  std::map<std::string, int64_t> numbers;  // of a layer
};

Registry& registry() {
  static Registry* const r = new Registry;  // never destroyed: threads may outlive main
  return *r;
}

cudaError_t allocate(Word* word) {
  // The first use may be inside a capture, of which this is no part.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  void *host = nullptr, *device = nullptr;
  error = cudaHostAlloc(&host, sizeof(int64_t), cudaHostAllocMapped);
  if (error == cudaSuccess) {
    *static_cast<int64_t*>(host) = HVD_SYNCBN_OK;
    error = cudaHostGetDevicePointer(&device, host, 0);
  }
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) error = restored;
  if (error == cudaSuccess) *word = {static_cast<int64_t*>(host), static_cast<int64_t*>(device)};
  return error;
}

}  // namespace

cudaError_t make_report(const hvd_syncbn_shape& shape, double eps, const int64_t* packet, const char* layer,
                        Report* report) {
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  Word& word = r.words[device];
  if (word.host == nullptr) {
    error = allocate(&word);
    if (error != cudaSuccess) return error;
  }
  const auto added = r.numbers.emplace(layer, static_cast<int64_t>(r.layers.size()));
  if (added.second) r.layers.push_back(layer);
  *report = {packet, digest(eps, shape.dtype, shape.c), word.device, added.first->second};
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace hvd_syncbn

using namespace hvd_syncbn::cuda;

extern "C" {

int32_t hvd_syncbn_cuda_failure(const char** layer) {
  *layer = "";
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) return HVD_SYNCBN_OK;
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.words.find(device);
  if (found == r.words.end() || found->second.host == nullptr) return HVD_SYNCBN_OK;
  const int64_t report = __atomic_exchange_n(found->second.host, HVD_SYNCBN_OK, __ATOMIC_ACQUIRE);
  if (report == HVD_SYNCBN_OK) return HVD_SYNCBN_OK;
  *layer = r.layers[report / kReportLayer].c_str();
  return static_cast<int32_t>(report % kReportLayer);
}

const char* hvd_syncbn_cuda_error(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
