// The `torch.distributed` backend over shared memory: argument checks, the queue of a group, and the Work objects.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <memory>
#include <string>
#include <vector>

#include "exchange.h"
#include "mail.h"
#include "queue.h"
#include "segment.h"

namespace shm {

class ShmBackend : public c10d::Backend {
 public:
  // `names` are the ranks' numbers in the whole run. `crowded`: more ranks than cores, where looking again and again would
  // keep the awaited rank from running.
  ShmBackend(
      const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds timeout, std::vector<int64_t> names,
      bool crowded);
  ~ShmBackend() override;

  const std::string getBackendName() const override { return "shm"; }
  void setTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return number_; }
  void abort() override;
  void shutdown() override;

  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using WorkPointer = c10::intrusive_ptr<c10d::Work>;

  WorkPointer broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPointer allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPointer allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  WorkPointer reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPointer allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPointer _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPointer allgather_coalesced(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPointer allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPointer gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  WorkPointer scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override;
  WorkPointer reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override;
  WorkPointer _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  WorkPointer reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override;
  WorkPointer alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
      const c10d::AllToAllOptions& options) override;
  WorkPointer alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  WorkPointer barrier(const c10d::BarrierOptions& options) override;
  WorkPointer send(Tensors& tensors, int target, int tag) override;
  WorkPointer recv(Tensors& tensors, int source, int tag) override;
  WorkPointer recvAnysource(Tensors& tensors, int tag) override;

 private:
  // One collective: what it does to memory, given how it is named and when it must be over.
  using Body = std::function<void(const Call&)>;
  WorkPointer submit(
      const char* name, c10d::OpType type, Tensors outputs, std::chrono::milliseconds timeout, bool asynchronous, Body body);
  WorkPointer post(at::Tensor& tensor, bool sending, int peer, int tag);
  Body gathering(const at::Tensor& output, const at::Tensor& input);
  Body list_gathering(const Tensors& outputs, const at::Tensor& input);
  Body scattering(const c10d::ReduceOp& reduce, const at::Tensor& output, const at::Tensor& input);
  void finish_all();

  std::chrono::milliseconds timeout_;
  std::shared_ptr<Segment> segment_;
  std::shared_ptr<Exchange> exchange_;
  std::shared_ptr<Mail> mail_;
  std::shared_ptr<Queue> queue_;
  std::atomic<uint64_t> number_{0};
  std::atomic<bool> closed_{false};
};

}  // namespace shm
