#include "segment.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>

namespace shm {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr auto kForever = std::chrono::hours(24);

struct Header {
  std::atomic<uint64_t> token;
};

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::string error_text(int number) { return std::strerror(number); }

Error no_room(size_t bytes, const std::string& purpose, int code) {
  return Error(
      "shm: no room for " + std::to_string((bytes + 1023) >> 10) + " KiB of shared memory for " + purpose + " (" + error_text(code) +
      "): give the container or the user more memory, or use --distributed-backend gloo");
}

struct ProcessState {
  bool there = false;
  char state = '?';
  uint64_t started = 0;
};

// State and start time of a process, from /proc/<pid>/stat. The name in it may hold anything, so fields count from its end.
ProcessState process_state(int64_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t end = text.rfind(')');
  if (end == std::string::npos) return {};
  std::istringstream fields(text.substr(end + 1));
  ProcessState found;
  std::string skipped;
  fields >> found.state;
  for (int field = 4; field < 22; field++) fields >> skipped;
  fields >> found.started;
  found.there = !fields.fail();
  return found;
}

uint64_t random_token() {
  std::random_device source;
  return (static_cast<uint64_t>(source()) << 32 | source()) | 1;
}

}  // namespace

Plan Plan::of(int size) {
  // A chunk is small enough that what one rank writes is still in the caches when the others read it, and the slots of a
  // large group stay within 64 MiB. A ring holds a pipeline's usual transfer whole, so that sending does not wait.
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t chunk = std::min(size_t(512) << 10, (size_t(64) << 20) / (static_cast<size_t>(size) * kSlots));
  return {size, std::max(round_up(chunk, page), page), size <= 16 ? size_t(4) << 20 : size_t(1) << 20};
}

Segment::Segment(
    int rank, int size, std::vector<int64_t> names, const Publish& publish, const Fetch& fetch, std::chrono::milliseconds timeout)
    : rank_(rank), plan_(Plan::of(size)), names_(std::move(names)) {
  while (static_cast<int>(names_.size()) < size) names_.push_back(static_cast<int64_t>(names_.size()));
  lay_out();
  try {
    if (rank == 0) {
      try {
        create(publish);
      } catch (const Error& error) {
        publish(std::string("error ") + error.what());
        throw;
      }
    } else {
      open(fetch());
    }
    join(timeout);
  } catch (...) {
    unmap();
    throw;
  }
}

Segment::~Segment() {
  leave();
  unmap();
}

void Segment::unmap() {
  if (base_ != nullptr) munmap(base_, total_);
  if (file_ >= 0) ::close(file_);
  base_ = nullptr;
  file_ = -1;
}

// Offsets first (from a base of nothing), then `map` moves the pointers to where the mapping lies.
void Segment::lay_out() {
  const auto ranks = static_cast<size_t>(plan_.size);
  size_t at = kLine;
  const auto take = [&](size_t bytes) { return std::exchange(at, round_up(at + bytes, kLine)); };
  members_ = reinterpret_cast<Member*>(take(sizeof(Member) * ranks));
  progress_ = reinterpret_cast<Progress*>(take(sizeof(Progress) * ranks));
  bells_ = reinterpret_cast<Bell*>(take(sizeof(Bell) * ranks * 2));
  rings_ = reinterpret_cast<Ring*>(take(sizeof(Ring) * ranks * ranks));
  at = round_up(at, static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  slots_ = reinterpret_cast<char*>(take(plan_.chunk * ranks * kSlots));
  fixed_ = at;
  at = round_up(at, kHugePage);
  ring_data_ = reinterpret_cast<char*>(take(plan_.ring * ranks * ranks));
  total_ = at;
}

void Segment::map(const std::string& how) {
  void* mapped = mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  if (mapped == MAP_FAILED) throw Error("shm: cannot map " + std::to_string(total_ >> 20) + " MiB of shared memory (" + how + "): " + error_text(errno));
  base_ = static_cast<char*>(mapped);
  madvise(base_, total_, MADV_HUGEPAGE);  // only where the machine allows it for shared memory; nothing depends on it
  const auto move = [&](auto*& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base_ + reinterpret_cast<size_t>(pointer));
  };
  move(members_), move(progress_), move(bells_), move(rings_), move(slots_), move(ring_data_);
}

void Segment::reserve(size_t offset, size_t bytes, const std::string& purpose) {
  // Without this a page that cannot be had would end the process with SIGBUS at its first use.
  int code;
  do code = posix_fallocate(file_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  while (code == EINTR);
  if (code != 0) throw no_room(bytes, purpose, code);
}

void Segment::reserve_ring(int target) {
  const size_t offset = static_cast<size_t>(ring_data(rank_, target) - base_);
  reserve(offset, plan_.ring, "sending from " + describe(rank_) + " to " + describe(target));
}

void Segment::create(const Publish& publish) {
  file_ = static_cast<int>(syscall(SYS_memfd_create, "megatron_llm_shm", 1U /* MFD_CLOEXEC */));
  if (file_ < 0) throw Error("shm: cannot make a shared memory file: " + error_text(errno));
  const std::string purpose = "the group of " + describe_group();
  if (ftruncate(file_, static_cast<off_t>(total_)) != 0) throw no_room(total_, purpose, errno);
  reserve(0, fixed_, purpose);
  map("made by " + own_name());
  const uint64_t token = random_token();
  reinterpret_cast<Header*>(base_)->token.store(token, std::memory_order_release);
  publish("open " + std::to_string(getpid()) + " " + std::to_string(file_) + " " + std::to_string(token));
}

void Segment::open(const std::string& address) {
  std::istringstream fields(address);
  std::string kind;
  int64_t pid = 0;
  int number = -1;
  uint64_t token = 0;
  fields >> kind;
  if (kind == "error") throw Error(address.substr(6));
  fields >> pid >> number >> token;
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(number);
  file_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file_ < 0) throw Error("shm: " + own_name() + " cannot open the shared memory of " + describe(0) + " (" + path + "): " + error_text(errno));
  if (lseek(file_, 0, SEEK_END) != static_cast<off_t>(total_)) throw Error("shm: " + path + " is not the shared memory of this group");
  map("of " + describe(0));
  if (reinterpret_cast<Header*>(base_)->token.load(std::memory_order_acquire) != token) {
    throw Error("shm: " + path + " is not the shared memory of this group");
  }
}

void Segment::join(std::chrono::milliseconds timeout) {
  Member& own = members_[rank_];
  own.pid = getpid();
  own.started = process_state(getpid()).started;
  own.joined.store(1, std::memory_order_release);
  ring_all(0);
  const auto missing = [&](int r) { return members_[r].joined.load(std::memory_order_acquire) == 0; };
  const auto deadline = Clock::now() + (timeout.count() > 0 ? timeout : std::chrono::milliseconds(kForever));
  await(0, missing, Patience{}, deadline, [&] { return "meeting the group of " + describe_group(); });
  for (int r = 0; r < plan_.size; r++) {
    if (!process_state(members_[r].pid).there) throw Error("shm: " + own_name() + " cannot see the process of " + describe(r));
  }
}

void Segment::ring_bell(int lane, int rank, bool urgent) {
  // The fence orders what was published before the look at the sleepers, as the sleeper's own order is the other way round.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  Bell& other = bell(lane, rank);
  if (!urgent && other.sleepers.load(std::memory_order_relaxed) == 0) return;
  other.value.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &other.value, FUTEX_WAKE_BITSET, INT_MAX, nullptr, nullptr, urgent ? kAnyone | kUrgent : kAnyone);
}

void Segment::ring_all(int lane) {
  for (int r = 0; r < plan_.size; r++)
    if (r != rank_) ring_bell(lane, r);
}

void Segment::wake_everyone() {
  for (int lane = 0; lane < 2; lane++)
    for (int r = 0; r < plan_.size; r++) ring_bell(lane, r, true);
}

bool Segment::sleep(int lane, uint32_t seen, uint32_t mask, std::chrono::milliseconds slice) {
  timespec until;  // FUTEX_WAIT_BITSET takes a moment of the monotonic clock
  clock_gettime(CLOCK_MONOTONIC, &until);
  const int64_t nanoseconds = until.tv_nsec + slice.count() % 1000 * 1000000;
  until.tv_sec += slice.count() / 1000 + nanoseconds / 1000000000;
  until.tv_nsec = nanoseconds % 1000000000;
  const long code = syscall(SYS_futex, &bell(lane, rank_).value, FUTEX_WAIT_BITSET, seen, &until, nullptr, mask);
  return !(code == -1 && errno == ETIMEDOUT);
}

void Segment::check() {
  if (Clock::now().time_since_epoch().count() > parting_.load(std::memory_order_relaxed)) {
    throw Error("shm: connection closed, the group of " + describe_group() + " was taken down before its operations were over");
  }
  for (int r = 0; r < plan_.size; r++) {
    if (members_[r].failed.load(std::memory_order_acquire) != 2) continue;
    if (r == rank_) throw Error(members_[r].reason);
    throw Error("shm: connection lost, " + describe(r) + " has given up: " + members_[r].reason);
  }
}

void Segment::check_peers(const std::vector<int>& missing, Clock::time_point began, Clock::time_point deadline, const std::string& what) {
  for (int r : missing) {
    const bool left = members_[r].left.load(std::memory_order_acquire) != 0;
    if (!left && !ended(r)) continue;
    throw Error("shm: connection lost, " + describe(r) + (left ? " has left the group" : " has died") + " while " + own_name() + " waited for it in " + what);
  }
  const auto now = Clock::now();
  if (now < deadline) return;
  std::string ranks;
  for (int r : missing) ranks += (ranks.empty() ? "" : ", ") + describe(r);
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.3g", std::chrono::duration<double>(now - began).count());
  throw Error("shm: timed out: " + own_name() + " waited " + seconds + " s in " + what + "; not arrived: " + ranks);
}

void Segment::fail(const std::string& reason) {
  Member& own = members_[rank_];
  uint32_t none = 0;
  if (!own.failed.compare_exchange_strong(none, 1)) return;
  std::snprintf(own.reason, sizeof own.reason, "%s", reason.c_str());
  own.failed.store(2, std::memory_order_release);
  wake_everyone();
}

void Segment::leave() {
  if (members_[rank_].left.exchange(1) == 0) wake_everyone();
}

bool Segment::ended(int rank) {
  const Member& other = members_[rank];
  if (other.joined.load(std::memory_order_acquire) == 0) return false;  // it has yet to say who it is
  const ProcessState now = process_state(other.pid);
  return !now.there || now.state == 'Z' || now.state == 'X' || now.started != other.started;
}

std::string Segment::describe(int rank) const {
  const std::string name = "rank " + std::to_string(names_[rank]);
  if (base_ == nullptr || members_[rank].joined.load(std::memory_order_acquire) == 0) return name;
  return name + " (process " + std::to_string(members_[rank].pid) + ")";
}

std::string Segment::describe_group() const {
  std::string text = plan_.size == 1 ? "rank" : "ranks";
  for (int r = 0; r < plan_.size; r++) {
    if (r == 8 && plan_.size > 9) return text + " ... " + std::to_string(names_.back());
    text += (r ? ", " : " ") + std::to_string(names_[r]);
  }
  return text;
}

}  // namespace shm
