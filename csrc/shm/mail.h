// Sending and receiving between two ranks, matched by tag, through a ring of bytes for each direction of each pair.
//
// A message is a head of 16 bytes (tag, size) and its payload, padded to 16. Who posts or waits moves the bytes; a thread of
// its own does so only while a message is stuck (a full ring, a message larger than the ring), so that small messages pay
// for no thread. A message whose tag nobody waits for stays in the ring; when one behind it is waited for, it is set aside.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "segment.h"

namespace shm {

// One send or receive. Owned by whoever waits and by the mail until it is over; everything but `finished` is the mail's.
struct Letter {
  bool sending = false;
  char* data = nullptr;
  size_t bytes = 0;
  int peer = -1;  // -1: a receive from anybody, until it is known from whom
  int tag = 0;
  std::function<void(std::exception_ptr)> finished;  // called once, with what went wrong or null
  size_t moved = 0;
  bool begun = false;
  bool over = false;
};
using LetterPointer = std::shared_ptr<Letter>;

class Mail {
 public:
  Mail(std::shared_ptr<Segment> segment, Patience patience);
  ~Mail() { stop(); }
  void stop();  // gives what is still being sent a few seconds; nothing can be posted any more; without the GIL

  void post(const LetterPointer& letter);
  // Move what can be moved until `letter` is over, it is `deadline`, or the group cannot go on (then all letters end with why).
  void wait(const LetterPointer& letter, Clock::time_point deadline);
  void poll();       // move what can be moved now
  void attend();     // from now on the thread moves what can be moved, whether or not anybody waits
  void fail_all(std::exception_ptr why);

 private:
  struct Head {
    int32_t tag;
    uint32_t zero;
    uint64_t bytes;
  };
  struct Incoming {  // a message that is being received or has been set aside
    int tag = 0;
    size_t bytes = 0, filled = 0;
    std::unique_ptr<char[]> aside;  // null while it goes straight to its letter
    LetterPointer letter;
  };
  struct Box {  // one other rank
    std::deque<LetterPointer> outgoing;
    std::deque<std::shared_ptr<Incoming>> aside;  // in the order they came; the last may still be arriving
    std::shared_ptr<Incoming> current;
    bool has_ring = false;
  };

  bool move();                     // true when anything moved; the lock is held
  bool push(int peer);
  bool pull(int peer);
  bool begin_incoming(int peer);
  LetterPointer take_posted(int peer, int tag);
  bool take_aside(const LetterPointer& letter);
  void deliver(const std::shared_ptr<Incoming>& message, int peer);
  void end(const LetterPointer& letter, std::exception_ptr why);
  bool wanted(int peer) const;
  bool stuck() const;              // whether the thread must move bytes
  void nudge_receivers();          // wake the threads of those that a full ring waits for
  void flush(std::unique_lock<std::mutex>& lock);
  void work();
  void wake_thread();
  std::vector<int> peers_of(const LetterPointer& letter) const;
  std::string describe(const Letter& letter) const;

  std::shared_ptr<Segment> owner_;
  Segment& segment_;
  Patience patience_;
  std::mutex mutex_;
  std::vector<Box> boxes_;
  std::list<LetterPointer> posted_;  // receives, in the order they were posted
  std::vector<std::pair<LetterPointer, std::exception_ptr>> ended_;  // their `finished` is called without the lock
  bool attend_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace shm
