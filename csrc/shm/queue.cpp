#include "queue.h"

#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

namespace shm {

void throw_torch_error(const std::string& message) { C10_THROW_ERROR(DistBackendError, message); }

std::exception_ptr as_torch_error(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& found) {
    try {
      throw_torch_error(found.what());
    } catch (...) {
      return std::current_exception();
    }
  } catch (...) {
    return error;
  }
}

void ShmWork::complete(std::exception_ptr error) {
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (completed_) return;
    completed_ = true;
    exception_ = error;
    future = future_;
  }
  cv_.notify_all();
  if (!future) return;
  if (error) future->setError(error);
  else future->markCompleted(c10::IValue(outputs_));
}

c10::intrusive_ptr<c10::ivalue::Future> ShmWork::getFuture() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (future_) return future_;
  future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  if (completed_ && exception_) future_->setError(exception_);
  else if (completed_) future_->markCompleted(c10::IValue(outputs_));
  return future_;
}

bool ShmWork::wait(std::chrono::milliseconds timeout) {
  help(timeout);
  std::unique_lock<std::mutex> lock(mutex_);
  if (timeout == kNoTimeout) {
    cv_.wait(lock, [&] { return completed_; });
  } else if (!cv_.wait_for(lock, timeout, [&] { return completed_; })) {
    throw_torch_error("shm: timed out: an operation was not over after the " + std::to_string(timeout.count()) + " ms that wait() was given");
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

void CollectiveWork::run() {
  std::exception_ptr error;
  try {
    body_();
  } catch (...) {
    error = as_torch_error(std::current_exception());
  }
  body_ = nullptr;  // with the tensors that only the operation needed
  complete(error);
}

void CollectiveWork::help(std::chrono::milliseconds timeout) {
  if (timeout == kNoTimeout) queue_->run_if_first(*this);  // the operation's own timeout holds
}

bool TransferWork::isCompleted() {
  mail_->poll();
  return ShmWork::isCompleted();
}

c10::intrusive_ptr<c10::ivalue::Future> TransferWork::getFuture() {
  mail_->attend();
  return ShmWork::getFuture();
}

void TransferWork::help(std::chrono::milliseconds timeout) {
  if (ShmWork::isCompleted()) return;
  const auto limit = timeout == kNoTimeout ? timeout_ : timeout;
  mail_->wait(letter, Clock::now() + limit);
}

void Queue::submit(const c10::intrusive_ptr<CollectiveWork>& work, bool asynchronous) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!asynchronous && !busy_ && waiting_.empty()) return run(lock, work);
  waiting_.push_back(work);
  if (!thread_.joinable()) thread_ = std::thread([this] { this->work(); });
  changed_.notify_one();
}

void Queue::run_if_first(CollectiveWork& work) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (busy_ || waiting_.empty() || waiting_.front().get() != &work) return;
  const c10::intrusive_ptr<CollectiveWork> own = waiting_.front();
  waiting_.pop_front();
  run(lock, own);
}

void Queue::run(std::unique_lock<std::mutex>& lock, const c10::intrusive_ptr<CollectiveWork>& work) {
  busy_ = true;
  lock.unlock();
  work->run();
  lock.lock();
  busy_ = false;
  if (!waiting_.empty()) changed_.notify_one();
}

void Queue::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !busy_ && (stop_ || !waiting_.empty()); });
    if (waiting_.empty()) return;
    const c10::intrusive_ptr<CollectiveWork> next = waiting_.front();
    waiting_.pop_front();
    run(lock, next);
  }
}

void Queue::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

}  // namespace shm
