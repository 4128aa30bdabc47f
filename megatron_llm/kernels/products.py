"""Which arithmetic multiplies matrices, and the three products of a linear layer in it: forward, input's, weight's gradient.

`torch` leaves them to torch. `fp8` rounds both sides to 8 bits (`kernels.fp8`). `fused` takes the C++ product of csrc/cpu/ for
large fp32 matrices and torch for all else: on AMD processors with AVX-512, torch's own library computes with narrower
vectors than the processor has. In bf16 it does not, and so there is no product of ours for that.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels import fp8
from megatron_llm.kernels.fp8 import E5M2, Scaled, scaled

Products = Literal["torch", "fused", "fp8"]

# Multiplications from which on the C++ product is ahead of torch's: below, copying both sides weighs too much.
_LARGE = 2**24


def multiply(a: Tensor, b: Tensor, products: Products) -> Tensor:
    """a b of `a` [M, K] and `b` [K, N], in one of the arithmetics that round nothing but the result."""
    if products == "fused" and _is_ours(a, a.shape[0] * a.shape[1] * b.shape[1]):
        return multiply_into(a.new_empty((a.shape[0], b.shape[1])), a, b, products)
    return a @ b


def multiply_into(out: Tensor, a: Tensor, b: Tensor, products: Products, *, add: bool = False) -> Tensor:
    """`out` [M, N] = a b, or with `add` the sum of both; returned."""
    if products == "fused" and _is_ours(a, a.shape[0] * a.shape[1] * b.shape[1]):
        torch.ops.megatron_llm.matrix_product_(out, a, b, add)
        return out
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def _is_ours(a: Tensor, multiplications: int) -> bool:
    return a.dtype == torch.float32 and multiplications >= _LARGE and not torch.compiler.is_compiling()


def left_to_torch(x: Tensor, weight: Tensor, products: Products) -> bool:
    """Whether a layer of this input [..., in] and weight [out, in] is torch's, forward and backward."""
    return products == "torch" or products == "fused" and not _is_ours(x, x.numel() * weight.shape[0])


def forward_product(x: Tensor, weight: Tensor, bias: Tensor | None, products: Products) -> Tensor:
    """x W^T + b, [..., in] to [..., out]."""
    if left_to_torch(x, weight, products):
        return F.linear(x, weight, bias)
    if products == "fp8":
        y = fp8.forward_product(x, weight)
    else:
        y = multiply(x.flatten(0, -2), weight.t(), products).view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)


def operand(gradient: Tensor, products: Products) -> Tensor | Scaled:
    """An output's gradient as the two products of the backward take it: in 8 bits where they are."""
    return scaled(gradient, E5M2) if products == "fp8" else gradient.contiguous()


def input_gradient(gradient: Tensor | Scaled, weight: Tensor, products: Products) -> Tensor:
    """dy W, [..., out] to [..., in]; `gradient` is an `operand`."""
    if isinstance(gradient, Scaled):
        return fp8.input_product(gradient, weight)
    return multiply(gradient.flatten(0, -2), weight, products).view(*gradient.shape[:-1], -1)


@torch.no_grad()
def weight_gradient(source: Tensor | Scaled, gradient: Tensor | Scaled, products: Products) -> Tensor:
    """dy^T x, [out, in] from a layer's input [..., in] and its output's gradient [..., out], an `operand`."""
    if isinstance(gradient, Scaled):
        return fp8.weight_product(gradient, source)
    assert not isinstance(source, Scaled), "a layer's products are all in 8 bits or none is"
    return multiply(gradient.flatten(0, -2).t(), source.flatten(0, -2), products)
