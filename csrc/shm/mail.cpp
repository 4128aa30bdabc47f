#include "mail.h"

#include <algorithm>
#include <cstring>

namespace shm {
namespace {

constexpr int kLane = 1;  // of the bells
constexpr size_t kUnit = 16;
constexpr size_t kPiece = 256 << 10;  // after so many bytes the other end is told, so that both copy at the same time
constexpr auto kSlice = std::chrono::milliseconds(200);
constexpr auto kForever = std::chrono::hours(1);

size_t padded(size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

}  // namespace

Mail::Mail(std::shared_ptr<Segment> segment, Patience patience)
    : owner_(std::move(segment)), segment_(*owner_), patience_(patience), boxes_(segment_.size()) {}

void Mail::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) return;
    stop_ = true;
  }
  wake_thread();
  if (thread_.joinable()) thread_.join();
  fail_all(std::make_exception_ptr(Error("shm: connection closed, the group was taken down before this transfer was over")));
}

std::string Mail::describe(const Letter& letter) const {
  std::string text = letter.sending ? "send of " : "receive of ";
  text += std::to_string(letter.bytes) + " bytes with tag " + std::to_string(letter.tag);
  if (letter.peer >= 0) text += (letter.sending ? " to " : " from ") + segment_.describe(letter.peer);
  return text;
}

void Mail::post(const LetterPointer& letter) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (stop_) throw Error("shm: connection closed, the group was taken down before this call");
  segment_.check();
  if (letter->sending) {
    Box& box = boxes_[letter->peer];
    if (!box.has_ring) {
      segment_.reserve_ring(letter->peer);
      box.has_ring = true;
    }
    box.outgoing.push_back(letter);
  } else if (!take_aside(letter)) {
    posted_.push_back(letter);
  }
  if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  while (move()) {
  }
  if (stuck()) wake_thread();
  flush(lock);
}

// Give a receive the first message with its tag that was set aside.
bool Mail::take_aside(const LetterPointer& letter) {
  for (int peer = 0; peer < segment_.size(); peer++) {
    if (letter->peer >= 0 && peer != letter->peer) continue;
    auto& aside = boxes_[peer].aside;
    const auto found = std::find_if(aside.begin(), aside.end(), [&](const auto& m) { return m->tag == letter->tag && !m->letter; });
    if (found == aside.end()) continue;
    const std::shared_ptr<Incoming> message = *found;
    message->letter = letter;
    letter->begun = true;
    aside.erase(found);
    if (message->filled == message->bytes) deliver(message, peer);
    return true;
  }
  return false;
}

LetterPointer Mail::take_posted(int peer, int tag) {
  const auto fits = [&](const LetterPointer& letter) { return letter->tag == tag && (letter->peer < 0 || letter->peer == peer); };
  const auto found = std::find_if(posted_.begin(), posted_.end(), fits);
  if (found == posted_.end()) return nullptr;
  LetterPointer letter = *found;
  posted_.erase(found);
  letter->begun = true;
  return letter;
}

bool Mail::wanted(int peer) const {
  return std::any_of(posted_.begin(), posted_.end(), [&](const LetterPointer& l) { return l->peer < 0 || l->peer == peer; });
}

// A message has arrived whole and has its letter.
void Mail::deliver(const std::shared_ptr<Incoming>& message, int peer) {
  const LetterPointer letter = message->letter;
  letter->peer = peer;
  if (letter->bytes != message->bytes) {
    const std::string got = "shm: " + segment_.describe(peer) + " sent " + std::to_string(message->bytes) + " bytes for the " + describe(*letter);
    return end(letter, std::make_exception_ptr(Error(got + " of " + segment_.own_name() + ": both ends must agree on shape and type")));
  }
  if (message->aside && message->bytes) std::memcpy(letter->data, message->aside.get(), message->bytes);
  end(letter, nullptr);
}

void Mail::end(const LetterPointer& letter, std::exception_ptr why) {
  if (letter->over) return;
  letter->over = true;
  ended_.emplace_back(letter, why);
}

// Tell those who wait, without the lock: they may call back.
void Mail::flush(std::unique_lock<std::mutex>& lock) {
  std::vector<std::pair<LetterPointer, std::exception_ptr>> ended;
  ended.swap(ended_);
  lock.unlock();
  for (auto& [letter, why] : ended) {
    letter->finished(why);
    letter->finished = nullptr;  // it holds the work, which holds the letter
  }
  if (!ended.empty()) segment_.ring_bell(kLane, segment_.rank());  // another thread of this rank may wait for one of them
}

bool Mail::move() {
  bool moved = false;
  for (int peer = 0; peer < segment_.size(); peer++) {
    moved |= push(peer);
    moved |= pull(peer);
  }
  return moved;
}

bool Mail::push(int peer) {
  auto& outgoing = boxes_[peer].outgoing;
  if (outgoing.empty()) return false;
  Ring& ring = segment_.ring(segment_.rank(), peer);
  char* data = segment_.ring_data(segment_.rank(), peer);
  const size_t length = segment_.plan().ring;
  bool moved = false;
  while (!outgoing.empty()) {
    const LetterPointer letter = outgoing.front();
    uint64_t tail = ring.tail.load(std::memory_order_relaxed);
    size_t room = length - (tail - ring.head.load(std::memory_order_acquire));
    if (!letter->begun) {
      if (room < kUnit) break;
      const Head head{letter->tag, 0, letter->bytes};
      std::memcpy(data + tail % length, &head, sizeof head);
      letter->begun = true;
      tail += kUnit;
      room -= kUnit;
    }
    const size_t rest = padded(letter->bytes) - letter->moved;
    const size_t bytes = std::min({rest, room, length - tail % length, kPiece});
    const size_t real = std::min(bytes, letter->bytes - std::min(letter->bytes, letter->moved));
    if (real) std::memcpy(data + tail % length, letter->data + letter->moved, real);
    letter->moved += bytes;
    if (tail + bytes == ring.tail.load(std::memory_order_relaxed)) break;  // the ring is full
    ring.tail.store(tail + bytes, std::memory_order_release);
    segment_.ring_bell(kLane, peer);
    moved = true;
    if (letter->moved < padded(letter->bytes)) continue;
    outgoing.pop_front();
    end(letter, nullptr);
  }
  return moved;
}

// Read the head of the next message, when there is one that this rank should take from the ring.
bool Mail::begin_incoming(int peer) {
  Box& box = boxes_[peer];
  Ring& ring = segment_.ring(peer, segment_.rank());
  const uint64_t at = ring.head.load(std::memory_order_relaxed);
  if (ring.tail.load(std::memory_order_acquire) == at || !wanted(peer)) return false;
  Head head;
  std::memcpy(&head, segment_.ring_data(peer, segment_.rank()) + at % segment_.plan().ring, sizeof head);
  auto message = std::make_shared<Incoming>();
  message->tag = head.tag;
  message->bytes = head.bytes;
  message->letter = take_posted(peer, head.tag);
  if (!message->letter || message->letter->bytes != head.bytes) message->aside = std::make_unique<char[]>(head.bytes);
  if (!message->letter) box.aside.push_back(message);
  box.current = message;
  ring.head.store(at + kUnit, std::memory_order_release);
  return true;
}

bool Mail::pull(int peer) {
  Box& box = boxes_[peer];
  Ring& ring = segment_.ring(peer, segment_.rank());
  const char* data = segment_.ring_data(peer, segment_.rank());
  const size_t length = segment_.plan().ring;
  bool moved = false;
  while (box.current || begin_incoming(peer)) {
    Incoming& message = *box.current;
    const size_t rest = padded(message.bytes) - padded(message.filled);
    const uint64_t at = ring.head.load(std::memory_order_relaxed);
    const size_t bytes = std::min({rest, size_t(ring.tail.load(std::memory_order_acquire) - at), length - at % length, kPiece});
    if (bytes == 0 && rest != 0) break;
    const size_t real = std::min(bytes, message.bytes - message.filled);
    char* target = message.aside ? message.aside.get() : message.letter->data;
    if (real) std::memcpy(target + message.filled, data + at % length, real);
    message.filled += real;
    ring.head.store(at + bytes, std::memory_order_release);
    segment_.ring_bell(kLane, peer);
    moved = true;
    if (message.filled < message.bytes) continue;
    const std::shared_ptr<Incoming> whole = std::move(box.current);
    box.current = nullptr;
    if (whole->letter) deliver(whole, peer);
  }
  return moved;
}

bool Mail::stuck() const {
  return std::any_of(boxes_.begin(), boxes_.end(), [](const Box& box) { return box.current || !box.outgoing.empty(); });
}

void Mail::nudge_receivers() {
  for (int peer = 0; peer < segment_.size(); peer++)
    if (!boxes_[peer].outgoing.empty()) segment_.ring_bell(kLane, peer, true);
}

void Mail::wake_thread() { segment_.ring_bell(kLane, segment_.rank(), true); }

void Mail::poll() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (move()) {
  }
  flush(lock);
}

void Mail::attend() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    attend_ = true;
  }
  wake_thread();
}

std::vector<int> Mail::peers_of(const LetterPointer& letter) const {
  if (letter->peer >= 0) return {letter->peer};
  std::vector<int> others;
  for (int r = 0; r < segment_.size(); r++)
    if (r != segment_.rank()) others.push_back(r);
  return others;
}

void Mail::wait(const LetterPointer& letter, Clock::time_point deadline) {
  const auto began = Clock::now();
  auto spin_until = began + patience_.spin;
  Bell& own = segment_.bell(kLane, segment_.rank());
  while (true) {
    const uint32_t seen = own.value.load(std::memory_order_acquire);
    const bool sleeping = Clock::now() >= spin_until;
    if (sleeping) own.sleepers.fetch_add(1, std::memory_order_seq_cst);
    bool moved = false, over = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while (move()) moved = true;
      over = letter->over;
      if (!over && !moved && sleeping) nudge_receivers();
      flush(lock);
    }
    bool rung = true;
    if (sleeping && !over && !moved) rung = segment_.sleep(kLane, seen, kAnyone, kSlice);
    if (sleeping) own.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (over) return;
    if (moved) spin_until = Clock::now() + patience_.spin;
    if (!sleeping) {
      if (Clock::now() > spin_until - patience_.spin + patience_.yield) sched_yield();
      for (int i = 0; i < 16; i++) pause();
      continue;
    }
    if (moved) continue;
    try {
      segment_.check();
      if (!rung || Clock::now() > deadline) segment_.check_peers(peers_of(letter), began, deadline, describe(*letter));
    } catch (const Error& error) {
      poll();  // what came before the end of the other rank counts
      segment_.fail(error.what());
      fail_all(std::current_exception());
      return;
    }
  }
}

void Mail::fail_all(std::exception_ptr why) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (Box& box : boxes_) {
    for (const LetterPointer& letter : box.outgoing) end(letter, why);
    box.outgoing.clear();
    if (box.current && box.current->letter) end(box.current->letter, why);
    box.current = nullptr;
  }
  for (const LetterPointer& letter : posted_) end(letter, why);
  posted_.clear();
  flush(lock);
}

// The thread: asleep until a message is stuck here or at another rank, then moving bytes until none is.
void Mail::work() {
  Bell& own = segment_.bell(kLane, segment_.rank());
  while (true) {
    const uint32_t seen = own.value.load(std::memory_order_acquire);
    own.sleepers.fetch_add(1, std::memory_order_seq_cst);
    bool busy = false, sending = false, stop = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while (move()) {
      }
      nudge_receivers();
      sending = std::any_of(boxes_.begin(), boxes_.end(), [](const Box& box) { return !box.outgoing.empty(); });
      busy = stuck() || (attend_ && !posted_.empty());
      stop = stop_;
      flush(lock);
    }
    if (stop && !sending) {
      own.sleepers.fetch_sub(1, std::memory_order_relaxed);
      return;
    }
    if (!busy) own.sleepers.fetch_sub(1, std::memory_order_relaxed);
    const bool rung = segment_.sleep(kLane, seen, busy ? kAnyone | kUrgent : kUrgent, busy ? kSlice : std::chrono::milliseconds(kForever));
    if (busy) own.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (rung || !busy) continue;
    try {
      segment_.check();
      std::vector<int> targets;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        for (int peer = 0; peer < segment_.size(); peer++)
          if (!boxes_[peer].outgoing.empty() || boxes_[peer].current) targets.push_back(peer);
      }
      segment_.check_peers(targets, Clock::now(), Clock::time_point::max(), "a transfer in the background");
    } catch (const Error& error) {
      segment_.fail(error.what());
      fail_all(std::current_exception());
    }
  }
}

}  // namespace shm
