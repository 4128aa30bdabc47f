// The order of a group's collectives, and the Work objects that say when they are over.
//
// A call that blocks runs on the calling thread when nothing is queued before it; anything else waits in the queue for a
// thread of the group's own, which is started with the first such call. Whoever waits for the front of the queue before the
// thread has taken it runs it at once.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "mail.h"
#include "segment.h"

namespace shm {

class Queue;

// Errors of a group as torch knows them: `torch.distributed.DistBackendError`.
[[noreturn]] void throw_torch_error(const std::string& message);
std::exception_ptr as_torch_error(std::exception_ptr error);

class ShmWork : public c10d::Work {
 public:
  ShmWork(c10d::OpType type, std::vector<at::Tensor> outputs) : Work(-1, type), outputs_(std::move(outputs)) {}
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  bool wait(std::chrono::milliseconds timeout) override;
  void complete(std::exception_ptr error);

 protected:
  virtual void help(std::chrono::milliseconds) {}  // what the waiting thread can do for this to be over
  std::vector<at::Tensor> outputs_;

 private:
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // made when somebody asks for it
};

class CollectiveWork : public ShmWork {
 public:
  CollectiveWork(c10d::OpType type, std::vector<at::Tensor> outputs, std::function<void()> body, std::shared_ptr<Queue> queue)
      : ShmWork(type, std::move(outputs)), body_(std::move(body)), queue_(std::move(queue)) {}
  void run();

 protected:
  void help(std::chrono::milliseconds timeout) override;

 private:
  std::function<void()> body_;
  std::shared_ptr<Queue> queue_;
};

class TransferWork : public ShmWork {
 public:
  TransferWork(c10d::OpType type, std::vector<at::Tensor> outputs, std::shared_ptr<Mail> mail, std::chrono::milliseconds timeout)
      : ShmWork(type, std::move(outputs)), mail_(std::move(mail)), timeout_(timeout) {}
  bool isCompleted() override;
  int sourceRank() const override { return letter->peer; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  LetterPointer letter;

 protected:
  void help(std::chrono::milliseconds timeout) override;

 private:
  std::shared_ptr<Mail> mail_;
  std::chrono::milliseconds timeout_;
};

class Queue {
 public:
  void submit(const c10::intrusive_ptr<CollectiveWork>& work, bool asynchronous);
  void run_if_first(CollectiveWork& work);
  void stop();  // runs what is queued, then ends the thread; without the GIL

 private:
  void run(std::unique_lock<std::mutex>& lock, const c10::intrusive_ptr<CollectiveWork>& work);
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<c10::intrusive_ptr<CollectiveWork>> waiting_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace shm
