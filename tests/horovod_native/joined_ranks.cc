// The coordinator's answers where rank 0 has joined, without processes: this program plays the other ranks.
// Usage: joined_ranks RANKS. Prints one line for each answer; tests/unit/test_horovod_native.py compares them.

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "horovod/common/controller.h"
#include "horovod/common/global_state.h"

namespace horovod {
namespace common {

// In the place of process_set.cc, which connects processes.
ProcessSet::ProcessSet(std::vector<int>) {}
ProcessSetTable::ProcessSetTable() {}

namespace {

constexpr int GPU_ID = 3;

class HostTensor : public Tensor {
 public:
  explicit HostTensor(std::vector<int64_t> shape) : shape_(std::move(shape)) {}
  const DataType dtype() const override { return HOROVOD_FLOAT32; }
  const TensorShape shape() const override { return shape_; }
  const void* data() const override { return nullptr; }
  int64_t size() const override { return 4 * shape_.num_elements(); }

 private:
  TensorShape shape_;
};

// Allocates nothing, and knows on which device it would have.
class Context : public OpContext {
 public:
  explicit Context(int device) : device(device) {}
  Status AllocatePersistent(int64_t, std::shared_ptr<PersistentBuffer>*) override { return Status::OK(); }
  Status AllocateOutput(TensorShape, std::shared_ptr<Tensor>*, std::shared_ptr<ReadyEvent>*) override {
    return Status::OK();
  }
  Status AllocateZeros(int64_t elements, DataType, std::shared_ptr<Tensor>* tensor) override {
    *tensor = std::make_shared<HostTensor>(std::vector<int64_t>{elements});
    return Status::OK();
  }
  std::shared_ptr<OpContext> OnDevice(int device) const override { return std::make_shared<Context>(device); }
  Framework framework() const override { return Framework::PYTORCH; }

  const int device;
};

// Rank 0. In the next cycle the other ranks request what is in `others`, and have the same tensors in their caches or
// none.
class Coordinator : public Controller {
 public:
  Coordinator(HorovodGlobalState& state, ProcessSet& set, int size)
      : Controller(set.response_cache, set.tensor_queue, state.timeline, state.parameter_manager, set.group_table,
                   state.timeline_controller) {
    size_ = size;
    is_coordinator_ = true;
    for (int rank = 0; rank < size; ++rank) {
      global_ranks_.push_back(rank);
    }
    Next();
  }

  void Next() { others = std::vector<RequestList>(size_); }

  int GetTypeSize(DataType dtype) override { return DataType_Size(dtype); }
  void CrossRankBitwiseAnd(std::vector<long long>& bits, int) override {
    bits[0] &= others_hit ? ~2LL : 5LL;  // the second bit: nobody has a tensor that is not cached
  }
  void CrossRankBitwiseOr(std::vector<long long>&, int) override {}
  void Bcast(void*, size_t, int, Communicator) override {}
  void AlltoallGetRecvSplits(const std::vector<int32_t>&, std::vector<int32_t>&) override {}
  void Barrier(Communicator) override {}
  void Allgather2Ints(std::array<int, 2>, std::vector<int>&) override {}

  std::vector<RequestList> others;
  bool others_hit = false;

 protected:
  void DoInitialization() override {}
  void RecvReadyTensors(std::vector<std::string>&, std::vector<RequestList>& ready) override { ready = others; }
  void SendReadyTensors(RequestList&) override {}
  void SendFinalTensors(ResponseList&) override {}
  void RecvFinalTensors(ResponseList&) override {}
};

Request MakeRequest(int rank, Request::RequestType type, const std::string& name, int device) {
  Request request;
  request.set_request_rank(rank);
  request.set_request_type(type);
  request.set_tensor_name(name);
  request.set_tensor_type(HOROVOD_FLOAT32);
  request.set_device(device);
  request.set_tensor_shape({2, 3});
  return request;
}

void Enqueue(ProcessSet& set, Request::RequestType type, const std::string& name, int device) {
  TensorTableEntry entry;
  entry.tensor_name = name;
  entry.context = std::make_shared<Context>(device);
  entry.tensor = entry.output = std::make_shared<HostTensor>(std::vector<int64_t>{2, 3});
  entry.device = device;
  Request request = MakeRequest(0, type, name, device);
  set.tensor_queue.AddToTensorQueue(entry, request);
}

// Runs one cycle and says what this rank then has to do.
void Cycle(Coordinator& controller, HorovodGlobalState& state, ProcessSet& set) {
  auto responses = controller.ComputeResponseList(false, state, set);
  controller.Next();
  for (auto& response : responses.responses()) {
    std::cout << "  " << response.tensor_names_string() << ": "
              << Response::ResponseType_Name(response.response_type());
    if (response.response_type() == Response::ERROR) {
      std::cout << ": " << response.error_message() << std::endl;
      continue;
    }
    std::cout << ", devices";
    for (int device : response.devices()) {
      std::cout << " " << device;
    }
    std::vector<TensorTableEntry> entries;
    set.tensor_queue.GetTensorEntriesFromResponse(response, entries, set.joined, 0);
    for (auto& entry : entries) {
      if (entry.tensor != nullptr) {
        std::cout << "; " << entry.tensor->shape().num_elements() << " elements for " << entry.device << " on "
                  << static_cast<Context&>(*entry.context).device;
      }
    }
    std::cout << std::endl;
  }
}

void Run(int size, int joined_on, int device) {
  std::cout << "joined on " << joined_on << ", tensors on " << device << std::endl;
  auto state = std::make_unique<HorovodGlobalState>();
  ProcessSet set;
  set.response_cache.set_capacity(64);
  auto controller = std::make_shared<Coordinator>(*state, set, size);
  set.controller = controller;
  controller->Initialize();
  auto request = [&](Request::RequestType type, const std::string& name) {
    for (int rank = 1; rank < size; ++rank) {
      controller->others[rank].add_request(MakeRequest(rank, type, name, device));
    }
  };

  Enqueue(set, Request::ALLREDUCE, "cached", device);
  request(Request::ALLREDUCE, "cached");
  Cycle(*controller, *state, set);
  Enqueue(set, Request::ALLGATHER, "gathered", device);
  request(Request::ALLGATHER, "gathered");
  Cycle(*controller, *state, set);

  Enqueue(set, Request::JOIN, JOIN_TENSOR_NAME, joined_on);
  const std::vector<std::pair<std::string, Request::RequestType>> all = {
      {"gathered", Request::ALLGATHER},          {"allreduce", Request::ALLREDUCE}, {"adasum", Request::ADASUM},
      {"allgather", Request::ALLGATHER},         {"broadcast", Request::BROADCAST}, {"alltoall", Request::ALLTOALL},
      {"reducescatter", Request::REDUCESCATTER}, {"barrier", Request::BARRIER}};
  for (auto& [name, type] : all) {
    request(type, name);
    Cycle(*controller, *state, set);
  }
  controller->others_hit = true;  // now from the cache
  Cycle(*controller, *state, set);
}

}  // namespace
}  // namespace common
}  // namespace horovod

int main(int argc, char** argv) {
  for (int joined_on : {CPU_DEVICE_ID, horovod::common::GPU_ID}) {
    for (int device : {CPU_DEVICE_ID, horovod::common::GPU_ID}) {
      horovod::common::Run(std::atoi(argv[1]), joined_on, device);
    }
  }
  return 0;
}
