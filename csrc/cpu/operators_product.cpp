// Operator of the matrix product: each thread computes a rectangle of the result.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "operators.h"

namespace megatron_llm {
namespace {

int64_t ceil_divide(int64_t count, int64_t by) { return (count + by - 1) / by; }

// How many parts the rows are cut into when `threads` threads share the work: every thread copies both of its sides, and
// this is least where its rectangle is closest to a square.
int64_t parts_of_rows(int64_t rows, int64_t columns, int64_t threads) {
  int64_t best = 1, least = -1;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    if (threads % parts != 0) continue;
    const int64_t copied = ceil_divide(rows, parts) + ceil_divide(columns, threads / parts);
    if (least < 0 || copied < least) best = parts, least = copied;
  }
  return best;
}

}  // namespace

void matrix_product_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  TORCH_CHECK_TYPE(
      out.scalar_type() == at::kFloat && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat, "the product of ",
      a.scalar_type(), " and ", b.scalar_type(), " into ", out.scalar_type(), ": expected float32");
  TORCH_CHECK_VALUE(
      out.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
      "the product of ", a.sizes(), " and ", b.sizes(), " into ", out.sizes(), ": the shapes do not go together");
  TORCH_CHECK_VALUE(out.stride(1) == 1 || out.size(1) <= 1, "the product's result has strides ", out.strides(), ": expected rows that are contiguous");
  MatrixProduct work{};
  work.a = a.const_data_ptr<float>();
  work.a_row = a.stride(0);
  work.a_step = a.stride(1);
  work.b = b.const_data_ptr<float>();
  work.b_step = b.stride(0);
  work.b_column = b.stride(1);
  work.c = out.mutable_data_ptr<float>();
  work.c_row = out.stride(0);
  work.steps = a.size(1);
  work.add = add;
  const int64_t rows = out.size(0), columns = out.size(1);
  if (work.steps == 0 && !add) out.zero_();
  if (rows == 0 || columns == 0 || work.steps == 0) return;
  const int64_t threads = at::get_num_threads(), down = parts_of_rows(rows, columns, threads), across = threads / down;
  // Whole tiles of the widest variant for every thread.
  const int64_t height = ceil_divide(ceil_divide(rows, down), 14) * 14, width = ceil_divide(ceil_divide(columns, across), 32) * 32;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const at::Tensor scratch = at::empty({MatrixProduct::kScratch}, at::kFloat);
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part / across * height, left = part % across * width;
      const int64_t end = std::min(begin + height, rows), right = std::min(left + width, columns);
      if (begin < end && left < right) table().matrix_product(work, begin, end, left, right, scratch.mutable_data_ptr<float>());
    }
  });
}

}  // namespace megatron_llm
