"""Which arithmetic multiplies matrices, and the three products of a linear layer in it: forward, input's, weight's gradient.

`torch` leaves them to torch. `fp8` rounds both sides to 8 bits (`kernels.fp8`). `onednn` takes, for large fp32 matrices on the
CPU, the other of torch's two libraries: torch multiplies fp32 by MKL, which on AMD processors with AVX-512 computes with
narrower vectors than they have. In bf16 torch itself takes oneDNN.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels import fp8
from megatron_llm.kernels.fp8 import E5M2, Scaled, scaled

Products = Literal["torch", "onednn", "fp8"]

# Multiplications from which on oneDNN is ahead: below, what it does before each product weighs too much.
_LARGE = 2**24


def onednn_multiplies_faster() -> bool:
    """Whether oneDNN is quicker than MKL at large fp32 matrices on this processor: an AMD one with AVX-512."""
    processor = Path("/proc/cpuinfo")
    maker = processor.read_text() if processor.exists() else ""
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def multiply(a: Tensor, b: Tensor, products: Products) -> Tensor:
    """a b of `a` [M, K] and `b` [K, N], in one of the arithmetics that round nothing but the result."""
    if _is_onednns(a, b.shape[1], products):
        return _by_onednn(a, b.t(), None)
    return a @ b


def multiply_into(out: Tensor, a: Tensor, b: Tensor, products: Products, *, add: bool = False) -> Tensor:
    """`out` [M, N] = a b, or with `add` the sum of both; returned."""
    if add:
        return out.addmm_(a, b)
    if _is_onednns(a, b.shape[1], products):
        return out.copy_(_by_onednn(a, b.t(), None))  # it has no form that writes into a tensor
    return torch.mm(a, b, out=out)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of `x` [..., K] and `weight` [N, K] by the operator that torch's compiler has for it; without a gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _is_onednns(a: Tensor, columns: int, products: Products) -> bool:
    """Whether `a` [..., K] times [K, columns] is oneDNN's: a large product in fp32 of a left side that lies row by row. Where
    it lies column by column, as in a weight's gradient, MKL is the faster one."""
    large = a.dtype == torch.float32 and a.numel() * columns >= _LARGE and a.is_contiguous()
    return products == "onednn" and large and not torch.compiler.is_compiling()


def left_to_torch(x: Tensor, weight: Tensor, products: Products) -> bool:
    """Whether a layer of this input [..., in] and weight [out, in] is torch's, forward and backward."""
    return products != "fp8" and not _is_onednns(x, weight.shape[0], products)


def forward_product(x: Tensor, weight: Tensor, bias: Tensor | None, products: Products) -> Tensor:
    """x W^T + b, [..., in] to [..., out]."""
    if left_to_torch(x, weight, products):
        return F.linear(x, weight, bias)
    if products == "onednn":
        return _by_onednn(x, weight, bias)
    y = fp8.forward_product(x, weight)
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
