#include "reduce.h"

// The same source for processors with 256-bit vectors; no fused multiply-add, so results are those of the baseline.
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define SHM_VARIANT avx2
#include "reduce_body.h"
#endif
