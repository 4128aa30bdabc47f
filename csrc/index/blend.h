// Which dataset of a blend gives each sample, many stretches of the blend at a time.
//
// Sample n comes from the dataset furthest behind its share: the largest weight * max(n, 1) - taken, the first of
// equals. The sum is kept as two rounded operations (no fused multiply-add: setup.py turns contraction off), for numpy
// rounds twice.
//
// Each choice depends on all before it, but only through the counts of samples taken, and these are nearly known in
// advance: weight * n, rounded. A stretch in the middle begins some samples early with such counts; after these the
// counts are, almost always, exactly the ones of the walk from the beginning. So stretches are walked side by side, one
// in each lane of a vector and groups of them on several threads. Afterwards, from the first stretch on, the counts at
// the end of each are compared with those the next began with; where they differ, the samples of that one are walked again
// from the right counts, up to where the two walks meet. The result is that of the plain walk, bit for bit, always.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "threads.h"

namespace index_builder {

struct Weights {
  const double* values;
  size_t count;
};

#if defined(__GNUC__) || defined(__clang__)
constexpr int kLanes = 16;

#define LANES_NAME walk_lanes_default
#define LANES_TARGET
#define LANES_WIDTH 2
#include "blend_lanes.inc"

#if defined(__x86_64__)
#define LANES_NAME walk_lanes_avx2
#define LANES_TARGET __attribute__((target("avx2")))
#define LANES_WIDTH 4
#include "blend_lanes.inc"

#define LANES_NAME walk_lanes_avx512
#define LANES_TARGET __attribute__((target("avx512f")))
#define LANES_WIDTH 8
#include "blend_lanes.inc"
#endif

#else
constexpr int kLanes = 1;
#endif

using LaneWalk = void (*)(const double*, size_t, double*, double*, int, double*, double*);

// The walk with vectors of `width` doubles, 0 for the widest of this processor; null where there is none.
inline LaneWalk lane_walk(int width) {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
  if ((width == 0 || width == 8) && __builtin_cpu_supports("avx512f")) return walk_lanes_avx512;
  if ((width == 0 || width == 4) && __builtin_cpu_supports("avx2")) return walk_lanes_avx2;
#endif
#if defined(__GNUC__) || defined(__clang__)
  if (width == 0 || width == 2) return walk_lanes_default;
#endif
  return nullptr;
}

// The plain walk of one sample: chooses, counts, and returns the dataset.
inline size_t walk_one(const Weights& weights, int64_t sample, double* taken) {
  const double position = static_cast<double>(std::max<int64_t>(sample, 1));
  size_t best = 0;
  double largest = std::numeric_limits<double>::lowest();
  for (size_t dataset = 0; dataset < weights.count; ++dataset) {
    const double expected = weights.values[dataset] * position;
    const double deficit = expected - taken[dataset];
    if (deficit > largest) {
      largest = deficit;
      best = dataset;
    }
  }
  taken[best] += 1.0;  // whole numbers below 2^53, so exact
  return best;
}

inline void drop(size_t open, std::vector<double>& weights, std::vector<int16_t>& numbers, std::vector<double>& taken) {
  const auto place = static_cast<std::ptrdiff_t>(open);
  weights.erase(weights.begin() + place);
  numbers.erase(numbers.begin() + place);
  taken.erase(taken.begin() + place);
}

class BlendBuilder {
 public:
  // Results go to `datasets` and `samples` [size]. A stretch begins `early` samples before its place. `width`: of the
  // vectors, see lane_walk; without vectors the walk is plain.
  BlendBuilder(const Weights& weights, int64_t size, int64_t early, int width, int16_t* datasets, int64_t* samples)
      : weights_(weights), size_(size), early_(early), walk_some_(lane_walk(width)), datasets_(datasets), samples_(samples) {
    const double sum = std::accumulate(weights.values, weights.values + weights.count, 0.0);
    const bool foreseeable = std::all_of(weights.values, weights.values + weights.count, [](double w) { return w >= 0; }) &&
                             std::abs(sum - 1.0) < 1e-9;
    stretch_ = std::min<int64_t>(32 * early, (size + kLanes - 1) / kLanes);
    if (walk_some_ == nullptr || !foreseeable || stretch_ <= 4 * early) stretch_ = size;  // one stretch: the plain walk
  }

  void run(int threads) {
    if (size_ == 0) return;
    if (stretch_ == size_) {
      std::vector<double> taken(weights_.count, 0.0);
      walk(0, size_, taken.data());
      return;
    }
    std::vector<double> taken(weights_.count, 0.0);
    walk(0, 1, taken.data());  // sample 0 has the position of sample 1, so it stands outside the stretches
    first_ = static_cast<size_t>(datasets_[0]);
    stretches_ = (size_ - 1 + stretch_ - 1) / stretch_;
    begins_.resize(static_cast<size_t>(stretches_) * weights_.count);
    ends_.resize(begins_.size());
    const int64_t groups = (stretches_ + kLanes - 1) / kLanes;
    run_threads(static_cast<int>(std::min<int64_t>(threads, groups)), [this, groups] {
      for (int64_t group = next_++; group < groups; group = next_++) walk_group(group * kLanes);
    });
    mend();
  }

 private:
  static constexpr int kSteps = 256;  // between two writes of the results

  void write(int64_t sample, size_t dataset, double before) {
    datasets_[sample] = static_cast<int16_t>(dataset);
    samples_[sample] = static_cast<int64_t>(before);
  }

  // The plain walk over samples [first, last).
  void walk(int64_t first, int64_t last, double* taken) {
    for (int64_t sample = first; sample < last; ++sample) {
      const size_t dataset = walk_one(weights_, sample, taken);
      write(sample, dataset, taken[dataset] - 1.0);
    }
  }

  // About what is taken of each dataset before sample `sample`: its share rounded down, and one more of those that lost
  // most by it, so that the sum is right.
  void foresee(int64_t sample, double* taken) const {
    std::vector<double> lost(weights_.count);
    std::vector<size_t> order(weights_.count);
    double left = static_cast<double>(sample);
    for (size_t dataset = 0; dataset < weights_.count; ++dataset) {
      const double share = weights_.values[dataset] * static_cast<double>(sample);
      taken[dataset] = std::floor(share);
      lost[dataset] = share - taken[dataset];
      left -= taken[dataset];
      order[dataset] = dataset;
    }
    const size_t more = static_cast<size_t>(std::max(0.0, std::min(left, static_cast<double>(weights_.count))));
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(more), order.end(),
                      [&lost](size_t a, size_t b) { return lost[a] != lost[b] ? lost[a] > lost[b] : a < b; });
    for (size_t n = 0; n < more; ++n) taken[order[n]] += 1.0;
  }

  // Walks kLanes stretches from number `first` on. Past the last stretch a lane walks over it again, and nothing is kept.
  void walk_group(int64_t first) {
    const size_t count = weights_.count;
    struct alignas(64) Line {
      double values[8];
    };
    std::vector<Line> lines((count + 2 * kSteps + 1) * kLanes / 8);
    double* taken = lines.data()->values;
    double* choice = taken + count * kLanes;
    double* before = choice + kSteps * kLanes;
    double* position = before + kSteps * kLanes;
    std::vector<double> state(count);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t stretch = std::min(first + lane, stretches_ - 1);
      const int64_t from = stretch == 0 ? 1 : start(stretch) - early_;
      foresee(from, state.data());
      for (size_t dataset = 0; dataset < count; ++dataset) taken[dataset * kLanes + lane] = state[dataset];
      position[lane] = static_cast<double>(from);
    }
    for (int64_t step = 0; step < early_; step += kSteps) {
      const int steps = static_cast<int>(std::min<int64_t>(kSteps, early_ - step));
      walk_some_(weights_.values, count, taken, position, steps, choice, before);
    }
    if (first == 0) {  // the first stretch has nothing before it: its counts are known
      position[0] = 1.0;
      for (size_t dataset = 0; dataset < count; ++dataset) taken[dataset * kLanes] = dataset == first_ ? 1.0 : 0.0;
    }
    keep(taken, first, begins_);
    for (int64_t step = 0; step < stretch_; step += kSteps) {
      const int steps = static_cast<int>(std::min<int64_t>(kSteps, stretch_ - step));
      walk_some_(weights_.values, count, taken, position, steps, choice, before);
      for (int lane = 0; lane < kLanes && first + lane < stretches_; ++lane) {
        const int64_t sample = start(first + lane) + step;
        const int64_t kept = std::min<int64_t>(steps, size_ - sample);
        for (int64_t n = 0; n < kept; ++n) {
          datasets_[sample + n] = static_cast<int16_t>(choice[n * kLanes + lane]);
          samples_[sample + n] = static_cast<int64_t>(before[n * kLanes + lane]);
        }
      }
    }
    keep(taken, first, ends_);
  }

  void keep(const double* taken, int64_t first, std::vector<double>& states) const {
    for (int lane = 0; lane < kLanes && first + lane < stretches_; ++lane) {
      double* state = states.data() + static_cast<size_t>(first + lane) * weights_.count;
      for (size_t dataset = 0; dataset < weights_.count; ++dataset) state[dataset] = taken[dataset * kLanes + lane];
    }
  }

  // Goes over the stretches in order and walks again where one did not begin with what the one before it ended with.
  void mend() {
    const auto count = static_cast<std::ptrdiff_t>(weights_.count);
    std::vector<double> right(ends_.begin(), ends_.begin() + count), guessed(weights_.count);
    for (int64_t stretch = 1; stretch < stretches_; ++stretch) {
      std::copy_n(begins_.begin() + stretch * count, count, guessed.begin());
      int64_t apart = 0;  // datasets whose counts differ
      for (size_t dataset = 0; dataset < weights_.count; ++dataset) apart += right[dataset] != guessed[dataset];
      const int64_t end = std::min(size_, start(stretch) + stretch_);
      for (int64_t sample = start(stretch); sample < end && apart > 0; ++sample) {
        const size_t other = static_cast<size_t>(datasets_[sample]);
        const size_t dataset = walk_one(weights_, sample, right.data());
        write(sample, dataset, right[dataset] - 1.0);
        if (dataset == other) {
          guessed[other] += 1.0;
          continue;
        }
        apart += (right[dataset] != guessed[dataset]) - (right[dataset] - 1.0 != guessed[dataset]);
        apart += (right[other] != guessed[other] + 1.0) - (right[other] != guessed[other]);
        guessed[other] += 1.0;
      }
      if (apart == 0) std::copy_n(ends_.begin() + stretch * count, count, right.begin());
    }
  }

  int64_t start(int64_t stretch) const { return 1 + stretch * stretch_; }

  const Weights weights_;
  const int64_t size_, early_;
  const LaneWalk walk_some_;
  int16_t* const datasets_;
  int64_t* const samples_;
  int64_t stretch_ = 0, stretches_ = 0;
  size_t first_ = 0;                   // the dataset of sample 0
  std::vector<double> begins_, ends_;  // [stretches, datasets]: the counts each stretch began and ended with
  std::atomic<int64_t> next_{0};       // the next group of stretches
};

// Every sample of every dataset once, in proportion to their sizes, which is the blend with weights size / sum of sizes
// until a dataset is used up; that one drops out of the choice. `left` is what is not used of each, all of it at first.
inline void walk_exhaustive(std::vector<int64_t> left, int64_t total, int64_t early, int width, int threads,
                            int16_t* datasets, int64_t* samples) {
  std::vector<double> weights;   // of the datasets that are not used up
  std::vector<int16_t> numbers;  // and which they are
  for (size_t dataset = 0; dataset < left.size(); ++dataset) {
    if (left[dataset] == 0) continue;
    weights.push_back(static_cast<double>(left[dataset]) / static_cast<double>(total));
    numbers.push_back(static_cast<int16_t>(dataset));
  }
  BlendBuilder({weights.data(), weights.size()}, total, early, width, datasets, samples).run(threads);
  std::vector<double> taken(weights.size(), 0.0);
  int64_t sample = 0;
  for (bool used_up = false; sample < total && !used_up; ++sample) {
    const auto open = static_cast<size_t>(datasets[sample]);
    const auto dataset = static_cast<size_t>(numbers[open]);
    datasets[sample] = numbers[open];
    taken[open] += 1.0;
    used_up = --left[dataset] == 0;
    if (used_up) drop(open, weights, numbers, taken);
  }
  for (; sample < total; ++sample) {
    const size_t open = walk_one({weights.data(), weights.size()}, sample, taken.data());
    const auto dataset = static_cast<size_t>(numbers[open]);
    datasets[sample] = numbers[open];
    samples[sample] = static_cast<int64_t>(taken[open]) - 1;
    if (--left[dataset] == 0) drop(open, weights, numbers, taken);
  }
}

}  // namespace index_builder
