#include "reduce.h"

#define SHM_VARIANT baseline
#include "reduce_body.h"

namespace shm {
namespace {

ReduceFunction choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return avx2::reduce;
#endif
  return baseline::reduce;
}

}  // namespace

void reduce(Type type, Op op, const void* const* sources, int count, size_t elements, void* out, void* copy) {
  static const ReduceFunction chosen = choose();
  chosen(type, op, sources, count, elements, out, copy);
}

size_t size_of(Type type) {
  switch (type) {
    case Type::kDouble: case Type::kInt64: return 8;
    case Type::kFloat: case Type::kInt32: return 4;
    case Type::kHalf: case Type::kBFloat16: case Type::kInt16: return 2;
    default: return 1;
  }
}

bool reducible(Type type, Op op) {
  const bool real = type == Type::kFloat || type == Type::kDouble || type == Type::kHalf || type == Type::kBFloat16;
  if (op == Op::kAverage) return real;
  return !real || (op != Op::kAnd && op != Op::kOr && op != Op::kXor);
}

}  // namespace shm
