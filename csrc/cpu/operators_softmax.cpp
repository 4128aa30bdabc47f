// Operators of the cross-entropy: statistics of rows of logits, and the gradient in their place.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "operators.h"

namespace megatron_llm {
namespace {

void check_rows(const at::Tensor& logits, const at::Tensor& labels, int64_t valid) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits have ", logits.dim(), " dimensions: expected [rows, columns]");
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels have type ", labels.scalar_type(), ": expected int64");
  TORCH_CHECK_VALUE(
      labels.dim() == 1 && labels.size(0) == logits.size(0), "labels of shape ", labels.sizes(), " for logits of shape ", logits.sizes());
  TORCH_CHECK_VALUE(0 <= valid && valid <= logits.size(1), valid, " valid columns of ", logits.size(1));
}

// Rows may lie apart (a slice of a larger buffer), but the columns of one lie together.
bool has_rows(const at::Tensor& logits) { return logits.stride(1) == 1 || logits.size(1) <= 1; }

int64_t grain(const at::Tensor& logits) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, logits.size(1) * logits.element_size()));
}

}  // namespace

at::Tensor softmax_statistics(const at::Tensor& logits_, const at::Tensor& labels_, int64_t first, int64_t valid) {
  check_rows(logits_, labels_, valid);
  const at::Tensor logits = has_rows(logits_) ? logits_ : logits_.contiguous(), labels = labels_.contiguous();
  const int64_t rows = logits.size(0);
  at::Tensor out = at::empty({3, rows}, logits.options().dtype(at::kFloat));
  SoftmaxRows work{};
  work.logits = const_cast<void*>(logits.const_data_ptr());
  work.stride = logits.stride(0);
  work.rows = rows;
  work.columns = logits.size(1);
  work.labels = labels.const_data_ptr<int64_t>();
  work.first = first;
  work.valid = valid;
  work.out = out.mutable_data_ptr<float>();
  const auto run = table().softmax_statistics[element_of(logits, "logits")];
  at::parallel_for(0, rows, grain(logits), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return out;
}

void softmax_gradient_(
    at::Tensor& logits_, const at::Tensor& labels_, const at::Tensor& log_sum_exp_, const at::Tensor& scale_, int64_t first, int64_t valid) {
  check_rows(logits_, labels_, valid);
  const at::Tensor labels = labels_.contiguous(), log_sum_exp = log_sum_exp_.contiguous(), scale = scale_.contiguous();
  for (const at::Tensor& each : {log_sum_exp, scale}) {
    TORCH_CHECK_TYPE(each.scalar_type() == at::kFloat, "log_sum_exp and scale are float32, not ", each.scalar_type());
    TORCH_CHECK_VALUE(each.sizes() == labels.sizes(), "log_sum_exp and scale have one value for each row, not shape ", each.sizes());
  }
  const at::Tensor logits = has_rows(logits_) ? logits_ : logits_.contiguous();
  SoftmaxRows work{};
  work.logits = logits.mutable_data_ptr();
  work.stride = logits.stride(0);
  work.rows = logits.size(0);
  work.columns = logits.size(1);
  work.labels = labels.const_data_ptr<int64_t>();
  work.first = first;
  work.valid = valid;
  work.log_sum_exp = log_sum_exp.const_data_ptr<float>();
  work.scale = scale.const_data_ptr<float>();
  const auto run = table().softmax_gradient[element_of(logits, "logits")];
  at::parallel_for(0, work.rows, grain(logits), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  if (!logits.is_same(logits_)) logits_.copy_(logits);
}

}  // namespace megatron_llm
