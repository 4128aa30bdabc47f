// One shared mapping per group: who is in it, how far each rank is, where the data lies, and how ranks wait for each other.
//
// The mapping is an anonymous memory file (memfd) that the other ranks open through /proc/<pid>/fd, so nothing ever has a
// name in /dev/shm and nothing is left behind, however the processes end. The file is as large as every ring of every pair
// of ranks would need, but only what is allocated (`reserve`) takes memory: the slots at once, a ring when it is first used.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace shm {

using Clock = std::chrono::steady_clock;

// What ends an operation of a group: a peer that died or gave up, a timeout, a call that does not fit the others'.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kSlots = 4;        // chunks that a rank may have under way at once
constexpr size_t kLine = 64;     // of a cache; what two ranks write is kept on lines of its own
constexpr uint32_t kAnyone = 1;  // wakes whoever waits for data
constexpr uint32_t kUrgent = 2;  // wakes the thread that sleeps until somebody is stuck

// A futex and the number of those asleep on it, so that ringing it costs nothing while nobody sleeps.
struct alignas(kLine) Bell {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};

// How far one rank is in the steps of collectives: numbers of steps, written by that rank only.
struct alignas(kLine) Progress {
  std::atomic<uint64_t> ready;             // its chunks that the others may read
  std::atomic<uint64_t> reduced;           // its shares of the results that the others may read
  std::atomic<uint64_t> done;              // steps of which it will read nothing any more
  std::atomic<uint64_t> call[kSlots];      // what it was asked to do in the step of this slot, see Exchange
};

struct alignas(kLine) Member {
  int64_t pid;
  uint64_t started;  // of the process, in clock ticks since boot: a pid alone may be used again
  std::atomic<uint32_t> joined;
  std::atomic<uint32_t> left;
  std::atomic<uint32_t> failed;  // 1 while the reason is being written, 2 when it can be read
  char reason[436];
};

struct Ring {
  alignas(kLine) std::atomic<uint64_t> tail;  // bytes written since the start, by the sender
  alignas(kLine) std::atomic<uint64_t> head;  // bytes read since the start, by the receiver
};

// What every rank of a group must agree on before it can open the mapping.
struct Plan {
  int size;
  size_t chunk;  // bytes of a slot
  size_t ring;   // bytes of a ring
  static Plan of(int size);
};

// How long a rank looks again and again before it sleeps: `spin` in all, from `yield` on letting others run between two looks.
// `spin` must be longer than waking a sleeper takes. Otherwise a rank that slept once arrives so late that the other sleeps,
// and every operation from then on costs a wake-up.
struct Patience {
  std::chrono::nanoseconds spin, yield;
};

class Segment {
 public:
  using Publish = std::function<void(const std::string&)>;
  using Fetch = std::function<std::string()>;

  // Rank 0 makes the mapping and publishes how to open it; the others fetch that. Returns when all have joined.
  Segment(int rank, int size, std::vector<int64_t> names, const Publish& publish, const Fetch& fetch, std::chrono::milliseconds timeout);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int rank() const { return rank_; }
  int size() const { return plan_.size; }
  const Plan& plan() const { return plan_; }
  Member& member(int rank) { return members_[rank]; }
  Progress& progress(int rank) { return progress_[rank]; }
  Bell& bell(int lane, int rank) { return bells_[lane * plan_.size + rank]; }
  Ring& ring(int source, int target) { return rings_[source * plan_.size + target]; }
  char* slot(int rank, uint64_t step) { return slots_ + (static_cast<size_t>(rank) * kSlots + step % kSlots) * plan_.chunk; }
  char* ring_data(int source, int target) { return ring_data_ + (static_cast<size_t>(source) * plan_.size + target) * plan_.ring; }
  void reserve_ring(int target);  // takes the memory of the ring from this rank to `target`

  // Tell the ranks that sleep on this lane that something changed. `urgent` also wakes threads that wait for that alone.
  void ring_bell(int lane, int rank, bool urgent = false);
  void ring_all(int lane);

  // Sleep until the bell of this rank rings, at most `slice`; false when the slice passed. `seen` is the bell's value from
  // before the last look at what is waited for.
  bool sleep(int lane, uint32_t seen, uint32_t mask, std::chrono::milliseconds slice);

  // Throw when the group cannot go on: aborted here, or a rank has given up.
  void check();
  // Throw when one of the `missing` ranks has ended or left, or `deadline` has passed. `what` names the operation.
  void check_peers(const std::vector<int>& missing, Clock::time_point began, Clock::time_point deadline, const std::string& what);
  // Note that this rank gives up, so that nobody waits for it in vain. The first reason stays.
  void fail(const std::string& reason);
  void leave();
  // From `moment` on nothing may wait any more: the group is being taken down.
  void part_at(Clock::time_point moment) { parting_ = moment.time_since_epoch().count(); }
  void wake_everyone();

  bool ended(int rank);
  std::string describe(int rank) const;
  std::string describe_group() const;
  std::string own_name() const { return "rank " + std::to_string(names_[rank_]); }

  // Wait until `missing(rank)` is false for every rank. Throws Error when that cannot be, or after the deadline.
  template <class Missing>
  void await(int lane, Missing&& missing, const Patience& patience, Clock::time_point deadline, const std::function<std::string()>& what);

 private:
  void lay_out();
  void create(const Publish& publish);
  void open(const std::string& address);
  void join(std::chrono::milliseconds timeout);
  void map(const std::string& how);
  void unmap();
  void reserve(size_t offset, size_t bytes, const std::string& purpose);

  int rank_;
  Plan plan_;
  std::vector<int64_t> names_;  // the ranks' numbers in the whole run, for messages
  int file_ = -1;
  std::atomic<Clock::rep> parting_{Clock::time_point::max().time_since_epoch().count()};
  char* base_ = nullptr;
  size_t fixed_ = 0, total_ = 0;
  Member* members_ = nullptr;
  Progress* progress_ = nullptr;
  Bell* bells_ = nullptr;
  Ring* rings_ = nullptr;
  char* slots_ = nullptr;
  char* ring_data_ = nullptr;
};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

template <class Missing>
void Segment::await(
    int lane, Missing&& missing, const Patience& patience, Clock::time_point deadline, const std::function<std::string()>& what) {
  int first = 0;  // those before it have been seen
  const auto all_here = [&] {
    while (first < plan_.size && !missing(first)) first++;
    return first == plan_.size;
  };
  if (all_here()) return;
  const auto began = Clock::now();
  if (patience.spin.count() > 0) {
    auto waited = Clock::duration::zero();
    do {
      if (waited > patience.yield) sched_yield();
      for (int i = 0; i < 32; i++) {
        pause();
        if (all_here()) return;
      }
      waited = Clock::now() - began;
    } while (waited < patience.spin);
  }
  Bell& own = bell(lane, rank_);
  auto slice = std::chrono::milliseconds(20);
  while (true) {
    check();
    const uint32_t seen = own.value.load(std::memory_order_acquire);
    own.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const bool here = all_here();
    const bool rung = here || sleep(lane, seen, kAnyone, slice);
    own.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (here || all_here()) return;
    if (rung) continue;
    slice = std::chrono::milliseconds(200);
    std::vector<int> ranks;
    for (int r = first; r < plan_.size; r++)
      if (missing(r)) ranks.push_back(r);
    try {
      check_peers(ranks, began, deadline, what());
    } catch (const Error&) {
      if (all_here()) return;  // it came between the look at it and the look at the process
      throw;
    }
  }
}

}  // namespace shm
