// What works on activations: RMSNorm, rotary position embedding, SwiGLU; each forward and backward. Part of a variant; see
// vectors.h.

// A whole vector, or the `count` elements that are left; the other lanes are 0.
template <typename Type>
INLINE Floats load_some(const typename Type::Stored* from, int64_t count) {
  return count >= kLanes ? Type::load_vector(from) : load_part<Type>(from, count, 0.0f);
}

template <typename Type>
INLINE void store_some(typename Type::Stored* to, int64_t count, Floats value) {
  if (count >= kLanes)
    Type::store_vector(to, value);
  else
    store_part<Type>(to, count, value);
}

// The value that a store and a load would give.
template <typename Type>
INLINE Floats rounded_to(Floats value) {
  if constexpr (sizeof(typename Type::Stored) == sizeof(float)) {
    return value;
  } else {
    typename Type::Stored lanes[kLanes];
    Type::store_vector(lanes, value);
    return Type::load_vector(lanes);
  }
}

template <typename Type>
static void rms_norm(const RmsNorm& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  const auto* weight = static_cast<const Stored*>(work.weight);
  for (int64_t row = begin; row < end; ++row) {
    const Stored* x = static_cast<const Stored*>(work.x) + row * work.stride;
    Stored* y = static_cast<Stored*>(work.y) + row * work.columns;
    Floats squares{};
    for (int64_t i = 0; i < work.columns; i += kLanes) {
      const Floats value = load_some<Type>(x + i, work.columns - i);
      squares = multiply_add(value, value, squares);
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / work.columns + work.epsilon);
    for (int64_t i = 0; i < work.columns; i += kLanes) {
      const int64_t left = work.columns - i;
      const Floats normal = rounded_to<Type>(load_some<Type>(x + i, left) * scale);
      store_some<Type>(y + i, left, normal * load_some<Type>(weight + i, left));
    }
    work.scale[row] = scale;
  }
}

// Rows of one block after the other, so that the weight's gradient is summed in the same order on any number of threads.
template <typename Type>
static void rms_norm_backward(const RmsNorm& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  const auto* weight = static_cast<const Stored*>(work.weight);
  for (int64_t block = begin; block < end; ++block) {
    float* sums = work.weight_sums + block * work.columns;
    const int64_t first = block * kNormBlock, last = first + kNormBlock < work.rows ? first + kNormBlock : work.rows;
    for (int64_t row = first; row < last; ++row) {
      const Stored* x = static_cast<const Stored*>(work.x) + row * work.stride;
      const Stored* grad = static_cast<const Stored*>(work.grad) + row * work.columns;
      Stored* out = static_cast<Stored*>(work.y) + row * work.columns;
      const float scale = work.scale[row];
      Floats products{};
      for (int64_t i = 0; i < work.columns; i += kLanes) {
        const int64_t left = work.columns - i;
        const Floats normal = load_some<Type>(x + i, left) * scale, upstream = load_some<Type>(grad + i, left);
        products = multiply_add(upstream * load_some<Type>(weight + i, left), normal, products);
        store_some<Float32>(sums + i, left, multiply_add(upstream, normal, load_some<Float32>(sums + i, left)));
      }
      const float mean = sum_of(products) / work.columns;
      for (int64_t i = 0; i < work.columns; i += kLanes) {
        const int64_t left = work.columns - i;
        const Floats normal = load_some<Type>(x + i, left) * scale;
        const Floats upstream = load_some<Type>(grad + i, left) * load_some<Type>(weight + i, left);
        store_some<Type>(out + i, left, (upstream - normal * mean) * scale);
      }
    }
  }
}

// Pairs (2i, 2i + 1): taken apart, rotated, put together again. `count` pairs, at most kLanes.
template <typename Type>
INLINE void rotate_neighbours(
    const typename Type::Stored* x, typename Type::Stored* y, int64_t count, Floats cos, Floats sin) {
  const Floats low = load_some<Type>(x, 2 * count);
  const Floats high = 2 * count > kLanes ? load_some<Type>(x + kLanes, 2 * count - kLanes) : Floats{};
  const Floats even = __builtin_shuffle(low, high, alternate_mask(0));
  const Floats odd = __builtin_shuffle(low, high, alternate_mask(1));
  const Floats first = even * cos - odd * sin, second = odd * cos + even * sin;
  store_some<Type>(y, 2 * count, __builtin_shuffle(first, second, interleave_mask(0)));
  if (2 * count > kLanes)
    store_some<Type>(y + kLanes, 2 * count - kLanes, __builtin_shuffle(first, second, interleave_mask(kLanes / 2)));
}

template <typename Type>
static void rotary(const Rotary& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t s = token / work.batch, b = token % work.batch;
    const float* cos = work.cos + s * work.cos_stride_s + b * work.cos_stride_b;
    const float* sin = work.sin + s * work.sin_stride_s + b * work.sin_stride_b;
    for (int64_t head = 0; head < work.heads; ++head) {
      const Stored* x = static_cast<const Stored*>(work.x) + s * work.stride_s + b * work.stride_b + head * work.stride_head;
      Stored* y = static_cast<Stored*>(work.y) + (token * work.heads + head) * 2 * work.half;
      for (int64_t i = 0; i < work.half; i += kLanes) {
        const int64_t left = work.half - i < kLanes ? work.half - i : kLanes;
        const Floats c = load_some<Float32>(cos + i, left), n = load_some<Float32>(sin + i, left) * work.sign;
        if (work.interleaved) {
          rotate_neighbours<Type>(x + 2 * i, y + 2 * i, left, c, n);
          continue;
        }
        const Floats first = load_some<Type>(x + i, left), second = load_some<Type>(x + work.half + i, left);
        store_some<Type>(y + i, left, first * c - second * n);
        store_some<Type>(y + work.half + i, left, second * c + first * n);
      }
    }
  }
}

template <typename Type>
static void swiglu(const SwiGlu& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* gates = static_cast<const Stored*>(work.gate) + row * work.gate_stride;
    const Stored* ups = static_cast<const Stored*>(work.up) + row * work.up_stride;
    Stored* out = static_cast<Stored*>(work.out) + row * work.columns;
    for (int64_t i = 0; i < work.columns; i += kLanes) {
      const int64_t left = work.columns - i;
      const Floats gate = load_some<Type>(gates + i, left), up = load_some<Type>(ups + i, left);
      store_some<Type>(out + i, left, gate * up * inverse(exponential(-gate) + 1.0f));
    }
  }
}

template <typename Type>
static void swiglu_backward(const SwiGlu& work, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* gates = static_cast<const Stored*>(work.gate) + row * work.gate_stride;
    const Stored* ups = static_cast<const Stored*>(work.up) + row * work.up_stride;
    const Stored* grads = static_cast<const Stored*>(work.grad) + row * work.columns;
    Stored* to_gate = static_cast<Stored*>(work.out) + row * 2 * work.columns;
    Stored* to_up = to_gate + work.columns;
    for (int64_t i = 0; i < work.columns; i += kLanes) {
      const int64_t left = work.columns - i;
      const Floats gate = load_some<Type>(gates + i, left), up = load_some<Type>(ups + i, left);
      const Floats grad = load_some<Type>(grads + i, left);
      const Floats sigmoid = inverse(exponential(-gate) + 1.0f), silu = gate * sigmoid;
      store_some<Type>(to_up + i, left, grad * silu);
      store_some<Type>(to_gate + i, left, grad * up * (sigmoid + silu * (1.0f - sigmoid)));
    }
  }
}
