// Matrix product in fp32. Part of a variant; see vectors.h.
//
// The usual three levels (Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"): a tile of the
// result stays in registers while the sum runs; the left side's rows of that tile stay in the first cache while the tiles
// of a row follow each other; the right side's block stays in the second cache while all rows pass. Both sides are copied
// first into the order in which the tiles read them, whatever their strides, so a transposed operand costs nothing extra.

constexpr int64_t kProductRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
constexpr int64_t kProductColumns = 2 * kLanes;

// c [kProductRows, kProductColumns] = (add ? c : 0) + a b, of copied sides: step k of `a` at a[k * kProductRows].
INLINE void product_tile(const float* a, const float* b, int64_t steps, float* c, int64_t c_row, bool add) {
  Floats sums[kProductRows][2];
#pragma GCC unroll 14
  for (int64_t row = 0; row < kProductRows; ++row) {
    sums[row][0] = sums[row][1] = Floats{};
    __builtin_prefetch(c + row * c_row, 1);
    __builtin_prefetch(c + row * c_row + kLanes, 1);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const Floats left = Float32::load_vector(b), right = Float32::load_vector(b + kLanes);
#pragma GCC unroll 14
    for (int64_t row = 0; row < kProductRows; ++row) {
      const Floats factor = all(a[row]);
      sums[row][0] = multiply_add(factor, left, sums[row][0]);
      sums[row][1] = multiply_add(factor, right, sums[row][1]);
    }
    a += kProductRows;
    b += kProductColumns;
  }
#pragma GCC unroll 14
  for (int64_t row = 0; row < kProductRows; ++row) {
    float* to = c + row * c_row;
    if (add) {
      sums[row][0] += Float32::load_vector(to);
      sums[row][1] += Float32::load_vector(to + kLanes);
    }
    Float32::store_vector(to, sums[row][0]);
    Float32::store_vector(to + kLanes, sums[row][1]);
  }
}

// A side in panels of `width` rows or columns, the last one filled up with zeros: element n of step k of a panel at
// to[k * width + n]. Element n, step k of the side itself is at from[n * stride + k * step]. Up to kLanes floats after the
// last panel are written too.
template <int64_t width>
INLINE void copy_panels(const float* from, int64_t stride, int64_t step, int64_t count, int64_t steps, float* to) {
  const int64_t whole = count / width * width;
  if (stride == 1) {
    // A few panels beside each other: what is read lies together, however far the steps lie apart. With more, the places
    // that are written displace each other from the cache.
    constexpr int64_t kTogether = 4 * width;
    for (int64_t first = 0; first < whole; first += kTogether) {
      const int64_t end = first + kTogether < whole ? first + kTogether : whole;
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t panel = first; panel < end; panel += width)
          for (int64_t n = 0; n < width; ++n) to[panel * steps + k * width + n] = from[k * step + panel + n];
    }
  }
  for (int64_t first = stride == 1 ? whole : 0; first < count; first += width) {
    const int64_t here = count - first < width ? count - first : width;
    const float* source = from + first * stride;
    float* panel = to + first * steps;
    if (here < width) __builtin_memset(panel, 0, width * steps * sizeof(float));
    int64_t k = 0;
    for (; step == 1 && k + kLanes <= steps; k += kLanes) {
      for (int64_t group = 0; group < here; group += kLanes) {
        Floats block[kLanes];
#pragma GCC unroll 16
        for (int64_t n = 0; n < kLanes; ++n)
          block[n] = group + n < here ? Float32::load_vector(source + (group + n) * stride + k) : Floats{};
        transpose(block);
        // In a narrower panel a vector reaches into the next step, which is written after it.
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) Float32::store_vector(panel + (k + i) * width + group, block[i]);
      }
    }
    for (; k < steps; ++k)
      for (int64_t n = 0; n < here; ++n) panel[k * width + n] = source[n * stride + k * step];
  }
}

// Tiles of copied sides: rows and columns of c from `c` on.
INLINE void product_block(
    const float* left_side, const float* right_side, int64_t rows, int64_t columns, int64_t steps, float* c, int64_t c_row, bool add) {
  float edge[kProductRows * kProductColumns];
  for (int64_t row = 0; row < rows; row += kProductRows) {
    const int64_t height = rows - row < kProductRows ? rows - row : kProductRows;
    for (int64_t column = 0; column < columns; column += kProductColumns) {
      const float *a = left_side + row * steps, *b = right_side + column * steps;
      float* to = c + row * c_row + column;
      const int64_t width = columns - column < kProductColumns ? columns - column : kProductColumns;
      if (height == kProductRows && width == kProductColumns) {
        product_tile(a, b, steps, to, c_row, add);
        continue;
      }
      product_tile(a, b, steps, edge, kProductColumns, false);
      for (int64_t m = 0; m < height; ++m)
        for (int64_t n = 0; n < width; ++n) to[m * c_row + n] = (add ? to[m * c_row + n] : 0.0f) + edge[m * kProductColumns + n];
    }
  }
}

// The part of a product in rows [begin, end) and columns [left, right). A large part of the result is finished before the
// next one is begun, so that it need not come from memory again for each piece of the sum.
static void matrix_product(const MatrixProduct& work, int64_t begin, int64_t end, int64_t left, int64_t right, float* scratch) {
  float* const right_side = scratch;
  float* const left_side = scratch + kProductSteps * (kProductBlock + kProductColumns);
  for (int64_t row = begin; row < end; row += kProductPartRows) {
    const int64_t rows = end - row < kProductPartRows ? end - row : kProductPartRows;
    for (int64_t part = left; part < right; part += kProductPartColumns) {
      const int64_t part_end = right - part < kProductPartColumns ? right : part + kProductPartColumns;
      for (int64_t k = 0; k < work.steps; k += kProductSteps) {
        const int64_t steps = work.steps - k < kProductSteps ? work.steps - k : kProductSteps;
        copy_panels<kProductRows>(work.a + row * work.a_row + k * work.a_step, work.a_row, work.a_step, rows, steps, left_side);
        for (int64_t block = part; block < part_end; block += kProductBlock) {
          const int64_t columns = part_end - block < kProductBlock ? part_end - block : kProductBlock;
          const float* b = work.b + k * work.b_step + block * work.b_column;
          copy_panels<kProductColumns>(b, work.b_column, work.b_step, columns, steps, right_side);
          float* c = work.c + row * work.c_row + block;
          product_block(left_side, right_side, rows, columns, steps, c, work.c_row, work.add || k > 0);
        }
      }
    }
  }
}
