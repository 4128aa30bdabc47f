#include "exchange.h"

#include <algorithm>
#include <cstring>

namespace shm {
namespace {

constexpr int kLane = 0;  // of the bells
constexpr size_t kDirectBytes = 16 << 10;  // up to here every rank adds everything up by itself: one wait instead of two

void copy(void* target, const void* source, size_t bytes) {
  if (bytes != 0 && target != source) std::memcpy(target, source, bytes);
}

}  // namespace

std::string Exchange::describe(const Call& call) const {
  return std::string(call.name) + " (number " + std::to_string(call.number) + " of the group of " + segment_.describe_group() + ")";
}

// What every rank must have been asked for alike: the operation and its sizes.
uint64_t Exchange::signature(const Call& call, uint64_t a, uint64_t b) const {
  uint64_t hash = 14695981039346656037ULL;  // FNV-1a
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211ULL; };
  for (const char* c = call.name; *c; c++) add(static_cast<unsigned char>(*c));
  add(a), add(b);
  return hash;
}

// Wait until nobody reads this step's slot any more.
void Exchange::claim(const Call& call, uint64_t step, uint64_t signature) {
  const auto missing = [&](int r) {
    return r != rank() && segment_.progress(r).done.load(std::memory_order_acquire) + kSlots < step + 1;
  };
  segment_.await(kLane, missing, patience_, call.deadline, [&] { return describe(call); });
  segment_.progress(rank()).call[step % kSlots].store(signature, std::memory_order_relaxed);
}

void Exchange::publish(uint64_t step) {
  segment_.progress(rank()).ready.store(step + 1, std::memory_order_release);
  segment_.ring_all(kLane);
}

// Wait for the chunks of this step: everyone's, or those of one rank.
void Exchange::await_ready(const Call& call, uint64_t step, uint64_t signature, int only) {
  const auto missing = [&](int r) {
    return r != rank() && (only < 0 || r == only) && segment_.progress(r).ready.load(std::memory_order_acquire) < step + 1;
  };
  segment_.await(kLane, missing, patience_, call.deadline, [&] { return describe(call); });
  for (int r = 0; r < size(); r++) {
    if (r == rank() || (only >= 0 && r != only)) continue;
    if (segment_.progress(r).call[step % kSlots].load(std::memory_order_relaxed) == signature) continue;
    throw Error("shm: " + segment_.describe(r) + " was asked for something else than " + segment_.own_name() + " in " + describe(call) +
                ": every rank of a group must call the same operations in the same order, with the same sizes and types");
  }
}

void Exchange::finish(uint64_t step) {
  segment_.progress(rank()).done.store(step + 1, std::memory_order_release);
  segment_.ring_all(kLane);
}

void Exchange::barrier(const Call& call) {
  const uint64_t step = step_++, same = signature(call, 0, 0);
  claim(call, step, same);
  publish(step);
  await_ready(call, step, same);
  finish(step);
}

void Exchange::reduce_directly(const Call& call, uint64_t same, Type type, Op op, char* data, size_t elements, bool keep) {
  const uint64_t step = step_++;
  claim(call, step, same);
  copy(segment_.slot(rank(), step), data, elements * size_of(type));
  publish(step);
  await_ready(call, step, same);
  if (keep) {
    std::vector<const void*> sources(size());
    for (int r = 0; r < size(); r++) sources[r] = segment_.slot(r, step);
    reduce(type, op, sources.data(), size(), elements, data, nullptr);
  }
  finish(step);
}

void Exchange::all_reduce(const Call& call, Type type, Op op, void* memory, size_t elements, bool keep) {
  const size_t width = size_of(type);
  char* data = static_cast<char*>(memory);
  const uint64_t same = signature(call, elements, static_cast<uint64_t>(type) << 8 | static_cast<uint64_t>(op));
  if (elements * width <= kDirectBytes) return reduce_directly(call, same, type, op, data, elements, keep);
  const size_t chunk = segment_.plan().chunk / width, steps = (elements + chunk - 1) / chunk;
  const uint64_t start = step_;
  step_ += steps;
  // Elements [begin, end) of a chunk that rank r adds up; a whole number of cache lines.
  const auto length = [&](size_t i) { return std::min(chunk, elements - i * chunk); };
  const auto edge = [&](size_t i, int r) {
    const size_t unit = kLine / width, each = ((length(i) + size() - 1) / size() + unit - 1) / unit * unit;
    return std::min(length(i), each * static_cast<size_t>(r));
  };
  const auto put = [&](size_t i) {
    claim(call, start + i, same);
    char* slot = segment_.slot(rank(), start + i);
    const size_t begin = edge(i, rank()) * width, end = edge(i, rank() + 1) * width;
    copy(slot, data + i * chunk * width, begin);
    copy(slot + end, data + i * chunk * width + end, length(i) * width - end);
    publish(start + i);
  };
  const auto add_up = [&](size_t i) {
    await_ready(call, start + i, same);
    const size_t begin = edge(i, rank()), end = edge(i, rank() + 1);
    char* own = data + (i * chunk + begin) * width;
    std::vector<const void*> sources(size());
    for (int r = 0; r < size(); r++) sources[r] = r == rank() ? own : segment_.slot(r, start + i) + begin * width;
    char* share = segment_.slot(rank(), start + i) + begin * width;
    reduce(type, op, sources.data(), size(), end - begin, share, keep ? own : nullptr);
    segment_.progress(rank()).reduced.store(start + i + 1, std::memory_order_release);
    segment_.ring_all(kLane);
  };
  const auto fetch = [&](size_t i) {
    const uint64_t step = start + i;
    const auto missing = [&](int r) {
      return r != rank() && segment_.progress(r).reduced.load(std::memory_order_acquire) < step + 1;
    };
    segment_.await(kLane, missing, patience_, call.deadline, [&] { return describe(call); });
    for (int r = 0; keep && r < size(); r++) {
      if (r == rank()) continue;
      const size_t begin = edge(i, r) * width, end = edge(i, r + 1) * width;
      copy(data + i * chunk * width + begin, segment_.slot(r, step) + begin, end - begin);
    }
    finish(step);
  };
  for (size_t i = 0; i < steps + 2; i++) {
    if (i < steps) put(i);
    if (i >= 1 && i <= steps) add_up(i - 1);
    if (i >= 2) fetch(i - 2);
  }
}

void Exchange::reduce_scatter(const Call& call, Type type, Op op, const void* memory, void* output, size_t elements) {
  const size_t width = size_of(type), unit = kLine / width;
  const size_t block = std::max(segment_.plan().chunk / size() / kLine, size_t(1)) * unit;  // of one rank, in one chunk
  const char* input = static_cast<const char*>(memory);
  const uint64_t same = signature(call, elements, static_cast<uint64_t>(type) << 8 | static_cast<uint64_t>(op));
  const size_t steps = std::max((elements + block - 1) / block, size_t(1));
  const uint64_t start = step_;
  step_ += steps;
  const auto length = [&](size_t i) { return std::min(block, elements - i * block); };
  const auto put = [&](size_t i) {
    claim(call, start + i, same);
    for (int r = 0; r < size(); r++) {
      if (r == rank()) continue;
      copy(segment_.slot(rank(), start + i) + r * block * width, input + (r * elements + i * block) * width, length(i) * width);
    }
    publish(start + i);
  };
  const auto add_up = [&](size_t i) {
    await_ready(call, start + i, same);
    std::vector<const void*> sources(size());
    for (int r = 0; r < size(); r++) {
      sources[r] = r == rank() ? input + (rank() * elements + i * block) * width : segment_.slot(r, start + i) + rank() * block * width;
    }
    reduce(type, op, sources.data(), size(), length(i), static_cast<char*>(output) + i * block * width, nullptr);
    finish(start + i);
  };
  for (size_t i = 0; i <= steps; i++) {
    if (i < steps) put(i);
    if (i >= 1) add_up(i - 1);
  }
}

void Exchange::all_gather(const Call& call, const void* input, const std::vector<char*>& outputs, size_t bytes) {
  const size_t chunk = segment_.plan().chunk, steps = std::max((bytes + chunk - 1) / chunk, size_t(1));
  const uint64_t start = step_, same = signature(call, bytes, 0);
  step_ += steps;
  const auto length = [&](size_t i) { return std::min(chunk, bytes - i * chunk); };
  const auto put = [&](size_t i) {
    claim(call, start + i, same);
    copy(segment_.slot(rank(), start + i), static_cast<const char*>(input) + i * chunk, length(i));
    publish(start + i);
  };
  const auto fetch = [&](size_t i) {
    for (int k = 1; k < size(); k++) {
      const int r = (rank() + k) % size();
      await_ready(call, start + i, same, r);
      copy(outputs[r] + i * chunk, segment_.slot(r, start + i), length(i));
    }
    finish(start + i);
  };
  for (size_t i = 0; i <= steps; i++) {
    if (i < steps) put(i);
    if (i >= 1) fetch(i - 1);
  }
  copy(outputs[rank()], input, bytes);
}

void Exchange::broadcast(const Call& call, int root, void* memory, size_t bytes) {
  const size_t chunk = segment_.plan().chunk, steps = std::max((bytes + chunk - 1) / chunk, size_t(1));
  const uint64_t same = signature(call, bytes, static_cast<uint64_t>(root));
  char* data = static_cast<char*>(memory);
  for (size_t i = 0; i < steps; i++) {
    const uint64_t step = step_++;
    const size_t length = std::min(chunk, bytes - i * chunk);
    claim(call, step, same);
    if (rank() == root) copy(segment_.slot(rank(), step), data + i * chunk, length);
    publish(step);
    if (rank() != root) {
      await_ready(call, step, same, root);
      copy(data + i * chunk, segment_.slot(root, step), length);
    }
    finish(step);
  }
}

void Exchange::all_to_all(const Call& call, const std::vector<Part>& sends, const std::vector<Part>& receives) {
  // First the sizes, which only the sender knows: all ranks must go through as many steps as the largest part needs.
  const uint64_t same = signature(call, 0, 0), first = step_++;
  claim(call, first, same);
  auto* sizes = reinterpret_cast<uint64_t*>(segment_.slot(rank(), first));
  for (int r = 0; r < size(); r++) sizes[r] = sends[r].bytes;
  publish(first);
  await_ready(call, first, same);
  size_t largest = 0;
  for (int r = 0; r < size(); r++) {
    const auto* theirs = reinterpret_cast<const uint64_t*>(segment_.slot(r, first));
    for (int to = 0; to < size(); to++) largest = std::max<size_t>(largest, to == r ? 0 : theirs[to]);
    if (theirs[rank()] == receives[r].bytes) continue;
    throw Error("shm: " + segment_.describe(r) + " sends " + std::to_string(theirs[rank()]) + " bytes to " + segment_.own_name() + " in " +
                describe(call) + ", which expects " + std::to_string(receives[r].bytes));
  }
  finish(first);
  const size_t block = std::max(segment_.plan().chunk / size() / kLine, size_t(1)) * kLine, steps = (largest + block - 1) / block;
  const uint64_t start = step_;
  step_ += steps;
  const auto length = [&](const Part& part, size_t i) { return std::min(block, part.bytes - std::min(part.bytes, i * block)); };
  const auto put = [&](size_t i) {
    claim(call, start + i, same);
    for (int r = 0; r < size(); r++) {
      if (r != rank()) copy(segment_.slot(rank(), start + i) + r * block, sends[r].data + i * block, length(sends[r], i));
    }
    publish(start + i);
  };
  const auto fetch = [&](size_t i) {
    await_ready(call, start + i, same);
    for (int r = 0; r < size(); r++) {
      if (r != rank()) copy(receives[r].data + i * block, segment_.slot(r, start + i) + rank() * block, length(receives[r], i));
    }
    finish(start + i);
  };
  for (size_t i = 0; i <= steps && steps > 0; i++) {
    if (i < steps) put(i);
    if (i >= 1) fetch(i - 1);
  }
  copy(receives[rank()].data, sends[rank()].data, receives[rank()].bytes);
}

}  // namespace shm
