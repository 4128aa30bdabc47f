#include "backend.h"

#include <ATen/ops/cat.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/Utils.hpp>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "arguments.h"

namespace shm {
namespace {

using std::chrono::milliseconds;

constexpr int kMostRanks = 512;
constexpr auto kSpin = std::chrono::microseconds(300), kYield = std::chrono::microseconds(50);
constexpr auto kParting = std::chrono::seconds(5);
constexpr auto kUnlimited = std::chrono::hours(24 * 365);

// Threads are joined without the interpreter's lock: what they still do (a callback, a last reference) may need it.
struct WithoutGil {
  WithoutGil() {
    if (Py_IsInitialized() && PyGILState_Check()) state = PyEval_SaveThread();
  }
  ~WithoutGil() {
    if (state != nullptr) PyEval_RestoreThread(state);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  PyThreadState* state = nullptr;
};

}  // namespace

ShmBackend::ShmBackend(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, milliseconds timeout, std::vector<int64_t> names, bool crowded)
    : Backend(rank, size), timeout_(timeout) {
  TORCH_CHECK_VALUE(size <= kMostRanks, "shm: a group of ", size, " ranks; at most ", kMostRanks, " fit, use gloo");
  const auto publish = [&](const std::string& text) { store->set("segment", std::vector<uint8_t>(text.begin(), text.end())); };
  const auto fetch = [&] {
    store->wait({"segment"}, timeout);
    const auto text = store->get("segment");
    return std::string(text.begin(), text.end());
  };
  try {
    segment_ = std::make_shared<Segment>(rank, size, std::move(names), publish, fetch, timeout);
  } catch (const Error& error) {
    throw_torch_error(error.what());
  }
  const Patience patience = crowded ? Patience{} : Patience{kSpin, kYield};
  exchange_ = std::make_shared<Exchange>(segment_, patience);
  mail_ = std::make_shared<Mail>(segment_, patience);
  queue_ = std::make_shared<Queue>();
}

ShmBackend::~ShmBackend() { finish_all(); }

void ShmBackend::finish_all() {
  if (closed_.exchange(true)) return;
  const WithoutGil released;
  segment_->part_at(Clock::now() + kParting);  // what others may still wait for gets a moment
  queue_->stop();
  mail_->stop();
  segment_->leave();
}

void ShmBackend::shutdown() { finish_all(); }

void ShmBackend::abort() {
  segment_->fail("shm: connection closed, " + segment_->own_name() + " aborted the group of " + segment_->describe_group());
  mail_->fail_all(as_torch_error(std::make_exception_ptr(Error("shm: connection closed, the group was aborted"))));
}

ShmBackend::WorkPointer ShmBackend::submit(
    const char* name, c10d::OpType type, Tensors outputs, milliseconds timeout, bool asynchronous, Body body) {
  if (closed_) throw_torch_error("shm: connection closed, the group was taken down before this call");
  if (timeout.count() <= 0) timeout = timeout_;
  const uint64_t number = ++number_;
  auto run = [segment = segment_, exchange = exchange_, name, number, timeout, body = std::move(body)] {
    c10::NoGradGuard no_grad;
    try {
      segment->check();
      body(Call{name, number, Clock::now() + (timeout.count() > 0 ? timeout : milliseconds(kUnlimited))});
    } catch (const std::exception& error) {
      segment->fail(error.what());
      throw;
    }
  };
  auto work = c10::make_intrusive<CollectiveWork>(type, std::move(outputs), std::move(run), queue_);
  queue_->submit(work, asynchronous);
  return work;
}

ShmBackend::WorkPointer ShmBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  check_one(tensors);
  const Dense data(tensors[0]);
  return submit("broadcast", c10d::OpType::BROADCAST, tensors, options.timeout, options.asyncOp, [=, this, root = options.rootRank](const Call& call) {
    exchange_->broadcast(call, static_cast<int>(root), bytes_of(data.own), data.own.nbytes());
    data.give_back();
  });
}

ShmBackend::WorkPointer ShmBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  check_one(tensors);
  const Op op = operation(options.reduceOp, tensors[0]);
  const Dense data(tensors[0]);
  return submit("all_reduce", c10d::OpType::ALLREDUCE, tensors, options.timeout, options.asyncOp, [=, this](const Call& call) {
    exchange_->all_reduce(call, type_of(data.own), op, bytes_of(data.own), data.own.numel());
    data.give_back();
  });
}

ShmBackend::WorkPointer ShmBackend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  std::vector<std::pair<Dense, Op>> all;
  for (const at::Tensor& tensor : tensors) {
    check(tensor);
    all.emplace_back(Dense(tensor), operation(options.reduceOp, tensor));
  }
  return submit("all_reduce", c10d::OpType::ALLREDUCE_COALESCED, tensors, options.timeout, options.asyncOp, [=, this](const Call& call) {
    for (const auto& [data, op] : all) {
      exchange_->all_reduce(call, type_of(data.own), op, bytes_of(data.own), data.own.numel());
      data.give_back();
    }
  });
}

ShmBackend::WorkPointer ShmBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  check_one(tensors);
  const Op op = operation(options.reduceOp, tensors[0]);
  const Dense data(tensors[0]);
  const bool keep = options.rootRank == rank_;
  return submit("reduce", c10d::OpType::REDUCE, tensors, options.timeout, options.asyncOp, [=, this](const Call& call) {
    exchange_->all_reduce(call, type_of(data.own), op, bytes_of(data.own), data.own.numel(), keep);
    if (keep) data.give_back();
  });
}

// `output` receives every rank's `input`, in rank order.
ShmBackend::Body ShmBackend::gathering(const at::Tensor& output, const at::Tensor& input) {
  check(output), check(input);
  TORCH_CHECK_VALUE(
      output.numel() == input.numel() * size_ && output.scalar_type() == input.scalar_type(), "shm: all_gather of ", input.sizes(), " ",
      input.scalar_type(), " over ", size_, " ranks into ", output.sizes(), " ", output.scalar_type(), ": the output must be ", size_, " times as large");
  const Dense whole(output), own(input);
  return [=, this](const Call& call) {
    const size_t bytes = own.own.nbytes();
    std::vector<char*> parts(size_);
    for (int r = 0; r < size_; r++) parts[r] = bytes_of(whole.own) + r * bytes;
    exchange_->all_gather(call, bytes_of(own.own), parts, bytes);
    whole.give_back();
  };
}

ShmBackend::Body ShmBackend::list_gathering(const Tensors& outputs, const at::Tensor& input) {
  check(input);
  check_list(outputs, size_, input, "all_gather");
  const Dense own(input);
  std::vector<Dense> all(outputs.begin(), outputs.end());
  return [=, this](const Call& call) {
    std::vector<char*> parts;
    for (const Dense& part : all) parts.push_back(bytes_of(part.own));
    exchange_->all_gather(call, bytes_of(own.own), parts, own.own.nbytes());
    for (const Dense& part : all) part.give_back();
  };
}

ShmBackend::WorkPointer ShmBackend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  return submit("all_gather", c10d::OpType::_ALLGATHER_BASE, {output}, options.timeout, options.asyncOp, gathering(output, input));
}

ShmBackend::WorkPointer ShmBackend::allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  check_one(inputs);
  TORCH_CHECK_VALUE(outputs.size() == 1, "shm: one list of outputs a rank, got ", outputs.size());
  return submit("all_gather", c10d::OpType::ALLGATHER, outputs[0], options.timeout, options.asyncOp, list_gathering(outputs[0], inputs[0]));
}

ShmBackend::WorkPointer ShmBackend::allgather_coalesced(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  // outputs[rank][i] receives inputs[i] of that rank.
  TORCH_CHECK_VALUE(static_cast<int>(outputs.size()) == size_, "shm: all_gather needs ", size_, " lists of outputs, got ", outputs.size());
  std::vector<Body> all;
  Tensors flat;
  for (size_t i = 0; i < inputs.size(); i++) {
    Tensors column;
    for (const auto& list : outputs) {
      TORCH_CHECK_VALUE(list.size() == inputs.size(), "shm: all_gather of ", inputs.size(), " tensors into a list of ", list.size());
      column.push_back(list[i]);
    }
    all.push_back(list_gathering(column, inputs[i]));
    flat.insert(flat.end(), column.begin(), column.end());
  }
  return submit("all_gather", c10d::OpType::ALLGATHER_COALESCED, flat, options.timeout, options.asyncOp, [all](const Call& call) {
    for (const Body& body : all) body(call);
  });
}

ShmBackend::WorkPointer ShmBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "shm: ", outputs.size(), " outputs for ", inputs.size(), " inputs");
  std::vector<Body> all;
  for (size_t i = 0; i < inputs.size(); i++) all.push_back(gathering(outputs[i], inputs[i]));
  return submit("all_gather", c10d::OpType::ALLGATHER_COALESCED, outputs, options.timeout, options.asyncOp, [all](const Call& call) {
    for (const Body& body : all) body(call);
  });
}

// `output` receives this rank's part of the reduced `input`.
ShmBackend::Body ShmBackend::scattering(const c10d::ReduceOp& reduce, const at::Tensor& output, const at::Tensor& input) {
  check(output), check(input);
  TORCH_CHECK_VALUE(
      input.numel() == output.numel() * size_ && output.scalar_type() == input.scalar_type(), "shm: reduce_scatter of ", input.sizes(), " ",
      input.scalar_type(), " over ", size_, " ranks into ", output.sizes(), " ", output.scalar_type(), ": the input must be ", size_, " times as large");
  const Op op = operation(reduce, input);
  const Dense part(output), whole(input);
  return [=, this](const Call& call) {
    exchange_->reduce_scatter(call, type_of(whole.own), op, bytes_of(whole.own), bytes_of(part.own), part.own.numel());
    part.give_back();
  };
}

ShmBackend::WorkPointer ShmBackend::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  Body body = scattering(options.reduceOp, output, input);
  return submit("reduce_scatter", c10d::OpType::_REDUCE_SCATTER_BASE, {output}, options.timeout, options.asyncOp, std::move(body));
}

ShmBackend::WorkPointer ShmBackend::reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) {
  check_one(outputs);
  TORCH_CHECK_VALUE(inputs.size() == 1, "shm: one list of inputs a rank, got ", inputs.size());
  check_list(inputs[0], size_, outputs[0], "reduce_scatter");
  Tensors flat;
  for (const at::Tensor& tensor : inputs[0]) flat.push_back(tensor.reshape(-1));
  Body body = scattering(options.reduceOp, outputs[0], at::cat(flat));
  return submit("reduce_scatter", c10d::OpType::REDUCE_SCATTER, outputs, options.timeout, options.asyncOp, std::move(body));
}

ShmBackend::WorkPointer ShmBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "shm: ", outputs.size(), " outputs for ", inputs.size(), " inputs");
  std::vector<Body> all;
  for (size_t i = 0; i < inputs.size(); i++) all.push_back(scattering(options.reduceOp, outputs[i], inputs[i]));
  const auto type = c10d::OpType::REDUCE_SCATTER_TENSOR_COALESCED;
  return submit("reduce_scatter", type, outputs, options.timeout, options.asyncOp, [all](const Call& call) {
    for (const Body& body : all) body(call);
  });
}

ShmBackend::WorkPointer ShmBackend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  TORCH_CHECK_VALUE(
      static_cast<int>(outputs.size()) == size_ && static_cast<int>(inputs.size()) == size_, "shm: all_to_all over ", size_,
      " ranks got lists of ", outputs.size(), " and ", inputs.size());
  for (int r = 0; r < size_; r++) check(outputs[r]), check(inputs[r]);
  const std::vector<Dense> to(outputs.begin(), outputs.end()), from(inputs.begin(), inputs.end());
  return submit("all_to_all", c10d::OpType::ALLTOALL, outputs, options.timeout, options.asyncOp, [=, this](const Call& call) {
    std::vector<Exchange::Part> sends, receives;
    for (const Dense& part : from) sends.push_back({bytes_of(part.own), part.own.nbytes()});
    for (const Dense& part : to) receives.push_back({bytes_of(part.own), part.own.nbytes()});
    exchange_->all_to_all(call, sends, receives);
    for (const Dense& part : to) part.give_back();
  });
}

ShmBackend::WorkPointer ShmBackend::alltoall_base(
    at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
    const c10d::AllToAllOptions& options) {
  check(output), check(input);
  c10d::checkSplitSizes(input_splits, input, size_);
  c10d::checkSplitSizes(output_splits, output, size_);
  const Dense to(output), from(input);
  // Rows of the first dimension, in rank order: equal numbers of them unless splits are given.
  const auto parts = [size = size_](const Dense& tensor, const std::vector<int64_t>& splits) {
    const int64_t rows = tensor.own.dim() ? tensor.own.size(0) : 1;
    const size_t row = rows ? tensor.own.nbytes() / rows : 0;
    std::vector<Exchange::Part> found;
    char* at = bytes_of(tensor.own);
    for (int r = 0; r < size; r++) {
      found.push_back({at, (splits.empty() ? rows / size : splits[r]) * row});
      at += found.back().bytes;
    }
    return found;
  };
  const auto sends = parts(from, input_splits), receives = parts(to, output_splits);
  return submit("all_to_all", c10d::OpType::ALLTOALL_BASE, {output}, options.timeout, options.asyncOp, [=, this](const Call& call) {
    exchange_->all_to_all(call, sends, receives);
    (void)from;  // keeps the memory
    to.give_back();
  });
}

ShmBackend::WorkPointer ShmBackend::gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  check_one(inputs);
  const int root = static_cast<int>(options.rootRank);
  Tensors results;
  if (rank_ == root) {
    TORCH_CHECK_VALUE(outputs.size() == 1, "shm: gather needs one list of outputs at its root, got ", outputs.size());
    results = outputs[0];
    check_list(results, size_, inputs[0], "gather");
  }
  const Dense own(inputs[0]);
  const std::vector<Dense> all(results.begin(), results.end());
  return submit("gather", c10d::OpType::GATHER, results, options.timeout, options.asyncOp, [=, this](const Call& call) {
    std::vector<Exchange::Part> sends(size_), receives(size_);
    sends[root] = {bytes_of(own.own), own.own.nbytes()};
    for (size_t r = 0; r < all.size(); r++) receives[r] = {bytes_of(all[r].own), all[r].own.nbytes()};
    exchange_->all_to_all(call, sends, receives);
    for (const Dense& part : all) part.give_back();
  });
}

ShmBackend::WorkPointer ShmBackend::scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) {
  check_one(outputs);
  const int root = static_cast<int>(options.rootRank);
  Tensors parts;
  if (rank_ == root) {
    TORCH_CHECK_VALUE(inputs.size() == 1, "shm: scatter needs one list of inputs at its root, got ", inputs.size());
    parts = inputs[0];
    check_list(parts, size_, outputs[0], "scatter");
  }
  const Dense own(outputs[0]);
  const std::vector<Dense> all(parts.begin(), parts.end());
  return submit("scatter", c10d::OpType::SCATTER, outputs, options.timeout, options.asyncOp, [=, this](const Call& call) {
    std::vector<Exchange::Part> sends(size_), receives(size_);
    for (size_t r = 0; r < all.size(); r++) sends[r] = {bytes_of(all[r].own), all[r].own.nbytes()};
    receives[root] = {bytes_of(own.own), own.own.nbytes()};
    exchange_->all_to_all(call, sends, receives);
    own.give_back();
  });
}

ShmBackend::WorkPointer ShmBackend::barrier(const c10d::BarrierOptions& options) {
  return submit("barrier", c10d::OpType::BARRIER, {}, options.timeout, options.asyncOp, [this](const Call& call) { exchange_->barrier(call); });
}

ShmBackend::WorkPointer ShmBackend::post(at::Tensor& tensor, bool sending, int peer, int tag) {
  check(tensor);
  TORCH_CHECK_VALUE(peer < size_ && peer != rank_, "shm: rank ", rank_, " of ", size_, " cannot send to or receive from rank ", peer);
  const auto type = sending ? c10d::OpType::SEND : peer < 0 ? c10d::OpType::RECVANYSOURCE : c10d::OpType::RECV;
  auto work = c10::make_intrusive<TransferWork>(type, Tensors{tensor}, mail_, timeout_);
  const Dense data(tensor);
  auto letter = std::make_shared<Letter>();
  letter->sending = sending;
  letter->data = bytes_of(data.own);
  letter->bytes = data.own.nbytes();
  letter->peer = peer;
  letter->tag = tag;
  letter->finished = [work, data, sending](std::exception_ptr error) {
    c10::NoGradGuard no_grad;
    if (!error && !sending) data.give_back();
    work->complete(error ? as_torch_error(error) : nullptr);
  };
  work->letter = letter;
  try {
    mail_->post(letter);
  } catch (const Error&) {
    letter->finished = nullptr;
    work->complete(as_torch_error(std::current_exception()));
  }
  return work;
}

ShmBackend::WorkPointer ShmBackend::send(Tensors& tensors, int target, int tag) {
  check_one(tensors);
  return post(tensors[0], true, target, tag);
}

ShmBackend::WorkPointer ShmBackend::recv(Tensors& tensors, int source, int tag) {
  check_one(tensors);
  return post(tensors[0], false, source, tag);
}

ShmBackend::WorkPointer ShmBackend::recvAnysource(Tensors& tensors, int tag) {
  check_one(tensors);
  return post(tensors[0], false, -1, tag);
}

}  // namespace shm
