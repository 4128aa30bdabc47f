// Elementwise reductions over the contributions of several ranks, in rank order and rounded once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shm {

enum class Type : uint8_t { kFloat, kDouble, kHalf, kBFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64, kBool };
enum class Op : uint8_t { kSum, kAverage, kProduct, kMin, kMax, kAnd, kOr, kXor };

size_t size_of(Type type);

// out[i] = sources[0][i] op sources[1][i] op ...; 16-bit floats are added in fp32 and rounded once, to nearest even. kAverage
// divides the sum by the number of sources before it is rounded. The result also goes to `copy` when that is not null. `out`
// and `copy` may each be one of the sources. kMin and kMax give NaN when any contribution is NaN.
void reduce(Type type, Op op, const void* const* sources, int count, size_t elements, void* out, void* copy);

// Whether this operation is defined for this type: averages are for floats, bitwise operations for integers.
bool reducible(Type type, Op op);

using ReduceFunction = void (*)(Type, Op, const void* const*, int, size_t, void*, void*);
namespace baseline {
void reduce(Type type, Op op, const void* const* sources, int count, size_t elements, void* out, void* copy);
}
#if defined(__x86_64__)
namespace avx2 {
void reduce(Type type, Op op, const void* const* sources, int count, size_t elements, void* out, void* copy);
}
#endif

}  // namespace shm
