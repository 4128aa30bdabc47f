// Operators on activations: RMSNorm, rotary position embedding, SwiGLU; each forward and backward.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "operators.h"

namespace megatron_llm {
namespace {

int64_t grain(int64_t bytes_each) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_each)); }

// [..., columns] as rows at one distance from each other: a view where there is one, else a copy.
at::Tensor as_rows(const at::Tensor& x) {
  const int64_t columns = x.size(-1);
  const int64_t rows = columns == 0 ? 0 : x.numel() / columns;
  if (x.stride(-1) == 1 || columns == 1) {
    // The dimensions before the last are one dimension when each steps over the whole of the next.
    int64_t stride = 0, span = 0;
    bool regular = true;
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (stride == 0)
        stride = span = x.stride(d);
      else
        regular = regular && x.stride(d) == span;
      span *= x.size(d);
    }
    if (regular) return x.as_strided({rows, columns}, {stride == 0 ? columns : stride, 1});
  }
  return x.contiguous().view({rows, columns});
}

at::Tensor contiguous_like(const at::Tensor& x) { return at::empty(x.sizes(), x.options()); }

void check_same(const at::Tensor& one, const at::Tensor& other, const char* what) {
  TORCH_CHECK_TYPE(one.scalar_type() == other.scalar_type(), what, ": types ", one.scalar_type(), " and ", other.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight_, double epsilon) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight_.dim() == 1 && weight_.size(0) == x.size(-1), "x ", x.sizes(), ", weight ", weight_.sizes());
  check_same(x, weight_, "x and weight");
  const at::Tensor rows = as_rows(x), weight = weight_.contiguous();
  at::Tensor y = contiguous_like(x), scale = at::empty({rows.size(0)}, x.options().dtype(at::kFloat));
  RmsNorm work{};
  work.x = rows.const_data_ptr();
  work.stride = rows.stride(0);
  work.rows = rows.size(0);
  work.columns = rows.size(1);
  work.weight = weight.const_data_ptr();
  work.epsilon = static_cast<float>(epsilon);
  work.scale = scale.mutable_data_ptr<float>();
  work.y = y.mutable_data_ptr();
  const auto run = table().rms_norm[element_of(x, "x")];
  at::parallel_for(0, work.rows, grain(work.columns * x.element_size()), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return {y, scale};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& grad_, const at::Tensor& x, const at::Tensor& weight_, const at::Tensor& scale) {
  TORCH_CHECK_VALUE(grad_.sizes() == x.sizes(), "a gradient of shape ", grad_.sizes(), " for x of shape ", x.sizes());
  check_same(x, grad_, "x and its gradient");
  const at::Tensor rows = as_rows(x), weight = weight_.contiguous(), grad = grad_.contiguous();
  const int64_t blocks = (rows.size(0) + kNormBlock - 1) / kNormBlock;
  at::Tensor out = contiguous_like(x), sums = at::zeros({blocks, rows.size(1)}, x.options().dtype(at::kFloat));
  RmsNorm work{};
  work.x = rows.const_data_ptr();
  work.stride = rows.stride(0);
  work.rows = rows.size(0);
  work.columns = rows.size(1);
  work.weight = weight.const_data_ptr();
  work.scale = const_cast<float*>(scale.const_data_ptr<float>());
  work.y = out.mutable_data_ptr();
  work.grad = grad.const_data_ptr();
  work.weight_sums = sums.mutable_data_ptr<float>();
  const auto run = table().rms_norm_backward[element_of(x, "x")];
  const int64_t bytes = kNormBlock * work.columns * x.element_size();
  at::parallel_for(0, blocks, grain(bytes), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return {out, sums.sum(0).to(weight.scalar_type())};
}

at::Tensor rotary(const at::Tensor& x_, const at::Tensor& cos_, const at::Tensor& sin_, bool interleaved, bool backward) {
  TORCH_CHECK_VALUE(x_.dim() == 4 && x_.size(3) % 2 == 0, "x of shape ", x_.sizes(), ": expected [S, B, heads, even D]");
  const at::Tensor x = x_.stride(3) == 1 ? x_ : x_.contiguous();
  const at::Tensor cos = cos_.stride(-1) == 1 ? cos_ : cos_.contiguous(), sin = sin_.stride(-1) == 1 ? sin_ : sin_.contiguous();
  for (const at::Tensor& each : {cos, sin}) {
    TORCH_CHECK_TYPE(each.scalar_type() == at::kFloat, "cos and sin are float32, not ", each.scalar_type());
    TORCH_CHECK_VALUE(
        each.dim() == 4 && each.size(0) == x.size(0) && (each.size(1) == x.size(1) || each.size(1) == 1) && each.size(2) == 1 &&
            each.size(3) == x.size(3) / 2,
        "cos and sin of shape ", each.sizes(), " for x of shape ", x.sizes(), ": expected [S, B or 1, 1, D / 2]");
  }
  at::Tensor y = contiguous_like(x);
  Rotary work{};
  work.x = x.const_data_ptr();
  work.y = y.mutable_data_ptr();
  work.batch = x.size(1);
  work.heads = x.size(2);
  work.half = x.size(3) / 2;
  work.stride_s = x.stride(0);
  work.stride_b = x.stride(1);
  work.stride_head = x.stride(2);
  work.cos = cos.const_data_ptr<float>();
  work.sin = sin.const_data_ptr<float>();
  work.cos_stride_s = cos.stride(0);
  work.cos_stride_b = cos.size(1) == 1 ? 0 : cos.stride(1);
  work.sin_stride_s = sin.stride(0);
  work.sin_stride_b = sin.size(1) == 1 ? 0 : sin.stride(1);
  work.interleaved = interleaved;
  work.sign = backward ? -1.0f : 1.0f;
  const auto run = table().rotary[element_of(x, "x")];
  const int64_t bytes = x.size(2) * x.size(3) * x.element_size();
  at::parallel_for(0, x.size(0) * x.size(1), grain(bytes), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return y;
}

at::Tensor swiglu(const at::Tensor& gate_, const at::Tensor& up_) {
  TORCH_CHECK_VALUE(gate_.dim() >= 1 && gate_.sizes() == up_.sizes(), "gate ", gate_.sizes(), ", up ", up_.sizes());
  check_same(gate_, up_, "gate and up");
  const at::Tensor gate = as_rows(gate_), up = as_rows(up_);
  at::Tensor out = contiguous_like(gate_);
  SwiGlu work{};
  work.gate = gate.const_data_ptr();
  work.up = up.const_data_ptr();
  work.gate_stride = gate.stride(0);
  work.up_stride = up.stride(0);
  work.columns = gate.size(1);
  work.out = out.mutable_data_ptr();
  const auto run = table().swiglu[element_of(gate, "gate")];
  const int64_t bytes = work.columns * gate.element_size();
  at::parallel_for(0, gate.size(0), grain(bytes), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return out;
}

at::Tensor swiglu_backward(const at::Tensor& grad_, const at::Tensor& gate_, const at::Tensor& up_) {
  TORCH_CHECK_VALUE(
      gate_.dim() >= 1 && gate_.sizes() == up_.sizes() && grad_.sizes() == up_.sizes(), "gate ", gate_.sizes(), ", up ", up_.sizes());
  check_same(gate_, up_, "gate and up");
  check_same(gate_, grad_, "gate and the gradient");
  const at::Tensor gate = as_rows(gate_), up = as_rows(up_), grad = grad_.contiguous();
  std::vector<int64_t> sizes = gate_.sizes().vec();
  sizes.back() *= 2;
  at::Tensor out = at::empty(sizes, gate_.options());
  SwiGlu work{};
  work.gate = gate.const_data_ptr();
  work.up = up.const_data_ptr();
  work.gate_stride = gate.stride(0);
  work.up_stride = up.stride(0);
  work.columns = gate.size(1);
  work.grad = grad.const_data_ptr();
  work.out = out.mutable_data_ptr();
  const auto run = table().swiglu_backward[element_of(gate, "gate")];
  const int64_t bytes = 2 * work.columns * gate.element_size();
  at::parallel_for(0, gate.size(0), grain(bytes), [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return out;
}

}  // namespace megatron_llm
