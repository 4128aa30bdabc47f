// Reads samples of a corpus: the pieces of the documents that make up one, gathered into 64-bit ids.

#pragma once

#include <cstdint>
#include <cstring>

namespace index_builder {

// A one-dimensional array of whole numbers in memory, of any size of number and any alignment.
struct Numbers {
  const char* data = nullptr;
  int64_t count = 0;
  int bytes = 0;  // of one number: 1, 2, 4 or 8
  bool is_signed = true;

  int64_t operator[](int64_t place) const {
    const char* at = data + place * bytes;
    switch (bytes) {
      case 1: return is_signed ? read<int8_t>(at) : read<uint8_t>(at);
      case 2: return is_signed ? read<int16_t>(at) : read<uint16_t>(at);
      case 4: return is_signed ? read<int32_t>(at) : static_cast<int64_t>(read<uint32_t>(at));
      default: return read<int64_t>(at);
    }
  }

  // `length` numbers from place `first` on.
  void copy(int64_t first, int64_t length, int64_t* out) const {
    const char* from = data + first * bytes;
    switch (bytes) {
      case 1: return is_signed ? widen<int8_t>(from, length, out) : widen<uint8_t>(from, length, out);
      case 2: return is_signed ? widen<int16_t>(from, length, out) : widen<uint16_t>(from, length, out);
      case 4: return is_signed ? widen<int32_t>(from, length, out) : widen<uint32_t>(from, length, out);
      default: std::memcpy(out, from, static_cast<size_t>(length) * 8);
    }
  }

 private:
  template <typename T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <typename T>
  static void widen(const char* from, int64_t length, int64_t* out) {
    for (int64_t n = 0; n < length; ++n) out[n] = static_cast<int64_t>(read<T>(from + n * static_cast<int64_t>(sizeof(T))));
  }
};

// The arrays that a sample is read from; see megatron_llm/data/sample_index.py and indexed.py.
struct SampleArrays {
  Numbers tokens, pointers, lengths;      // pointers in bytes
  Numbers documents, boundaries, shuffle;  // boundaries: pairs
  int64_t size = 0;                        // tokens of a sample, the extra one included
  int64_t extra = 0;

  // Fills `out` [size] with sample `number`, what is missing at its end with `padding`. False: the arrays do not fit
  // together there, and `out` is not to be used.
  bool read(int64_t number, int64_t padding, int64_t* out) const {
    if (number < 0 || number >= shuffle.count) return false;
    const int64_t piece = shuffle[number];
    if (piece < 0 || piece >= boundaries.count / 2 - 1) return false;
    int64_t place = boundaries[2 * piece], offset = boundaries[2 * piece + 1];
    const int64_t last = boundaries[2 * piece + 2], end = boundaries[2 * piece + 3] + extra;
    if (place < 0 || last < place || last >= documents.count) return false;
    int64_t filled = 0;
    for (; place <= last; ++place, offset = 0) {
      const int64_t document = documents[place];
      if (document < 0 || document >= lengths.count) return false;
      const int64_t whole = lengths[document];
      const int64_t stop = place == last ? end : whole;
      const int64_t start = pointers[document] / tokens.bytes + offset;
      const int64_t length = stop - offset;
      if (offset < 0 || length < 0 || stop > whole || filled + length > size) return false;
      if (start < 0 || start + length > tokens.count) return false;
      tokens.copy(start, length, out + filled);
      filled += length;
    }
    for (; filled < size; ++filled) out[filled] = padding;
    return true;
  }
};

}  // namespace index_builder
