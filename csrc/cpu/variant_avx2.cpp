// The kernels for AVX2 with fused multiply-add and half-precision conversions.

#include "table.h"

#ifdef MEGATRON_LLM_X86_VARIANTS
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")
#define MEGATRON_LLM_VARIANT avx2
#define MEGATRON_LLM_NAME "avx2"
#define MEGATRON_LLM_LANES 8
#include "variant.h"

const megatron_llm::Table& megatron_llm::avx2_table() { return avx2::kTable; }
#endif
