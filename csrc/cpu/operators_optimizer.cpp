// Operators on flat buffers: AdamW, sums of squares, accumulation of gradients.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "operators.h"

namespace megatron_llm {
namespace {

constexpr int64_t kUnit = 64;  // elements; threads begin at multiples of it, so that no cache line is shared

void check_flat(const at::Tensor& tensor, const char* what, int64_t count) {
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.numel() == count, what, " must be contiguous and have ", count, " elements");
}

// `run` over [0, count) on torch's threads, in ranges that begin at multiples of kUnit.
template <typename Run>
void in_units(int64_t count, int64_t bytes_each, const Run& run) {
  const int64_t units = (count + kUnit - 1) / kUnit;
  at::parallel_for(0, units, std::max<int64_t>(1, kGrainBytes / (kUnit * bytes_each)), [&](int64_t begin, int64_t end) {
    run(begin * kUnit, std::min(count, end * kUnit));
  });
}

}  // namespace

void adamw_(
    at::Tensor& main,
    at::Tensor& exp_avg,
    at::Tensor& exp_avg_sq,
    const at::Tensor& grad_,
    const std::optional<at::Tensor>& rounded,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    int64_t step,
    double grad_scale) {
  const int64_t count = main.numel();
  const at::Tensor grad = grad_.contiguous();
  check_flat(main, "main", count);
  check_flat(exp_avg, "exp_avg", count);
  check_flat(exp_avg_sq, "exp_avg_sq", count);
  check_flat(grad, "grad", count);
  TORCH_CHECK_VALUE(step >= 1, "step is ", step, ": the first update is step 1");
  Element type = kFloat32;
  if (rounded.has_value()) {
    check_flat(*rounded, "rounded", count);
    type = element_of(*rounded, "rounded");
    TORCH_CHECK_TYPE(type != kFloat32, "rounded is float32: the rounded copy has 16 bits");
  }
  AdamW work{};
  work.main = main.mutable_data_ptr<float>();
  work.exp_avg = exp_avg.mutable_data_ptr<float>();
  work.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  work.grad = grad.const_data_ptr();
  work.rounded = rounded.has_value() ? rounded->mutable_data_ptr() : nullptr;
  work.grad_scale = static_cast<float>(grad_scale);
  work.decay = static_cast<float>(1 - lr * weight_decay);
  work.average_step = static_cast<float>(1 - beta1);
  work.beta2 = static_cast<float>(beta2);
  work.square_step = static_cast<float>(1 - beta2);
  work.step_size = static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step))));
  work.root_correction = static_cast<float>(std::sqrt(1 - std::pow(beta2, static_cast<double>(step))));
  work.epsilon = static_cast<float>(eps);
  const auto run = table().adamw[element_of(grad, "grad")][type];
  in_units(count, 28, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

void accumulate_(at::Tensor& total, const at::Tensor& addend, bool overwrite) {
  TORCH_CHECK_VALUE(total.sizes() == addend.sizes(), "an addend of shape ", addend.sizes(), " for a total of shape ", total.sizes());
  TORCH_CHECK_TYPE(total.scalar_type() == at::kFloat, "the total has type ", total.scalar_type(), ": expected float32");
  const Element type = element_of(addend, "the addend");
  const int64_t size = addend.element_size();
  const auto* from = static_cast<const char*>(addend.const_data_ptr());
  // Copies, and sums of fp32, are at the memory's speed in torch.
  if (total.is_contiguous() && addend.is_contiguous() && !overwrite && type != kFloat32) {
    float* to = total.mutable_data_ptr<float>();
    const auto run = table().accumulate[type];
    in_units(total.numel(), 8 + size, [&](int64_t begin, int64_t end) { run(to + begin, from + begin * size, end - begin); });
  } else if (overwrite) {
    total.copy_(addend);
  } else {
    total.add_(addend);
  }
}

}  // namespace megatron_llm
