"""The C++ operators on activations as differentiable functions, with the signatures of `kernels.reference`.

Their gain is in eager execution, where the plain form is several passes over memory. Under torch.compile the plain form is
traced instead: the compiler fuses it with its neighbours. It also serves what the operators do not take: types other than
fp32, bf16 and fp16, and a weight of another type than its input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_llm.kernels import reference

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _plain(x: Tensor, other: Tensor) -> bool:
    """Whether the plain form serves."""
    return torch.compiler.is_compiling() or x.dtype not in _TYPES or x.dtype != other.dtype


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y: Tensor
        y, scale = torch.ops.megatron_llm.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_grad, weight_grad = torch.ops.megatron_llm.rms_norm_backward(grad, *ctx.saved_tensors)
        return x_grad, weight_grad, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        y: Tensor = torch.ops.megatron_llm.rotary(x, cos, sin, interleaved, False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.ops.megatron_llm.rotary(grad, cos, sin, ctx.interleaved, True), None, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = torch.ops.megatron_llm.swiglu(*x.chunk(2, dim=-1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x_grad: Tensor = torch.ops.megatron_llm.swiglu_backward(grad, *x.chunk(2, dim=-1))
        return x_grad


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension; statistics in fp32."""
    if _plain(x, weight):
        return reference.rms_norm(x, weight, epsilon)
    y: Tensor = _RmsNorm.apply(x, weight, epsilon)
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), half-split: `x` [S, B, heads, D], `cos`, `sin` fp32 [S, B or 1, 1, D / 2]."""
    if _plain(x, x):
        return reference.rotary(x, cos, sin)
    y: Tensor = _Rotary.apply(x, cos, sin, False)
    return y


def rotary_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding where element 2i is rotated with element 2i + 1; shapes as for `rotary`."""
    if _plain(x, x):
        return reference.rotary_interleaved(x, cos, sin)
    y: Tensor = _Rotary.apply(x, cos, sin, True)
    return y


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) x up (Shazeer 2020) of gate and up, the halves of `x` [..., 2 F]: [..., F], in one pass."""
    if _plain(x, x):
        return reference.swiglu(x)
    out: Tensor = _SwiGlu.apply(x)
    return out
