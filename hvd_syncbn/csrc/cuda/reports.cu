// Words of pinned host memory that the apply kernels of a device write and the host reads; and the names of layers,
// which travel to the device as numbers.
//
// A launch has one of HVD_SYNCBN_CUDA_LAG words in turn. The launch that takes a word next waits for the event behind
// the one that had it and reads what it said. So whether it is told does not depend on how far the host is ahead of the
// GPU, which differs between ranks, and a wait is rare. Launches that a CUDA graph captures share one more word.
#include <deque>
#include <map>
#include <mutex>
#include <string>

#include "../include/hvd_syncbn/cuda.h"
#include "reports.h"

namespace hvd_syncbn {
namespace cuda {
namespace {

constexpr int kLag = HVD_SYNCBN_CUDA_LAG;

struct Ring {
  int64_t* host = nullptr;  // kLag words, and that of captured launches
  int64_t* device = nullptr;
  cudaEvent_t events[kLag] = {};
  bool used[kLag] = {};
  uint64_t launches = 0;
};

struct Registry {
  std::mutex mutex;
  std::map<int, Ring> rings;  // of a device
  std::deque<std::string> layers;
  std::map<std::string, int64_t> numbers;  // of a layer
};

Registry& registry() {
  static Registry* const r = new Registry;  // never destroyed: threads may outlive main
  return *r;
}

cudaError_t allocate(Ring* ring) {
  // The first use may be inside a capture, of which this is no part.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  void *host = nullptr, *device = nullptr;
  error = cudaHostAlloc(&host, (kLag + 1) * sizeof(int64_t), cudaHostAllocMapped);
  if (error == cudaSuccess) {
    for (int i = 0; i <= kLag; ++i) static_cast<int64_t*>(host)[i] = HVD_SYNCBN_OK;
    error = cudaHostGetDevicePointer(&device, host, 0);
  }
  for (cudaEvent_t& event : ring->events) {
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  }
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) error = restored;
  if (error == cudaSuccess) {
    ring->host = static_cast<int64_t*>(host);
    ring->device = static_cast<int64_t*>(device);
  }
  return error;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

// The current device's ring, or none yet. Under the registry's lock.
Ring* current_ring(Registry& r) {
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  const auto found = r.rings.find(device);
  return found == r.rings.end() || found->second.host == nullptr ? nullptr : &found->second;
}

// Takes what a word says.
int32_t take(const Registry& r, int64_t* word, const char** layer) {
  const int64_t report = __atomic_exchange_n(word, HVD_SYNCBN_OK, __ATOMIC_ACQUIRE);
  if (report != HVD_SYNCBN_OK) *layer = r.layers[report / kReportLayer].c_str();
  return static_cast<int32_t>(report % kReportLayer);
}

}  // namespace

cudaError_t make_report(const int64_t* packet, const char* layer, void* stream, Report* report) {
  if (packet == nullptr) return cudaSuccess;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  Ring& ring = r.rings[device];
  if (ring.host == nullptr) {
    error = allocate(&ring);
    if (error != cudaSuccess) return error;
  }
  const auto added = r.numbers.emplace(layer, static_cast<int64_t>(r.layers.size()));
  if (added.second) r.layers.push_back(layer);
  const uint64_t slot = is_capturing(stream) ? kLag : ring.launches++ % kLag;
  *report = {packet, ring.device + slot, added.first->second};
  return cudaSuccess;
}

cudaError_t close_report(const Report& report, cudaError_t launched, void* stream) {
  if (launched != cudaSuccess || report.packet == nullptr) return launched;
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  Ring* const ring = current_ring(r);
  const int64_t slot = report.word - ring->device;
  if (slot == kLag) return cudaSuccess;
  ring->used[slot] = true;
  return cudaEventRecord(ring->events[slot], static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace hvd_syncbn

using namespace hvd_syncbn::cuda;

extern "C" {

int32_t hvd_syncbn_cuda_earlier_failure(void* stream, const char** layer) {
  *layer = "";
  if (is_capturing(stream)) return HVD_SYNCBN_OK;
  Registry& r = registry();
  cudaEvent_t event;
  int64_t* word;
  {
    const std::lock_guard<std::mutex> lock(r.mutex);
    Ring* const ring = current_ring(r);
    if (ring == nullptr || !ring->used[ring->launches % kLag]) return HVD_SYNCBN_OK;
    event = ring->events[ring->launches % kLag];
    word = ring->host + ring->launches % kLag;
  }
  if (cudaEventSynchronize(event) != cudaSuccess) return HVD_SYNCBN_OK;  // the next launch returns that error
  const std::lock_guard<std::mutex> lock(r.mutex);
  return take(r, word, layer);
}

int32_t hvd_syncbn_cuda_failure(const char** layer) {
  *layer = "";
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  Ring* const ring = current_ring(r);
  if (ring == nullptr) return HVD_SYNCBN_OK;
  for (int i = 0; i <= kLag; ++i) {  // from the oldest; those of graphs last
    const int32_t status = take(r, ring->host + (i == kLag ? kLag : (ring->launches + i) % kLag), layer);
    if (status != HVD_SYNCBN_OK) return status;
  }
  return HVD_SYNCBN_OK;
}

const char* hvd_syncbn_cuda_error(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
