// Softmax over rows of logits in one pass over memory, and its gradient in place. Part of a variant; see vectors.h.

// Columns that are read twice, for the maximum and for the sum, while they lie in the first cache.
constexpr int64_t kSoftmaxBlock = 2048;

template <typename Type>
INLINE float block_maximum(const typename Type::Stored* from, int64_t count) {
  Floats most = all(-__builtin_inff()), other = most;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    most = larger(most, Type::load_vector(from + i));
    other = larger(other, Type::load_vector(from + i + kLanes));
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i;
    most = larger(most, left >= kLanes ? Type::load_vector(from + i) : load_part<Type>(from + i, left, -__builtin_inff()));
  }
  return largest_of(larger(most, other));
}

template <typename Type>
INLINE float block_sum(const typename Type::Stored* from, int64_t count, float shift) {
  Floats sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += exponential(Type::load_vector(from + i) - shift);
  if (i < count) sum += exponential(load_part<Type>(from + i, count - i, -__builtin_inff()) - shift);
  return sum_of(sum);
}

// Online softmax (Milakov and Gimelshein 2018): where a block brings a larger maximum, the sum so far is rescaled.
template <typename Type>
static void softmax_statistics(const SoftmaxRows& work, int64_t begin, int64_t end) {
  const auto* logits = static_cast<const typename Type::Stored*>(work.logits);
  for (int64_t row = begin; row < end; ++row) {
    const auto* from = logits + row * work.stride;
    float most = -__builtin_inff(), shift = 0.0f;
    double sum = 0.0;
    for (int64_t i = 0; i < work.valid; i += kSoftmaxBlock) {
      const int64_t count = work.valid - i < kSoftmaxBlock ? work.valid - i : kSoftmaxBlock;
      const float peak = block_maximum<Type>(from + i, count);
      if (peak > most) {
        sum *= __builtin_exp(static_cast<double>(most) - peak);
        most = shift = peak;
      }
      sum += block_sum<Type>(from + i, count, shift);  // nothing but -inf so far: shift 0 keeps the terms 0, and NaN NaN
    }
    const int64_t label = work.labels[row] - work.first;
    work.out[row] = most;
    work.out[work.rows + row] = static_cast<float>(sum);
    work.out[2 * work.rows + row] = label >= 0 && label < work.valid ? Type::load(from + label) : 0.0f;
  }
}

template <typename Type>
static void softmax_gradient(const SoftmaxRows& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  for (int64_t row = begin; row < end; ++row) {
    Stored* to = static_cast<Stored*>(work.logits) + row * work.stride;
    const float scale = work.scale[row], shift = work.log_sum_exp[row];
    if (scale == 0.0f) {
      __builtin_memset(to, 0, work.columns * sizeof(Stored));
      continue;
    }
    const int64_t label = work.labels[row] - work.first;
    const bool here = label >= 0 && label < work.valid;
    const float target = here ? Type::load(to + label) : 0.0f;
    int64_t i = 0;
    for (; i + kLanes <= work.valid; i += kLanes)
      Type::store_vector(to + i, exponential(Type::load_vector(to + i) - shift) * scale);
    if (i < work.valid)
      store_part<Type>(to + i, work.valid - i, exponential(load_part<Type>(to + i, work.valid - i, 0.0f) - shift) * scale);
    if (here) store_part<Type>(to + label, 1, (exponential(all(target - shift)) - 1.0f) * scale);
    __builtin_memset(to + work.valid, 0, (work.columns - work.valid) * sizeof(Stored));
  }
}
