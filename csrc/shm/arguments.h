// What a call may be given: tensors in CPU memory, of types and sizes that fit; errors are sentences.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <vector>

#include "reduce.h"

namespace shm {

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kDouble: return Type::kDouble;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kChar: return Type::kInt8;
    case at::kByte: return Type::kUInt8;
    case at::kShort: return Type::kInt16;
    case at::kInt: return Type::kInt32;
    case at::kLong: return Type::kInt64;
    case at::kBool: return Type::kBool;
    default: TORCH_CHECK_TYPE(false, "shm: cannot reduce tensors of type ", tensor.scalar_type());
  }
}

inline Op operation(const c10d::ReduceOp& reduce, const at::Tensor& tensor) {
  Op op = Op::kSum;
  switch (reduce.op_) {
    case c10d::ReduceOp::SUM: op = Op::kSum; break;
    case c10d::ReduceOp::AVG: op = Op::kAverage; break;
    case c10d::ReduceOp::PRODUCT: op = Op::kProduct; break;
    case c10d::ReduceOp::MIN: op = Op::kMin; break;
    case c10d::ReduceOp::MAX: op = Op::kMax; break;
    case c10d::ReduceOp::BAND: op = Op::kAnd; break;
    case c10d::ReduceOp::BOR: op = Op::kOr; break;
    case c10d::ReduceOp::BXOR: op = Op::kXor; break;
    default: TORCH_CHECK_VALUE(false, "shm: unknown reduction");
  }
  TORCH_CHECK_TYPE(reducible(type_of(tensor), op), "shm: this reduction is not defined for tensors of type ", tensor.scalar_type());
  return op;
}

inline void check(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && tensor.device().is_cpu(), "shm: needs dense tensors in CPU memory, got ", tensor.toString());
}

inline void check_one(const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK_VALUE(tensors.size() == 1, "shm: one tensor a rank, got ", tensors.size());
  check(tensors[0]);
}

template <class Lists>
void check_list(const Lists& list, int size, const at::Tensor& like, const char* what) {
  TORCH_CHECK_VALUE(static_cast<int>(list.size()) == size, "shm: ", what, " needs a list of ", size, " tensors, got ", list.size());
  for (const at::Tensor& tensor : list) {
    check(tensor);
    TORCH_CHECK_VALUE(
        tensor.numel() == like.numel() && tensor.scalar_type() == like.scalar_type(), "shm: ", what,
        " needs tensors of one size and type, got ", tensor.sizes(), " ", tensor.scalar_type(), " and ", like.sizes(), " ", like.scalar_type());
  }
}

inline char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

// A tensor's elements in one piece: itself, or a copy that `give_back` writes into it.
struct Dense {
  explicit Dense(const at::Tensor& tensor) : original(tensor), own(tensor.contiguous()) {}
  void give_back() const {
    if (!own.is_same(original)) original.copy_(own);
  }
  at::Tensor original, own;
};

}  // namespace shm
