// The collectives of one group over its slots: blocking, on plain memory, one at a time and in the same order on every rank.
//
// A collective is a number of steps, counted over the whole life of the group. In step s a rank writes its chunk into its
// slot s % kSlots and raises `ready`; the others read it and raise `done`, and once all have, the slot may be written again.
// An all-reduce of more than a few KiB reduces in shares: each rank adds up one share of the chunk and puts the sum into its
// own slot (`reduced`), where the others fetch it, so that every element is added once and all ranks get the same bits.
// Writing a chunk runs a step ahead of reducing it and two ahead of fetching the sums.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "reduce.h"
#include "segment.h"

namespace shm {

// How one collective is named in messages and when it must be over.
struct Call {
  const char* name;
  uint64_t number;  // in the group, from 1
  Clock::time_point deadline;
};

class Exchange {
 public:
  Exchange(std::shared_ptr<Segment> segment, Patience patience) : owner_(std::move(segment)), segment_(*owner_), patience_(patience) {}

  void barrier(const Call& call);
  // In place; where `keep` is false this rank contributes and leaves its own data as it was.
  void all_reduce(const Call& call, Type type, Op op, void* data, size_t elements, bool keep = true);
  // `input` holds size * elements; `output`, elements, may be this rank's part of it.
  void reduce_scatter(const Call& call, Type type, Op op, const void* input, void* output, size_t elements);
  // `outputs[r]` receives rank r's `input`; this rank's own may be `input` itself.
  void all_gather(const Call& call, const void* input, const std::vector<char*>& outputs, size_t bytes);
  void broadcast(const Call& call, int root, void* data, size_t bytes);
  // `sends[r]` goes to rank r, `receives[r]` comes from it; sizes may differ and be 0. Used for gather and scatter as well.
  struct Part {
    char* data = nullptr;
    size_t bytes = 0;
  };
  void all_to_all(const Call& call, const std::vector<Part>& sends, const std::vector<Part>& receives);

 private:
  int rank() const { return segment_.rank(); }
  int size() const { return segment_.size(); }
  uint64_t signature(const Call& call, uint64_t a, uint64_t b) const;
  void claim(const Call& call, uint64_t step, uint64_t signature);
  void publish(uint64_t step);
  void await_ready(const Call& call, uint64_t step, uint64_t signature, int only = -1);
  void finish(uint64_t step);
  std::string describe(const Call& call) const;
  void reduce_directly(const Call& call, uint64_t signature, Type type, Op op, char* data, size_t elements, bool keep);

  std::shared_ptr<Segment> owner_;
  Segment& segment_;
  Patience patience_;
  uint64_t step_ = 0;
};

}  // namespace shm
