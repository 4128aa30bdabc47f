// Operators of causal attention: each thread takes key heads, with the query heads that share them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "operators.h"

namespace megatron_llm {
namespace {

using Run = void (*)(const CausalAttention&, int64_t begin, int64_t end, uint32_t* scratch);

HeadView view_of(const at::Tensor& heads) {
  return {const_cast<void*>(heads.const_data_ptr()), heads.stride(0), heads.stride(1), heads.stride(2)};
}

at::Tensor rows_together(const at::Tensor& heads) {
  TORCH_CHECK_VALUE(heads.dim() == 4, heads.sizes(), " is the shape of a query, key or value: expected [batch, heads, tokens, size]");
  return heads.stride(3) == 1 ? heads : heads.contiguous();
}

// An empty tensor of the same shape [batch, heads, tokens, size] that lies as [tokens, batch, heads, size] in memory.
at::Tensor like_projection(const at::Tensor& x) {
  return at::empty({x.size(2), x.size(0), x.size(1), x.size(3)}, x.options()).permute({1, 2, 0, 3});
}

int64_t whole_blocks(int64_t count) { return (count + kAttentionBlock - 1) / kAttentionBlock * kAttentionBlock; }

CausalAttention attention_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale) {
  TORCH_CHECK_TYPE(
      query.scalar_type() == key.scalar_type() && key.scalar_type() == value.scalar_type(), "query, key and value are ",
      query.scalar_type(), ", ", key.scalar_type(), " and ", value.scalar_type(), ": expected one type");
  TORCH_CHECK_VALUE(key.sizes() == value.sizes(), "key of shape ", key.sizes(), " and value of shape ", value.sizes());
  TORCH_CHECK_VALUE(
      query.size(0) == key.size(0) && query.size(2) == key.size(2) && query.size(3) == key.size(3) && key.size(1) > 0 &&
          query.size(1) % key.size(1) == 0,
      "query of shape ", query.sizes(), " does not go with key of shape ", key.sizes());
  TORCH_CHECK_VALUE(scale > 0, "scale is ", scale, ": expected a positive number");
  CausalAttention work{};
  work.query = view_of(query);
  work.key = view_of(key);
  work.value = view_of(value);
  work.heads = query.size(1);
  work.key_heads = key.size(1);
  work.length = query.size(2);
  work.padded = whole_blocks(work.length);
  work.features = query.size(3);
  work.size = whole_blocks(work.features);
  work.scale = static_cast<float>(scale);
  return work;
}

void run_heads(Run run, const CausalAttention& work, int64_t batch, int64_t scratch) {
  if (work.length == 0 || work.features == 0) return;
  at::parallel_for(0, batch * work.key_heads, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor memory = at::empty({scratch}, at::kInt);
    run(work, begin, end, reinterpret_cast<uint32_t*>(memory.mutable_data_ptr<int32_t>()));
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> causal_attention(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, double scale) {
  const at::Tensor query = rows_together(query_), key = rows_together(key_), value = rows_together(value_);
  CausalAttention work = attention_of(query, key, value, scale);
  at::Tensor out = like_projection(query);
  at::Tensor log_sum_exp = at::empty({query.size(0), work.heads, work.length}, query.options().dtype(at::kFloat));
  work.out = view_of(out);
  work.log_sum_exp = log_sum_exp.mutable_data_ptr<float>();
  run_heads(table().causal_attention[element_of(query, "query")], work, query.size(0), work.scratch());
  return {out, log_sum_exp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_attention_backward(
    const at::Tensor& grad_,
    const at::Tensor& query_,
    const at::Tensor& key_,
    const at::Tensor& value_,
    const at::Tensor& out_,
    const at::Tensor& log_sum_exp_,
    double scale) {
  const at::Tensor query = rows_together(query_), key = rows_together(key_), value = rows_together(value_);
  const at::Tensor grad = rows_together(grad_), out = rows_together(out_), log_sum_exp = log_sum_exp_.contiguous();
  CausalAttention work = attention_of(query, key, value, scale);
  TORCH_CHECK_VALUE(
      grad.sizes() == query.sizes() && out.sizes() == query.sizes(), "grad of shape ", grad.sizes(), " and out of shape ", out.sizes(),
      " for query of shape ", query.sizes());
  TORCH_CHECK_TYPE(
      grad.scalar_type() == query.scalar_type() && out.scalar_type() == query.scalar_type(), "grad is ", grad.scalar_type(), ", query is ",
      query.scalar_type());
  TORCH_CHECK_VALUE(
      log_sum_exp.scalar_type() == at::kFloat && log_sum_exp.numel() == query.size(0) * work.heads * work.length,
      "log_sum_exp of shape ", log_sum_exp.sizes(), " for query of shape ", query.sizes());
  at::Tensor query_grad = like_projection(query), key_grad = like_projection(key), value_grad = like_projection(value);
  work.grad = view_of(grad);
  work.out = view_of(out);
  work.query_grad = view_of(query_grad);
  work.key_grad = view_of(key_grad);
  work.value_grad = view_of(value_grad);
  work.log_sum_exp = const_cast<float*>(log_sum_exp.const_data_ptr<float>());
  run_heads(table().causal_attention_backward[element_of(query, "query")], work, query.size(0), work.scratch_backward());
  return {query_grad, key_grad, value_grad};
}

}  // namespace megatron_llm
