// Causal attention and its gradient, a block of tokens at a time. Part of a variant; see vectors.h.
//
// The forward pass keeps of each query the logarithm of its sum of exponentials, from which the backward pass makes the
// weights again (Dao et al. 2022, arXiv:2205.14135). All products are of small matrices that are copied into scratch memory
// first, where their columns do not displace each other from the cache.
//
// The unit of the products is a word of 32 bits: one fp32, or two bf16 that a processor multiplies and adds in one
// instruction. A step of a product is one word of each row: one or two of the elements that are summed over.

struct OneInAWord {
  static constexpr int kEach = 1;
  INLINE Floats multiply_add_words(uint32_t a, Words b, Floats sum) {
    return multiply_add(all(bits_as<float>(a)), bits_as<Floats>(b), sum);
  }
};

#ifdef MEGATRON_LLM_BF16_PRODUCTS
struct TwoInAWord {
  static constexpr int kEach = 2;
  INLINE Floats multiply_add_words(uint32_t a, Words b, Floats sum) {
    return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(Words{} + a), bits_as<__m512bh>(b));
  }
};
#endif

template <typename Type>
struct WordsOf {
  using Packing = OneInAWord;
};
#ifdef MEGATRON_LLM_BF16_PRODUCTS
template <>
struct WordsOf<BFloat16> {
  using Packing = TwoInAWord;
};
#endif

constexpr int64_t kTileRows = kLanes == 16 ? 8 : 4;
constexpr int64_t kTileColumns = 2 * kLanes;

// A matrix of words as the left side of a product: row m, step k at data[m * row + k * step].
struct LeftSide {
  const uint32_t* data;
  int64_t row, step;
};

// And as the right side: step k, column n at data[n / 32 * panel + k * step + n % 32].
struct RightSide {
  const uint32_t* data;
  int64_t panel, step;
};

template <typename Packing>
INLINE void multiply_tile(LeftSide a, const uint32_t* b, int64_t b_step, int64_t steps, float* c, int64_t c_row, bool add) {
  Floats sums[kTileRows][2];
#pragma GCC unroll 8
  for (int64_t row = 0; row < kTileRows; ++row) {
    sums[row][0] = add ? Float32::load_vector(c + row * c_row) : Floats{};
    sums[row][1] = add ? Float32::load_vector(c + row * c_row + kLanes) : Floats{};
  }
  for (int64_t step = 0; step < steps; ++step) {
    Words left, right;
    __builtin_memcpy(&left, b + step * b_step, sizeof(left));
    __builtin_memcpy(&right, b + step * b_step + kLanes, sizeof(right));
    const uint32_t* column = a.data + step * a.step;
#pragma GCC unroll 8
    for (int64_t row = 0; row < kTileRows; ++row) {
      const uint32_t word = column[row * a.row];
      sums[row][0] = Packing::multiply_add_words(word, left, sums[row][0]);
      sums[row][1] = Packing::multiply_add_words(word, right, sums[row][1]);
    }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < kTileRows; ++row) {
    Float32::store_vector(c + row * c_row, sums[row][0]);
    Float32::store_vector(c + row * c_row + kLanes, sums[row][1]);
  }
}

// c [rows, columns] = (add ? c : 0) + a b; rows and columns are multiples of kAttentionBlock.
template <typename Packing>
static void multiply(
    LeftSide a, RightSide b, int64_t rows, int64_t columns, int64_t steps, float* c, int64_t c_row, bool add) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const uint32_t* from = b.data + column / kAttentionBlock * b.panel + column % kAttentionBlock;
    for (int64_t row = 0; row < rows; row += kTileRows)
      multiply_tile<Packing>(
          {a.data + row * a.row, a.row, a.step}, from, b.step, steps, c + row * c_row + column, c_row, add);
  }
}

// Rows of a head as words, [padded, size / kEach]; rows and features beyond the last are zero.
template <typename Type>
INLINE void pack_rows(const HeadView& view, int64_t head, int64_t batch, const CausalAttention& work, uint32_t* to) {
  constexpr int64_t kEach = WordsOf<Type>::Packing::kEach;
  const int64_t width = work.size / kEach;
  const auto* from = static_cast<const typename Type::Stored*>(view.data) + batch * view.batch + head * view.head;
  for (int64_t token = 0; token < work.length; ++token, from += view.token, to += width) {
    if constexpr (kEach * sizeof(typename Type::Stored) == sizeof(uint32_t)) {
      const int64_t bytes = work.features * sizeof(*from);
      __builtin_memcpy(to, from, bytes);
      __builtin_memset(reinterpret_cast<char*>(to) + bytes, 0, width * sizeof(*to) - bytes);
    } else {
      for (int64_t i = 0; i < width; i += kLanes) {
        const Floats values = i < work.features ? load_some<Type>(from + i, work.features - i) : Floats{};
        __builtin_memcpy(to + i, &values, sizeof(values));
      }
    }
  }
  __builtin_memset(to, 0, (work.padded - work.length) * width * sizeof(*to));
}

// Packed rows with tokens as the steps, [padded / kEach, size]: `to`, or the rows themselves where they are that already.
template <typename Packing>
INLINE RightSide tokens_as_steps(const CausalAttention& work, const uint32_t* rows, uint32_t* to) {
  if constexpr (Packing::kEach == 1) return {rows, kAttentionBlock, work.size};
  const auto* halves = reinterpret_cast<const uint16_t*>(rows);
  for (int64_t pair = 0; pair < work.padded / 2; ++pair)
    for (int64_t i = 0; i < work.size; i += kLanes) {
      const Words even = __builtin_convertvector(load_shorts(halves + 2 * pair * work.size + i), Words);
      const Words odd = __builtin_convertvector(load_shorts(halves + (2 * pair + 1) * work.size + i), Words);
      const Words both = even | (odd << 16);
      __builtin_memcpy(to + pair * work.size + i, &both, sizeof(both));
    }
  return {to, kAttentionBlock, work.size};
}

// Packed rows with tokens as the columns, in panels of kAttentionBlock.
template <typename Packing>
INLINE RightSide tokens_as_columns(const CausalAttention& work, const uint32_t* rows, uint32_t* to) {
  const int64_t width = work.size / Packing::kEach, panel = width * kAttentionBlock;
  for (int64_t first = 0; first < work.padded; first += kAttentionBlock)
    for (int64_t word = 0; word < width; ++word)
      for (int64_t token = 0; token < kAttentionBlock; ++token)
        to[first * width + word * kAttentionBlock + token] = rows[(first + token) * width + word];
  return {to, panel, kAttentionBlock};
}

template <typename Type>
INLINE void store_rows(const HeadView& view, int64_t head, int64_t batch, const CausalAttention& work, const float* from) {
  auto* to = static_cast<typename Type::Stored*>(view.data) + batch * view.batch + head * view.head;
  for (int64_t token = 0; token < work.length; ++token)
    for (int64_t i = 0; i < work.features; i += kLanes)
      store_some<Type>(to + token * view.token + i, work.features - i, Float32::load_vector(from + token * work.size + i));
}

// What of a row of a left side is stored, fp32 or bf16. The processor's own rounding takes subnormal numbers as zero, as its
// products do.
template <typename Packing>
INLINE void store_words(uint32_t* row, int64_t place, Floats values) {
#ifdef MEGATRON_LLM_BF16_PRODUCTS
  if constexpr (Packing::kEach == 2) {
    const Shorts rounded = bits_as<Shorts>(_mm512_cvtneps_pbh(values));
    __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + place, &rounded, sizeof(rounded));
    return;
  }
#endif
  __builtin_memcpy(row + place, &values, sizeof(values));
}

// Weights of one query, not yet divided by their sum, which is returned; `columns` of them, those after `query` are zero.
template <typename Packing>
INLINE float exponentials_of_row(const float* scores, int64_t query, int64_t columns, float scale, uint32_t* row, float* most) {
  *most = block_maximum<Float32>(scores, query + 1);
  Floats sum{};
  const Ints lanes = lane_numbers();
  for (int64_t key = 0; key < columns; key += kLanes) {
    Floats power{};
    if (key <= query) {
      power = exponential((Float32::load_vector(scores + key) - *most) * scale);
      if (key + kLanes > query + 1) power = lanes <= static_cast<int32_t>(query - key) ? power : Floats{};
    }
    sum += power;
    store_words<Packing>(row, key, power);
  }
  return sum_of(sum);
}

// Tasks [begin, end): a key head of a sequence each, with the query heads that share it.
template <typename Type>
static void causal_attention(const CausalAttention& work, int64_t begin, int64_t end, uint32_t* scratch) {
  using Packing = typename WordsOf<Type>::Packing;
  constexpr int64_t kEach = Packing::kEach;
  const int64_t matrix = work.padded * work.size, width = work.size / kEach, group = work.heads / work.key_heads;
  uint32_t *rows = scratch, *key_space = rows + matrix, *value_space = key_space + matrix, *query_rows = value_space + matrix;
  uint32_t* weights = query_rows + matrix;
  auto* scores = reinterpret_cast<float*>(weights + kAttentionBlock * work.padded);
  float* mixed = scores + kAttentionBlock * work.padded;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / work.key_heads, key_head = task % work.key_heads;
    pack_rows<Type>(work.key, key_head, batch, work, rows);
    const RightSide keys = tokens_as_columns<Packing>(work, rows, key_space);
    pack_rows<Type>(work.value, key_head, batch, work, rows);
    const RightSide values = tokens_as_steps<Packing>(work, rows, value_space);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      pack_rows<Type>(work.query, head, batch, work, query_rows);
      float* log_sums = work.log_sum_exp + (batch * work.heads + head) * work.length;
      auto* out = static_cast<typename Type::Stored*>(work.out.data) + batch * work.out.batch + head * work.out.head;
      for (int64_t first = 0; first < work.length; first += kAttentionBlock) {
        const int64_t columns = first + kAttentionBlock;
        multiply<Packing>({query_rows + first * width, width, 1}, keys, kAttentionBlock, columns, width, scores, columns, false);
        float factors[kAttentionBlock];
        for (int64_t row = 0; row < kAttentionBlock; ++row) {
          float most;
          uint32_t* to = weights + row * columns / kEach;
          const float sum = exponentials_of_row<Packing>(scores + row * columns, first + row, columns, work.scale, to, &most);
          factors[row] = 1.0f / sum;
          if (first + row < work.length) log_sums[first + row] = most * work.scale + __builtin_logf(sum);
        }
        multiply<Packing>(
            {weights, columns / kEach, 1}, values, kAttentionBlock, work.size, columns / kEach, mixed, work.size, false);
        for (int64_t row = 0; row < kAttentionBlock && first + row < work.length; ++row)
          for (int64_t i = 0; i < work.features; i += kLanes)
            store_some<Type>(
                out + (first + row) * work.out.token + i, work.features - i,
                Float32::load_vector(mixed + row * work.size + i) * factors[row]);
      }
    }
  }
}

// The sum over the elements of a row of grad x out, which is that of weights x their gradients; zero for rows beyond the last.
template <typename Type>
INLINE void row_products(const CausalAttention& work, int64_t head, int64_t batch, float* to) {
  using Stored = typename Type::Stored;
  const auto* grad = static_cast<const Stored*>(work.grad.data) + batch * work.grad.batch + head * work.grad.head;
  const auto* out = static_cast<const Stored*>(work.out.data) + batch * work.out.batch + head * work.out.head;
  for (int64_t token = 0; token < work.length; ++token) {
    Floats sum{};
    for (int64_t i = 0; i < work.features; i += kLanes)
      sum = multiply_add(
          load_some<Type>(grad + token * work.grad.token + i, work.features - i),
          load_some<Type>(out + token * work.out.token + i, work.features - i), sum);
    to[token] = sum_of(sum);
  }
  __builtin_memset(to + work.length, 0, (work.padded - work.length) * sizeof(*to));
}

// Left sides of the backward's products for a block of keys: weights and gradients of scores with a row for each key, and
// the latter with a row for each query.
struct KeyBlock {
  float *scores, *weight_grads;   // [kAttentionBlock, columns]
  uint32_t *weights, *grads;      // [kAttentionBlock, columns / kEach]
  uint32_t* grads_by_query;       // [kAttentionBlock / kEach, columns]; the same as grads where kEach is 1
};

// Scores and gradients of the weights become weights and gradients of the scores. Row r is key r of the block, column c the
// query c of the block or after it.
template <typename Packing>
INLINE void weights_again(const KeyBlock& block, int64_t columns, const float* log_sums, const float* means, float scale) {
  constexpr int64_t kEach = Packing::kEach;
  const Ints lanes = lane_numbers();
  for (int64_t key = 0; key < kAttentionBlock; key += kEach)
    for (int64_t query = 0; query < columns; query += kLanes) {
      Words both{};
      for (int64_t part = 0; part < kEach; ++part) {
        const int64_t row = key + part, place = row * columns + query;
        const Floats score = Float32::load_vector(block.scores + place);
        Floats weight = exponential(multiply_add(score, all(scale), -Float32::load_vector(log_sums + query)));
        if (query < row) weight = lanes >= static_cast<int32_t>(row - query) ? weight : Floats{};
        const Floats grad =
            weight * (Float32::load_vector(block.weight_grads + place) - Float32::load_vector(means + query)) * scale;
        store_words<Packing>(block.weights + row * columns / kEach, query, weight);
        store_words<Packing>(block.grads + row * columns / kEach, query, grad);
        if constexpr (kEach == 2) {
          const auto* stored = reinterpret_cast<const uint16_t*>(block.grads + row * columns / kEach) + query;
          both |= __builtin_convertvector(load_shorts(stored), Words) << (16 * part);
        }
      }
      if constexpr (kEach == 2) __builtin_memcpy(block.grads_by_query + key / kEach * columns + query, &both, sizeof(both));
    }
}

template <typename Type>
static void causal_attention_backward(const CausalAttention& work, int64_t begin, int64_t end, uint32_t* scratch) {
  using Packing = typename WordsOf<Type>::Packing;
  constexpr int64_t kEach = Packing::kEach;
  const int64_t matrix = work.padded * work.size, width = work.size / kEach, group = work.heads / work.key_heads;
  const auto take = [&scratch](int64_t count) {
    uint32_t* taken = scratch;
    scratch += count;
    return taken;
  };
  const auto take_floats = [&take](int64_t count) { return reinterpret_cast<float*>(take(count)); };
  uint32_t *key_rows = take(matrix), *key_space = take(matrix), *value_rows = take(matrix), *rows = take(matrix);
  uint32_t *query_columns = take(matrix), *query_steps = take(matrix), *grad_columns = take(matrix), *grad_steps = take(matrix);
  uint32_t* grad_rows = take(matrix);
  float *query_grads = take_floats(matrix), *key_grads = take_floats(matrix), *value_grads = take_floats(matrix);
  float *log_sums = take_floats(work.padded), *means = take_floats(work.padded);
  const int64_t square = kAttentionBlock * work.padded;
  KeyBlock block{take_floats(square), take_floats(square), take(square), take(square), nullptr};
  block.grads_by_query = kEach == 1 ? block.grads : take(square);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / work.key_heads, key_head = task % work.key_heads;
    pack_rows<Type>(work.key, key_head, batch, work, key_rows);
    pack_rows<Type>(work.value, key_head, batch, work, value_rows);
    const RightSide keys = tokens_as_steps<Packing>(work, key_rows, key_space);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      pack_rows<Type>(work.query, head, batch, work, rows);
      const RightSide queries = tokens_as_columns<Packing>(work, rows, query_columns);
      const RightSide query_sums = tokens_as_steps<Packing>(work, rows, query_steps);
      pack_rows<Type>(work.grad, head, batch, work, grad_rows);
      const RightSide grads = tokens_as_columns<Packing>(work, grad_rows, grad_columns);
      const RightSide grad_sums = tokens_as_steps<Packing>(work, grad_rows, grad_steps);
      row_products<Type>(work, head, batch, means);
      for (int64_t token = 0; token < work.padded; ++token)
        log_sums[token] =
            token < work.length ? work.log_sum_exp[(batch * work.heads + head) * work.length + token] : __builtin_inff();
      for (int64_t first = 0; first < work.padded; first += kAttentionBlock) {
        const int64_t columns = work.padded - first, steps = columns / kEach;
        const auto from = [&](RightSide side) { return RightSide{side.data + first / kAttentionBlock * side.panel, side.panel, side.step}; };
        const auto after = [&](RightSide side) { return RightSide{side.data + first / kEach * side.step, side.panel, side.step}; };
        multiply<Packing>({key_rows + first * width, width, 1}, from(queries), kAttentionBlock, columns, width, block.scores, columns, false);
        multiply<Packing>(
            {value_rows + first * width, width, 1}, from(grads), kAttentionBlock, columns, width, block.weight_grads, columns, false);
        weights_again<Packing>(block, columns, log_sums + first, means + first, work.scale);
        const bool add = head != key_head * group;
        float *value_to = value_grads + first * work.size, *key_to = key_grads + first * work.size;
        multiply<Packing>({block.weights, steps, 1}, after(grad_sums), kAttentionBlock, work.size, steps, value_to, work.size, add);
        multiply<Packing>({block.grads, steps, 1}, after(query_sums), kAttentionBlock, work.size, steps, key_to, work.size, add);
        multiply<Packing>(
            {block.grads_by_query, 1, columns}, after(keys), columns, work.size, kAttentionBlock / kEach,
            query_grads + first * work.size, work.size, first > 0);
      }
      store_rows<Type>(work.query_grad, head, batch, work, query_grads);
    }
    store_rows<Type>(work.key_grad, key_head, batch, work, key_grads);
    store_rows<Type>(work.value_grad, key_head, batch, work, value_grads);
  }
}
