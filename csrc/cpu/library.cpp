// Registration of the CPU operators in torch's dispatcher: torch.ops.megatron_llm.*. Python loads the library by
// torch.ops.load_library; there is no Python module.

#include <torch/library.h>
#include <torch/version.h>

#include "operators.h"

namespace megatron_llm {
namespace {

std::string built_for() { return TORCH_VERSION; }

std::string cpu_capability() { return table().name; }

void use_cpu_capability(const std::string& name) { use_table(name.c_str()); }

}  // namespace
}  // namespace megatron_llm

TORCH_LIBRARY(megatron_llm, m) {
  m.def("built_for() -> str", &megatron_llm::built_for);
  m.def("cpu_capability() -> str", &megatron_llm::cpu_capability);
  m.def("use_cpu_capability(str name) -> ()", &megatron_llm::use_cpu_capability);
  m.def("softmax_statistics(Tensor logits, Tensor labels, int first, int valid) -> Tensor");
  m.def("softmax_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_sum_exp, Tensor scale, int first, int valid) -> ()");
  m.def(
      "adamw_(Tensor(a!) main, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor(d!)? rounded, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, int step, float grad_scale) -> ()");
  m.def("accumulate_(Tensor(a!) total, Tensor addend, bool overwrite) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool backward) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> Tensor");
  m.def("causal_attention(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sum_exp, float scale) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_llm, CPU, m) {
  m.impl("softmax_statistics", &megatron_llm::softmax_statistics);
  m.impl("softmax_gradient_", &megatron_llm::softmax_gradient_);
  m.impl("adamw_", &megatron_llm::adamw_);
  m.impl("accumulate_", &megatron_llm::accumulate_);
  m.impl("rms_norm", &megatron_llm::rms_norm);
  m.impl("rms_norm_backward", &megatron_llm::rms_norm_backward);
  m.impl("rotary", &megatron_llm::rotary);
  m.impl("swiglu", &megatron_llm::swiglu);
  m.impl("swiglu_backward", &megatron_llm::swiglu_backward);
  m.impl("causal_attention", &megatron_llm::causal_attention);
  m.impl("causal_attention_backward", &megatron_llm::causal_attention_backward);
}
