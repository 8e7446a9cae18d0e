// The operators for GPU tensors, on the current stream of the tensor's device. They wait for the stream only if the
// host is far ahead.
//
// CPU kernels read a packet's header and raise its error at once. The GPU finds the error later; then the same later
// operator raises it on every rank (hvd_syncbn_cuda_earlier_failure), or check_device_errors does.
//
// Built without PyTorch's CUDA headers and libraries, so that one library works with its CPU and CUDA builds.
#include "hvd_syncbn/cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "tensors.h"

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

void check_error(int32_t error) { TORCH_CHECK(error == 0, "hvd-syncbn: CUDA error: ", hvd_syncbn_cuda_error(error)); }

// One operator on one device: makes the device current, raises the error of an earlier operator, and checks that all
// tensors are on the device.
class Call {
 public:
  explicit Call(const Tensor& x) : guard_(x.device()), device_(x.device()) {
    const char* layer;
    const int32_t status = hvd_syncbn_cuda_earlier_failure(stream(), &layer);
    raise_failure(status, layer, " (Found on the GPU ", HVD_SYNCBN_CUDA_LAG, " calls ago.)");
  }

  const Tensor& here(const Tensor& tensor) const {
    TORCH_CHECK_VALUE(tensor.device() == device_, "expected all tensors on ", device_, ". Received: ", tensor.device());
    return tensor;
  }
  const OptionalTensor& here(const OptionalTensor& tensor) const {
    if (tensor.has_value() && tensor->defined()) here(*tensor);
    return tensor;
  }
  void* stream() const { return current_stream(device_); }
  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, at::TensorOptions().dtype(type).device(device_));
  }

 private:
  c10::DeviceGuard guard_;
  c10::Device device_;
};

Tensor forward_moments(const Tensor& x, double eps, int64_t call_number) {
  const Call call(x);
  const Input in = input(x);
  Tensor packet = call.empty({hvd_syncbn_packet_size(in.shape.c)}, at::kLong);
  check_error(hvd_syncbn_cuda_forward_moments(&in.shape, in.tensor.const_data_ptr(), nullptr, eps, call_number,
                                              packet.mutable_data_ptr<int64_t>(), call.stream()));
  return packet;
}

std::tuple<Tensor, Tensor> forward_apply(const Tensor& x, const Tensor& packet, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                         const OptionalTensor& batches, double old_weight, double new_weight,
                                         bool unbiased, double eps, bool relu, const std::string& name, bool) {
  const Call call(x);
  const Input in = input(x);
  check_packet_size(in.shape, call.here(packet));
  const OptionalTensor added = like(in, call.here(residual));
  const hvd_syncbn_vector mean = vector(in.shape, call.here(running_mean));
  const hvd_syncbn_vector var = vector(in.shape, call.here(running_var));
  const auto [share_of_old, share_of_new] = weights(batches, old_weight, new_weight);
  Tensor stats = call.empty({2, in.shape.c}, at::kDouble);
  Tensor y = at::empty_like(in.tensor);
  check_error(hvd_syncbn_cuda_forward_apply(
      &in.shape, eps, in.tensor.const_data_ptr(), data(added), relu, packet.const_data_ptr<int64_t>(),
      vector(in.shape, call.here(weight)), vector(in.shape, call.here(bias)), mean, var, mean, var, share_of_old,
      share_of_new, unbiased, name.c_str(), stats.mutable_data_ptr<double>(), y.mutable_data_ptr(), call.stream()));
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward_moments(const Tensor& x, const Tensor& dy, const OptionalTensor& y,
                                                    const Tensor& stats, at::ScalarType parameter_dtype) {
  const Call call(x);
  const Input in = input(x);
  const Tensor g = like(in, call.here(dy));
  const OptionalTensor output = like(in, call.here(y));
  Tensor packet = call.empty({hvd_syncbn_packet_size(in.shape.c)}, at::kLong);
  Tensor dweight = call.empty({in.shape.c}, parameter_dtype), dbias = call.empty({in.shape.c}, parameter_dtype);
  check_error(hvd_syncbn_cuda_backward_moments(&in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(), data(output),
                                               nullptr, call.here(stats).const_data_ptr<double>(),
                                               packet.mutable_data_ptr<int64_t>(), vector(in.shape, dweight),
                                               vector(in.shape, dbias), call.stream()));
  return {packet, dweight, dbias};
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& x, const Tensor& dy, const OptionalTensor& y,
                                          const Tensor& packet, const Tensor& stats, const OptionalTensor& weight,
                                          bool want_residual, const std::string& name) {
  const Call call(x);
  const Input in = input(x);
  check_packet_size(in.shape, call.here(packet));
  const Tensor g = like(in, call.here(dy));
  const OptionalTensor output = like(in, call.here(y));
  Tensor dx = at::empty_like(in.tensor);
  Tensor dresidual = want_residual ? at::empty_like(in.tensor) : call.empty({0}, in.tensor.scalar_type());
  check_error(hvd_syncbn_cuda_backward_apply(
      &in.shape, in.tensor.const_data_ptr(), g.const_data_ptr(), data(output), nullptr,
      packet.const_data_ptr<int64_t>(), call.here(stats).const_data_ptr<double>(), vector(in.shape, call.here(weight)),
      name.c_str(), dx.mutable_data_ptr(), want_residual ? dresidual.mutable_data_ptr() : nullptr, call.stream()));
  return {dx, dresidual};
}

// Without elements the kernel only checks the header. It is launched, because all ranks must launch the same kernels.
std::tuple<Tensor, Tensor> backward_check(const Tensor& packet, const Tensor& dweight, const Tensor& dbias,
                                          const std::string& name) {
  const Call call(packet);
  const hvd_syncbn_shape nothing = {0, 0, 0, HVD_SYNCBN_FLOAT32, HVD_SYNCBN_CHANNELS_FIRST};
  check_error(hvd_syncbn_cuda_backward_apply(&nothing, nullptr, nullptr, nullptr, nullptr,
                                             packet.const_data_ptr<int64_t>(), nullptr, {nullptr, 0}, name.c_str(),
                                             nullptr, nullptr, call.stream()));
  return {dweight.clone(), dbias.clone()};
}

void check_device_errors(c10::Device device) {
  const c10::DeviceGuard guard(device);
  const char* layer;
  const int32_t status = hvd_syncbn_cuda_failure(&layer);
  raise_failure(status, layer, " (Found on the GPU.)");
}

}  // namespace
}  // namespace hvd_syncbn

TORCH_LIBRARY_FRAGMENT(hvd_syncbn, m) {
  m.def("check_device_errors(Device device) -> ()", hvd_syncbn::check_device_errors);
}

TORCH_LIBRARY_IMPL(hvd_syncbn, CUDA, m) {
  using namespace hvd_syncbn;
  m.impl("forward_moments", forward_moments);
  m.impl("forward_apply", forward_apply);
  m.impl("backward_moments", backward_moments);
  m.impl("backward_apply", backward_apply);
  m.impl("backward_check", backward_check);
}
