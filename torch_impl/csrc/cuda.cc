// The operators for GPU tensors, on the current stream of the tensor's device. They wait for the stream only if the
// host is far ahead.
//
// CPU kernels read a packet's header and raise its error at once. The GPU finds the error later; then the same later
// operator raises it on every rank (hvd_syncbn_cuda_earlier_failure), or check_device_errors does.
//
// Built without PyTorch's CUDA headers and libraries, so that one library works with its CPU and CUDA builds.
#include <c10/core/DeviceGuard.h>
#include <dlfcn.h>

#include "operators.h"

namespace hvd_syncbn {
namespace {

// Returns the current stream of a device through the C interface of PyTorch's CUDA library, which is loaded if there
// are GPU tensors.
void* current_stream(const c10::Device& device) {
  using Function = int32_t (*)(int32_t device_index, void** stream);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  TORCH_CHECK(function != nullptr,
              "this PyTorch has no aoti_torch_get_current_cuda_stream; hvd-syncbn needs 2.6 or newer");
  void* stream = nullptr;
  TORCH_CHECK(function(device.index(), &stream) == 0, "PyTorch failed to return the current stream of ", device);
  return stream;
}

// Raises the error that a kernel on the GPU has found, or warns of channels that are not finite.
void report(int32_t status, const char* layer, const std::string& found) {
  if (status == HVD_SYNCBN_NONFINITE) warn(count_nonfinite(layer, "channels that are not finite." + found));
  raise_failure(status, layer, found);
}

// Makes the device of a call current, and reports what an earlier operator has found.
class Cuda {
 public:
  static constexpr at::DeviceType kType = at::kCUDA;

  explicit Cuda(const Tensor& x) : guard_(x.device()) {
    const char* layer;
    const int32_t status = hvd_syncbn_cuda_earlier_failure(stream(), &layer);
    if (status != HVD_SYNCBN_OK) {
      report(status, layer, " (Found on the GPU " + std::to_string(HVD_SYNCBN_CUDA_LAG) + " calls ago.)");
    }
  }

  void* stream() const { return current_stream(guard_.current_device()); }
  static void check(int32_t error) {
    TORCH_CHECK(error == 0, "hvd-syncbn: CUDA error: ", hvd_syncbn_cuda_error(error));
  }

 private:
  c10::DeviceGuard guard_;
};

void check_device_errors(c10::Device device) {
  const c10::DeviceGuard guard(device);
  const char* layer;
  while (const int32_t status = hvd_syncbn_cuda_failure(&layer)) report(status, layer, " (Found on the GPU.)");
}

}  // namespace
}  // namespace hvd_syncbn

TORCH_LIBRARY_FRAGMENT(hvd_syncbn, m) {
  m.def("check_device_errors(Device device) -> ()", hvd_syncbn::check_device_errors);
}

TORCH_LIBRARY_IMPL(hvd_syncbn, CUDA, m) { hvd_syncbn::implement<hvd_syncbn::Cuda>(m); }
