// The shuffle of numpy's RandomState, for arrays of 32-bit numbers: the same order from the same state.
//
// numpy draws one number and swaps one pair at a time, so it waits for memory once a pair. Here the numbers of a block of
// pairs are drawn first: then all the places that the block touches are known and are asked for ahead of the swaps.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace index_builder {

inline void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// MT19937 (Matsumoto and Nishimura 1998) over a state of 624 words, which it changes in place; `used` of the words are
// already spent. Numbers are made and tempered a whole state at a time, which compilers vectorize.
class MersenneTwister {
 public:
  static constexpr int kWords = 624;

  MersenneTwister(uint32_t* state, int used) : state_(state), used_(used) {
    if (used < 0 || used > kWords) throw std::invalid_argument("the position in the state must be 0 to 624");
    temper();
  }

  // The next numbers: at least one. `skip` marks how many of them were taken.
  const uint32_t* peek(int* available) {
    if (used_ == kWords) {
      advance();
      temper();
      used_ = 0;
    }
    *available = kWords - used_;
    return tempered_ + used_;
  }
  void skip(int count) { used_ += count; }
  int used() const { return used_; }

 private:
  static uint32_t twist(uint32_t high, uint32_t low, uint32_t far) {
    const uint32_t both = (high & 0x80000000U) | (low & 0x7fffffffU);
    return far ^ (both >> 1) ^ ((0U - (both & 1U)) & 0x9908b0dfU);
  }

  void advance() {
    constexpr int kFar = 397;
    uint32_t* s = state_;
    for (int i = 0; i < kWords - kFar; ++i) s[i] = twist(s[i], s[i + 1], s[i + kFar]);
    for (int i = kWords - kFar; i < kWords - 1; ++i) s[i] = twist(s[i], s[i + 1], s[i + kFar - kWords]);
    s[kWords - 1] = twist(s[kWords - 1], s[0], s[kFar - 1]);
  }

  void temper() {
    for (int i = 0; i < kWords; ++i) {
      uint32_t y = state_[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680U;
      y ^= (y << 15) & 0xefc60000U;
      tempered_[i] = y ^ (y >> 18);
    }
  }

  uint32_t* state_;
  int used_;
  uint32_t tempered_[kWords];
};

// The smallest number of the form 2^k - 1 that is not below `value`.
inline uint32_t mask_above(uint32_t value) {
  for (const int shift : {1, 2, 4, 8, 16}) value |= value >> shift;
  return value;
}

// Shuffles `count` <= 2^32 words: for i from count - 1 down to 1, word i and word j change places, j being the first of the
// next random numbers that is not above i once cut to as many bits as i has.
inline void shuffle_words(uint32_t* words, uint64_t count, MersenneTwister& random) {
  constexpr int kBlock = 4096;
  constexpr int kAhead = 48;
  if (count < 2) return;
  std::vector<uint32_t> partners(kBlock + MersenneTwister::kWords);
  uint32_t last = static_cast<uint32_t>(count - 1);  // the i of the next pair
  while (last > 0) {
    const uint32_t first = last;
    int drawn = 0;
    while (drawn < kBlock && last > 0) {
      const uint32_t mask = mask_above(last);
      int available = 0;
      const uint32_t* numbers = random.peek(&available);
      // Pairs left until i has one bit less. One number gives at most one pair, so this many can be used with this mask.
      const uint32_t same_mask = last - (mask >> 1);
      if (same_mask < static_cast<uint32_t>(available)) available = static_cast<int>(same_mask);
      uint32_t* out = partners.data() + drawn;
      uint32_t found = 0;
      for (int n = 0; n < available; ++n) {
        const uint32_t candidate = numbers[n] & mask;
        out[found] = candidate;
        found += candidate <= last - found;
      }
      random.skip(available);
      last -= found;
      drawn += static_cast<int>(found);
    }
    const uint32_t* partner = partners.data();
    for (int n = 0; n < kAhead && n < drawn; ++n) prefetch(words + partner[n]);
    for (int n = 0; n < drawn; ++n) {
      if (n + kAhead < drawn) prefetch(words + partner[n + kAhead]);
      std::swap(words[first - static_cast<uint32_t>(n)], words[partner[n]]);
    }
  }
}

}  // namespace index_builder
