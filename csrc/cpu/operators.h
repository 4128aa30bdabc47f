// The operators that library.cpp registers, and what they share.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "table.h"

namespace megatron_llm {

// Bytes of work below which another thread costs more than it brings.
constexpr int64_t kGrainBytes = 1 << 16;

inline Element element_of(const at::Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_TYPE(false, what, " has type ", tensor.scalar_type(), ": expected float32, bfloat16 or float16");
  }
}

at::Tensor softmax_statistics(const at::Tensor& logits, const at::Tensor& labels, int64_t first, int64_t valid);
void softmax_gradient_(
    at::Tensor& logits, const at::Tensor& labels, const at::Tensor& log_sum_exp, const at::Tensor& scale, int64_t first, int64_t valid);
void adamw_(
    at::Tensor& main,
    at::Tensor& exp_avg,
    at::Tensor& exp_avg_sq,
    const at::Tensor& grad,
    const std::optional<at::Tensor>& rounded,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    int64_t step,
    double grad_scale);
void accumulate_(at::Tensor& total, const at::Tensor& addend, bool overwrite);
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale);
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved, bool backward);
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up);
std::tuple<at::Tensor, at::Tensor> causal_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_attention_backward(
    const at::Tensor& grad,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& out,
    const at::Tensor& log_sum_exp,
    double scale);

}  // namespace megatron_llm
