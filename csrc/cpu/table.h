// The CPU kernels as a table of functions over raw pointers, one table for each instruction set.
//
// Functions take plain pointers and a range of rows, elements or blocks, so that the operators (operators_*.cpp) split the
// work over torch's threads, and the same source compiles once for each instruction set without torch's headers.

#pragma once

#include <cstdint>

namespace megatron_llm {

// Types of elements; the value is the place in the tables below.
enum Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kElements = 3 };

// Rows of logits; `out` is [3, rows]: maximum, sum of exponentials, logit of the label.
struct SoftmaxRows {
  void* logits;
  int64_t stride;  // elements from row to row
  int64_t rows;
  int64_t columns;
  const int64_t* labels;
  int64_t first;  // vocabulary id of column 0
  int64_t valid;  // columns that are vocabulary ids; the others are padding
  const float* log_sum_exp;
  const float* scale;
  float* out;
};

// One AdamW update; see update_adamw.
struct AdamW {
  float* main;
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;
  void* rounded;
  float grad_scale;
  float decay;         // 1 - lr * weight_decay
  float average_step;  // 1 - beta1
  float beta2;
  float square_step;    // 1 - beta2
  float step_size;      // lr / (1 - beta1^step)
  float root_correction;  // sqrt(1 - beta2^step)
  float epsilon;
};

// Rows of RMSNorm; backward reads `grad` and `scale` and writes y, the gradient of x.
struct RmsNorm {
  const void* x;
  int64_t stride;  // elements from row to row of x; the other tensors are contiguous
  int64_t rows;
  int64_t columns;
  const void* weight;
  float epsilon;
  float* scale;  // 1 / root mean square of each row
  void* y;
  const void* grad;
  float* weight_sums;  // zeros, [blocks of rows, columns]
};

// Rows whose share of the weight's gradient is summed together.
constexpr int64_t kNormBlock = 64;

// x [s, b, heads, 2 * half] with any strides but the last, which is 1; y is contiguous.
struct Rotary {
  const void* x;
  void* y;
  int64_t batch;
  int64_t heads;
  int64_t half;
  int64_t stride_s;
  int64_t stride_b;
  int64_t stride_head;
  const float* cos;
  const float* sin;
  int64_t cos_stride_s;
  int64_t cos_stride_b;
  int64_t sin_stride_s;
  int64_t sin_stride_b;
  bool interleaved;
  float sign;  // of the angle: -1 turns back, which is the gradient
};

struct SwiGlu {
  const void* gate;
  const void* up;
  int64_t gate_stride;  // elements from row to row; the other tensors are contiguous
  int64_t up_stride;
  int64_t columns;
  const void* grad;
  void* out;  // backward: the gradients of gate and up, row by row one after the other
};

// Tokens whose attention is computed together, and the number that the features of a head are filled up to a multiple of.
constexpr int64_t kAttentionBlock = 32;

// A tensor [batch, heads, tokens, size] with any strides, in elements, but the last, which is 1.
struct HeadView {
  void* data;
  int64_t batch, head, token;
};

// Causal attention; the forward pass writes `out` and `log_sum_exp` [batch, heads, length], the backward pass reads them.
struct CausalAttention {
  HeadView query, key, value, out;
  HeadView grad, query_grad, key_grad, value_grad;
  float* log_sum_exp;
  int64_t heads;
  int64_t key_heads;
  int64_t length;
  int64_t padded;  // length rounded up to whole blocks
  int64_t features;
  int64_t size;  // features rounded up to whole blocks
  float scale;

  // Words of scratch memory that a thread needs, forward and backward.
  int64_t scratch() const { return 4 * padded * size + kAttentionBlock * (2 * padded + size); }
  int64_t scratch_backward() const { return 12 * padded * size + (5 * kAttentionBlock + 2) * padded; }
};

struct Table {
  const char* name;
  void (*softmax_statistics[kElements])(const SoftmaxRows&, int64_t begin, int64_t end);
  void (*softmax_gradient[kElements])(const SoftmaxRows&, int64_t begin, int64_t end);
  // [type of the gradient][type of the rounded copy; kFloat32: there is none]
  void (*adamw[kElements][kElements])(const AdamW&, int64_t begin, int64_t end);
  void (*accumulate[kElements])(float* total, const void* addend, int64_t count);
  void (*rms_norm[kElements])(const RmsNorm&, int64_t begin, int64_t end);
  void (*rms_norm_backward[kElements])(const RmsNorm&, int64_t begin, int64_t end);  // of blocks
  void (*rotary[kElements])(const Rotary&, int64_t begin, int64_t end);  // of tokens
  void (*swiglu[kElements])(const SwiGlu&, int64_t begin, int64_t end);
  void (*swiglu_backward[kElements])(const SwiGlu&, int64_t begin, int64_t end);
  void (*causal_attention[kElements])(const CausalAttention&, int64_t begin, int64_t end, uint32_t* scratch);
  void (*causal_attention_backward[kElements])(const CausalAttention&, int64_t begin, int64_t end, uint32_t* scratch);
};

const Table& baseline_table();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGATRON_LLM_X86_VARIANTS 1
const Table& avx2_table();
const Table& avx512_table();
const Table& avx512_bf16_table();
#endif

// The table in use: the best that the processor has, or what MEGATRON_LLM_CPU_CAPABILITY names.
const Table& table();
// Use another table from now on, by name; throws std::runtime_error when the processor lacks it. For tests and benchmarks.
void use_table(const char* name);

}  // namespace megatron_llm
