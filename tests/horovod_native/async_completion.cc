// In which order Horovod's GPU operations complete, on a device that this program plays: what is enqueued on a stream
// runs when somebody waits for it, not before. Usage: async_completion TIMELINE_FILE. Prints what
// tests/unit/test_horovod_native.py compares.

#include <deque>
#include <functional>
#include <future>
#include <iostream>
#include <memory>
#include <mutex>
#include <vector>

#include "horovod/common/global_state.h"
#include "horovod/common/ops/gpu_operations.h"

struct FakeStream {
  std::deque<std::function<void()>> pending;
  int enqueued = 0;
  int done = 0;
};

struct FakeEvent {
  FakeStream* stream = nullptr;
  int after = 0;  // so many operations of the stream
};

namespace {

std::mutex device;

void RunUntil(FakeStream& stream, int count) {
  std::lock_guard<std::mutex> guard(device);
  while (stream.done < count) {
    stream.pending.front()();
    stream.pending.pop_front();
    ++stream.done;
  }
}

}  // namespace

const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int*, int* greatest) {
  *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = new FakeStream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new FakeEvent;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  std::lock_guard<std::mutex> guard(device);
  *event = {stream, stream->enqueued};
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  RunUntil(*event->stream, event->after);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaMemcpyAsync(void*, const void*, std::size_t, cudaMemcpyKind, cudaStream_t) { return cudaSuccess; }

namespace horovod {
namespace common {

// In the place of process_set.cc, which connects processes.
ProcessSet::ProcessSet(std::vector<int>) {}
ProcessSetTable::ProcessSetTable() {}

namespace {

// One number, in memory that the next tensor gets when this one is gone, as a framework's allocator does it.
class Zero : public Tensor {
 public:
  Zero() {
    if (free_.empty()) {
      free_.push_back(std::make_unique<float>());
    }
    memory_ = std::move(free_.back());
    free_.pop_back();
    *memory_ = 0;
  }
  ~Zero() override { free_.push_back(std::move(memory_)); }
  const DataType dtype() const override { return HOROVOD_FLOAT32; }
  const TensorShape shape() const override { return TensorShape({1}); }
  const void* data() const override { return memory_.get(); }
  int64_t size() const override { return sizeof(float); }

 private:
  static std::vector<std::unique_ptr<float>> free_;
  std::unique_ptr<float> memory_;
};

std::vector<std::unique_ptr<float>> Zero::free_;

class Context : public OpContext {
 public:
  Status AllocatePersistent(int64_t, std::shared_ptr<PersistentBuffer>*) override { return Status::OK(); }
  Status AllocateOutput(TensorShape, std::shared_ptr<Tensor>*, std::shared_ptr<ReadyEvent>*) override {
    return Status::OK();
  }
  Status AllocateZeros(int64_t, DataType, std::shared_ptr<Tensor>*) override { return Status::OK(); }
  Framework framework() const override { return Framework::PYTORCH; }
};

class Job {
 public:
  Job() : operations_(&gpu_, &state) {
    state.enable_async_completion = true;
    gpu_.streams.resize(2);
    gpu_.finalizer_thread_pool.create(1);
    gpu_.awaited_finalizer_thread_pool.create(1);
  }

  // Runs what follows as operations.cc runs it for tensors that a layer waits for, with Horovod's default for the
  // others.
  void Await() {
    state.enable_async_completion = false;
    state.current_nccl_stream = state.AwaitedNcclStream();
  }

  // Enqueues an allreduce with a rank that has a 1, and what comes after it; returns whether that is so.
  void Allreduce(StatusCallback callback) {
    std::vector<TensorTableEntry> entries(1);
    entries[0].tensor_name = "tensor";
    entries[0].device = 0;
    entries[0].context = std::make_shared<Context>();
    entries[0].tensor = entries[0].output = std::make_shared<Zero>();
    entries[0].callback = std::move(callback);
    operations_.InitGPU(entries);
    operations_.InitGPUQueue(entries, Response());
    {
      std::lock_guard<std::mutex> guard(device);
      auto* value = static_cast<float*>(const_cast<void*>(entries[0].tensor->data()));
      Stream().pending.push_back([this, value] { sums.push_back(*value += 1); });
      ++Stream().enqueued;
    }
    operations_.FinalizeGPUQueue(entries);
  }

  // Keeps the thread that runs callbacks of gradients from going on until the returned promise is fulfilled.
  std::promise<void> Hold() {
    std::promise<void> gate;
    gpu_.finalizer_thread_pool.execute([future = gate.get_future().share()] { future.wait(); });
    return gate;
  }

  void WaitForCallbacks() {
    auto done = std::make_shared<std::promise<void>>();
    const bool is_awaited = state.current_nccl_stream == state.AwaitedNcclStream();
    auto& pool = is_awaited ? gpu_.awaited_finalizer_thread_pool : gpu_.finalizer_thread_pool;
    pool.execute([done] { done->set_value(); });
    done->get_future().wait();
  }

  FakeStream& Stream() { return *gpu_.streams[state.current_nccl_stream][0]; }

  HorovodGlobalState& state = *new HorovodGlobalState;  // larger than a stack
  std::vector<float> sums;

 private:
  GPUContext gpu_;
  GPUOpContext operations_;
};

void JoinedRank(bool awaited) {
  Job job;
  if (awaited) {
    job.Await();
  }
  for (int i = 0; i < 3; ++i) {
    job.Allreduce(nullptr);  // the zeros of a rank that has joined have no callback
    job.WaitForCallbacks();
  }
  RunUntil(job.Stream(), 3);
  std::cout << (awaited ? "awaited " : "") << "sums with a rank that has joined:";
  for (float sum : job.sums) {
    std::cout << " " << sum;
  }
  std::cout << std::endl;
}

void TwoOperations() {
  Job job;
  std::vector<int> after;
  auto gate = job.Hold();
  for (int i = 0; i < 2; ++i) {
    job.Allreduce([&](const Status& status) { after.push_back((*status.event.event)->after); });
  }
  gate.set_value();
  job.WaitForCallbacks();
  std::cout << "streams wait for: " << after[0] << " and " << after[1] << " operations, " << job.sums.size()
            << " run on the way" << std::endl;
}

// Beside gradients that NCCL has not begun, and whose thread is held.
void AwaitedTensors() {
  for (bool elastic : {false, true}) {
    Job job;
    job.state.elastic_enabled = elastic;
    job.state.enable_async_completion = false;
    auto gate = job.Hold();
    bool gradient_is_done = false;
    job.Allreduce([&](const Status&) { gradient_is_done = true; });
    job.Await();
    std::vector<int> after;
    for (int i = 0; i < 2; ++i) {
      job.Allreduce(
          [&](const Status& status) { after.push_back(status.event.event ? (*status.event.event)->after : 0); });
      if (elastic) {
        job.WaitForCallbacks();
      }
    }
    std::cout << "awaited" << (elastic ? ", elastic" : "") << ": streams wait for " << after[0] << " and " << after[1]
              << " operations, " << job.sums.size() << " run on the way, gradient "
              << (gradient_is_done ? "done" : "pending") << ", next stream " << job.state.current_nccl_stream
              << std::endl;
    gate.set_value();
    job.state.current_nccl_stream = 0;
    job.WaitForCallbacks();
  }
}

void WithTimeline(const char* file) {
  Job job;
  auto& timeline = job.state.timeline;
  timeline.Initialize(file, 1);
  timeline.NegotiateStart("tensor", Request::ALLREDUCE);
  timeline.NegotiateEnd("tensor");
  timeline.Start("tensor", Response::ALLREDUCE, 4);
  size_t run = 0;
  job.Allreduce([&](const Status&) { run = job.sums.size(); });
  job.WaitForCallbacks();
  std::cout << "with a timeline, run before the callback: " << run << std::endl;
  timeline.Shutdown();
}

}  // namespace
}  // namespace common
}  // namespace horovod

int main(int argc, char** argv) {
  horovod::common::JoinedRank(false);
  horovod::common::TwoOperations();
  horovod::common::AwaitedTensors();
  horovod::common::JoinedRank(true);
  horovod::common::WithTimeline(argv[1]);
  return 0;
}
