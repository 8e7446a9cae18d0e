// torch.distributed as the engine that sums packets; horovod.py is the other one. A compiler traces the collective that
// it knows; otherwise the process group is called directly, which takes a third of the time.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_map>
#include <vector>

#include "tensors.h"

namespace hvd_syncbn {
namespace {

// One of PyTorch's functional collectives. Boxed, since versions of PyTorch differ in the type of the group's name.
template <typename... Arguments>
Tensor call_functional(const char* name, Arguments&&... arguments) {
  torch::jit::Stack stack{c10::IValue(std::forward<Arguments>(arguments))...};
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  return stack.at(0).toTensor();
}

// Gloo ends a process that receives more than it expects, and with equal sizes no engine but Horovod notices that the
// ranks sum packets of different layers. So the ranks compare name and size when a rank uses a name the first time.
void agree_once(const Tensor& packet, const std::string& name, const std::string& group) {
  static std::mutex mutex;
  static std::unordered_map<std::string, int64_t> agreed;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = agreed.find(group + name);
    if (found != agreed.end() && found->second == packet.numel()) return;
  }
  static const auto agree = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("hvd_syncbn::agree", "")
                                .typed<void(const Tensor&, const std::string&, const std::string&)>();
  agree.call(packet, name, group);
  const std::lock_guard<std::mutex> lock(mutex);
  agreed[group + name] = packet.numel();
}

}  // namespace

Tensor sum_over_distributed(const Tensor& packet, const std::string& name, const std::string& group) {
  const std::string group_name = group.substr(group.find(':') + 1);
  if (c10::impl::dispatch_mode_enabled() || packet.key_set().has(c10::DispatchKey::Python)) {
    return call_functional("_c10d_functional::wait_tensor",
                           call_functional("_c10d_functional::all_reduce", packet, "sum", group_name));
  }
  agree_once(packet, name, group);
  try {
    std::vector<Tensor> packets{packet};
    c10d::resolve_process_group(group_name)->allreduce(packets)->wait();
  } catch (c10::Error& error) {
    error.add_context("hvd-syncbn: the collective '" + name + "' failed");
    throw;
  } catch (const std::exception& error) {  // Gloo's own
    TORCH_CHECK(false, "hvd-syncbn: the collective '", name,
                "' failed: another rank has ended, or did not call the layer ",
                "within the process group's timeout. Received: ", error.what());
  }
  return packet;
}

}  // namespace hvd_syncbn

TORCH_LIBRARY_FRAGMENT(hvd_syncbn, m) {
  using at::Tensor;
  m.def("sum_over_distributed_(Tensor(a!) packet, str name, str group) -> ()",
        [](const Tensor& packet, const std::string& name, const std::string& group) {
          const Tensor sum = hvd_syncbn::sum_over_distributed(packet, name, group);
          if (!sum.is_same(packet)) packet.copy_(sum);
        });
}
