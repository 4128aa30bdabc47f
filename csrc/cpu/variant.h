// The kernels of one instruction set. The including source defines MEGATRON_LLM_VARIANT (the name) and MEGATRON_LLM_LANES
// (floats in a vector), and has chosen the instruction set by a pragma.

namespace megatron_llm {
namespace MEGATRON_LLM_VARIANT {

#include "vectors.h"

#include "softmax.h"

#include "optimizer.h"

#include "layers.h"

#include "attention.h"

#define OF_EACH(kernel) {kernel<Float32>, kernel<BFloat16>, kernel<Float16>}

static const Table kTable = {
    MEGATRON_LLM_NAME,
    OF_EACH(softmax_statistics),
    OF_EACH(softmax_gradient),
    {{adamw<Float32, Float32>, adamw<Float32, ExactBFloat16>, adamw<Float32, Float16>},
     {adamw<BFloat16, Float32>, adamw<BFloat16, ExactBFloat16>, adamw<BFloat16, Float16>},
     {adamw<Float16, Float32>, adamw<Float16, ExactBFloat16>, adamw<Float16, Float16>}},
    OF_EACH(accumulate),
    OF_EACH(rms_norm),
    OF_EACH(rms_norm_backward),
    OF_EACH(rotary),
    OF_EACH(swiglu),
    OF_EACH(swiglu_backward),
    OF_EACH(causal_attention),
    OF_EACH(causal_attention_backward),
};

}  // namespace MEGATRON_LLM_VARIANT
}  // namespace megatron_llm
