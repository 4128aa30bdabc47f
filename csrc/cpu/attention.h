// Softmax over the scores of causal attention, and its gradient. Part of a variant; see vectors.h.

// Columns of a row whose exponentials are kept from the sum to the division; longer rows compute them again.
constexpr int64_t kKeptColumns = 1024;

INLINE int64_t visible_columns(const CausalSoftmax& work, int64_t row) {
  const int64_t visible = work.first + row % work.period + 1;
  return visible < work.columns ? visible : work.columns;
}

template <typename Type>
static void causal_softmax(const CausalSoftmax& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  float kept[kKeptColumns];
  for (int64_t row = begin; row < end; ++row) {
    const Stored* from = static_cast<const Stored*>(work.scores) + row * work.columns;
    Stored* to = static_cast<Stored*>(work.out) + row * work.columns;
    const int64_t visible = visible_columns(work, row), whole = visible / kLanes * kLanes, left = visible - whole;
    const bool keeps = visible <= kKeptColumns - kLanes;
    const float most = block_maximum<Type>(from, visible);
    // exp(scale * (x - maximum)): the scale is positive, so the maximum may be taken before it.
    Floats sum{};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats power = exponential((Type::load_vector(from + i) - most) * work.scale);
      if (keeps) __builtin_memcpy(kept + i, &power, sizeof(power));
      sum += power;
    }
    Floats last{};
    if (left) sum += last = exponential((load_part<Type>(from + whole, left, -__builtin_inff()) - most) * work.scale);
    const float factor = 1.0f / sum_of(sum);
    for (int64_t i = 0; i < whole; i += kLanes) {
      Floats power;
      if (keeps)
        __builtin_memcpy(&power, kept + i, sizeof(power));
      else
        power = exponential((Type::load_vector(from + i) - most) * work.scale);
      Type::store_vector(to + i, power * factor);
    }
    if (left) store_part<Type>(to + whole, left, last * factor);
    __builtin_memset(to + visible, 0, (work.columns - visible) * sizeof(Stored));
  }
}

// weights * (grad - sum of weights * grad) * scale.
template <typename Type>
static void causal_softmax_backward(const CausalSoftmax& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* weights = static_cast<const Stored*>(work.weights) + row * work.columns;
    const Stored* grad = static_cast<const Stored*>(work.scores) + row * work.columns;
    Stored* to = static_cast<Stored*>(work.out) + row * work.columns;
    const int64_t visible = visible_columns(work, row), whole = visible / kLanes * kLanes, left = visible - whole;
    Floats sum{};
    for (int64_t i = 0; i < whole; i += kLanes) sum = multiply_add(Type::load_vector(weights + i), Type::load_vector(grad + i), sum);
    if (left) sum = multiply_add(load_part<Type>(weights + whole, left, 0.0f), load_part<Type>(grad + whole, left, 0.0f), sum);
    const float mean = sum_of(sum);
    for (int64_t i = 0; i < whole; i += kLanes)
      Type::store_vector(to + i, Type::load_vector(weights + i) * (Type::load_vector(grad + i) - mean) * work.scale);
    if (left)
      store_part<Type>(
          to + whole, left,
          load_part<Type>(weights + whole, left, 0.0f) * (load_part<Type>(grad + whole, left, 0.0f) - mean) * work.scale);
    __builtin_memset(to + visible, 0, (work.columns - visible) * sizeof(Stored));
  }
}
