// The kernels for AVX-512 with products of bf16, as servers have had it since 2020.

#include "table.h"

#ifdef MEGATRON_LLM_X86_VARIANTS
#include <immintrin.h>

// The compiler's own header passes undefined operands where all lanes are written, and its warnings about them follow inlining.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define MEGATRON_LLM_VARIANT avx512_bf16
#define MEGATRON_LLM_BF16_PRODUCTS
#define MEGATRON_LLM_NAME "avx512_bf16"
#define MEGATRON_LLM_LANES 16
#include "variant.h"

const megatron_llm::Table& megatron_llm::avx512_bf16_table() { return avx512_bf16::kTable; }
#endif
