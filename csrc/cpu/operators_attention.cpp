// Operators of causal attention: the softmax between its two products.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "operators.h"

namespace megatron_llm {
namespace {

using Run = void (*)(const CausalSoftmax&, int64_t begin, int64_t end);

at::Tensor run_rows(Run run, CausalSoftmax work, const at::Tensor& scores, double scale, int64_t first, int64_t period) {
  TORCH_CHECK_VALUE(scores.dim() >= 2, "scores have ", scores.dim(), " dimensions: expected [..., rows, columns]");
  TORCH_CHECK_VALUE(scale > 0 && first >= 0 && period >= 1, "scale ", scale, ", first ", first, " and period ", period, " of the rows");
  TORCH_CHECK_VALUE(scores.size(-2) % period == 0, scores.size(-2), " rows are no multiple of the period ", period);
  at::Tensor out = at::empty_like(scores, at::MemoryFormat::Contiguous);
  work.scores = scores.const_data_ptr();
  work.out = out.mutable_data_ptr();
  work.columns = scores.size(-1);
  work.first = first;
  work.period = period;
  work.scale = static_cast<float>(scale);
  if (out.numel() == 0) return out;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (work.columns * scores.element_size()));
  at::parallel_for(0, scores.numel() / work.columns, grain, [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return out;
}

}  // namespace

at::Tensor causal_softmax(const at::Tensor& scores_, double scale, int64_t first, int64_t period) {
  const at::Tensor scores = scores_.contiguous();
  return run_rows(table().causal_softmax[element_of(scores, "scores")], CausalSoftmax{}, scores, scale, first, period);
}

at::Tensor causal_softmax_backward(const at::Tensor& grad_, const at::Tensor& weights_, double scale, int64_t first, int64_t period) {
  const at::Tensor grad = grad_.contiguous(), weights = weights_.contiguous();
  TORCH_CHECK_TYPE(grad.scalar_type() == weights.scalar_type(), "grad is ", grad.scalar_type(), ", weights are ", weights.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == weights.sizes(), "grad of shape ", grad.sizes(), " for weights of shape ", weights.sizes());
  CausalSoftmax work{};
  work.weights = weights.const_data_ptr();
  return run_rows(table().causal_softmax_backward[element_of(grad, "grad")], work, grad, scale, first, period);
}

}  // namespace megatron_llm
