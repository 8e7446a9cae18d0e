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

// The size of the packets of each collective that the ranks agree on, by group and name.
class Agreed {
 public:
  // Whether it was unknown, or another size.
  bool is_new(const std::string& collective, int64_t words) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = words_.find(collective);
    return found == words_.end() || found->second != words;
  }
  void add(const std::string& collective, int64_t words) {
    const std::lock_guard<std::mutex> lock(mutex_);
    words_[collective] = words;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, int64_t> words_;
};

Agreed& agreed() {
  static Agreed instance;
  return instance;
}

// Gloo ends a process that receives more than it expects, and with equal sizes no engine but Horovod notices that the
// ranks sum packets of different layers. So the ranks compare name and size when a rank uses a name the first time.
void agree_once(const Tensor& packet, const std::string& name, const std::string& group) {
  if (!agreed().is_new(group + name, packet.numel())) return;
  static const auto agree = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("hvd_syncbn::agree", "")
                                .typed<void(const Tensor&, const std::string&, const std::string&)>();
  agree.call(packet, name, group);
  agreed().add(group + name, packet.numel());
}

// A compiled program compares nothing. Where one rank leaves it for eager code later, as at the limit of
// recompilations, the others do not compare either: so it does not count as new there, in neither direction.
void agree_in_compiled_program(const Tensor& packet, const std::string& name, const std::string& group) {
  const auto words = packet.sym_numel().maybe_as_int();
  const std::string layer = name.substr(0, name.rfind('.'));
  for (const char* direction : {".forward", ".backward"}) {
    if (words.has_value()) agreed().add(group + layer + direction, *words);
  }
}

}  // namespace

Tensor sum_over_distributed(const Tensor& packet, const std::string& name, const std::string& group) {
  const std::string group_name = group.substr(group.find(':') + 1);
  if (c10::impl::dispatch_mode_enabled() || packet.key_set().has(c10::DispatchKey::Python)) {
    agree_in_compiled_program(packet, name, group);
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
