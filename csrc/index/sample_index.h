// Where each sample of a corpus starts, by several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "shuffle.h"
#include "threads.h"

namespace index_builder {

struct Documents {
  const char* lengths;  // int32, not necessarily aligned: the header of an .idx file has 34 bytes
  int64_t length_count;
  const int32_t* order;
  int64_t count;

  int32_t length(int32_t document) const {
    int32_t value;
    std::memcpy(&value, lengths + 4 * static_cast<int64_t>(document), sizeof value);
    return value;
  }
};

// Fills `out` with `samples` + 1 boundaries (place in the order of the documents, offset inside that document).
//
// The documents, in the given order, form one stream of tokens. Sample k is stream tokens [k * seq_length,
// (k + 1) * seq_length + extra). Boundary k > 0 lies at the last token of sample k - 1: with the extra token that is
// also the first of sample k; without it, just past its last. Boundary 0 is (0, 0) even when the first document is
// empty. A boundary past the end of the stream (the partial last sample) lies at the end of the last document.
//
// The lengths are read in shuffled order, which is what takes the time. Threads take pieces of the order in turn, look
// up the lengths of a piece, wait for the stream position at which it starts, pass on the one at which it ends, and
// then place the boundaries in it.
template <typename Entry>
class SampleIndexBuilder {
 public:
  SampleIndexBuilder(const Documents& documents, int64_t seq_length, int64_t samples, int64_t extra, Entry* out)
      : documents_(documents), seq_length_(seq_length), samples_(samples), extra_(extra), out_(out) {}

  void run(int threads) {
    const int64_t pieces = (documents_.count + kPiece - 1) / kPiece;
    out_[0] = 0;
    out_[1] = 0;
    run_threads(static_cast<int>(std::min<int64_t>(threads, pieces)), [this, pieces] {
      std::vector<int32_t> lengths(static_cast<size_t>(std::min(kPiece, documents_.count)));
      for (int64_t piece = taken_++; piece < pieces; piece = taken_++) place(piece, lengths.data());
    });
    if (unknown_ != kNone) {
      throw std::out_of_range("document " + std::to_string(unknown_) + " is outside the " +
                              std::to_string(documents_.length_count) + " known lengths");
    }
    const int64_t last = documents_.count - 1;
    const int64_t end = documents_.length(documents_.order[last]) - extra_;
    for (int64_t boundary = boundaries_before(position_); boundary <= samples_; ++boundary) {
      out_[2 * boundary] = static_cast<Entry>(last);
      out_[2 * boundary + 1] = static_cast<Entry>(end);
    }
  }

 private:
  static constexpr int64_t kPiece = 1 << 16;
  static constexpr int64_t kNone = INT64_MAX;

  // The first boundary that does not lie before this stream position.
  int64_t boundaries_before(int64_t position) const {
    return std::max<int64_t>(1, (position - extra_) / seq_length_ + 1);
  }

  void place(int64_t piece, int32_t* lengths) {
    constexpr int64_t kAhead = 24;
    const int64_t first = piece * kPiece;
    const int64_t count = std::min(kPiece, documents_.count - first);
    const int32_t* order = documents_.order + first;
    int64_t total = 0;
    for (int64_t n = 0; n < count; ++n) {
      const uint32_t next = static_cast<uint32_t>(order[std::min(n + kAhead, count - 1)]);
      if (next < static_cast<uint64_t>(documents_.length_count)) prefetch(documents_.lengths + 4 * static_cast<int64_t>(next));
      const int32_t document = order[n];
      const bool known = document >= 0 && document < documents_.length_count;
      if (!known) unknown_ = document;
      lengths[n] = known ? documents_.length(document) : 0;
      total += lengths[n];
    }
    int64_t start;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      turn_.wait(lock, [this, piece] { return next_ == piece; });
      start = position_;
      position_ += total;
      ++next_;
    }
    turn_.notify_all();
    if (unknown_ != kNone) return;

    const int64_t stop = std::min(boundaries_before(start + total), samples_ + 1);
    int64_t boundary = boundaries_before(start);
    int64_t target = boundary * seq_length_ + extra_ - 1;  // stream position of the last token of sample `boundary` - 1
    for (int64_t n = 0; boundary < stop; ++n) {
      const int64_t end = start + lengths[n];
      // Most documents hold no boundary or one, and which of the two cannot be predicted: write one, keep it or not.
      do {
        out_[2 * boundary] = static_cast<Entry>(first + n);
        out_[2 * boundary + 1] = static_cast<Entry>(target - start + 1 - extra_);
        const int64_t holds = target < end;
        boundary += holds;
        target += holds * seq_length_;
      } while (target < end && boundary < stop);
      start = end;
    }
  }

  const Documents documents_;
  const int64_t seq_length_, samples_, extra_;
  Entry* const out_;
  std::atomic<int64_t> taken_{0};        // pieces that a thread has taken
  std::atomic<int64_t> unknown_{kNone};  // a document that has no length
  std::mutex mutex_;
  std::condition_variable turn_;
  int64_t next_ = 0;      // guarded by the mutex: the piece
  int64_t position_ = 0;  // that starts at this position of the stream
};

}  // namespace index_builder
