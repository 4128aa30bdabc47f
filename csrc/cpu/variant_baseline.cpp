// The kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.

#include "table.h"

#define MEGATRON_LLM_VARIANT baseline
#define MEGATRON_LLM_NAME "baseline"
#define MEGATRON_LLM_LANES 4
#include "variant.h"

const megatron_llm::Table& megatron_llm::baseline_table() { return baseline::kTable; }
