"""SwiGLU, forward and backward: the activation is computed in fp32, and again in the backward instead of kept."""

from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels.triton.language import (
    NAMESPACE,
    Pointer,
    Scalar,
    as_rows,
    constexpr,
    divide_up,
    jit,
    on_device_of,
    require_triton,
    tl,
)

_BLOCK = 1024


@jit
def swiglu_forward_kernel(
    gate: "Pointer", up: "Pointer", y: "Pointer", columns: "Scalar", gate_stride: "Scalar", up_stride: "Scalar", BLOCK: constexpr
) -> None:
    """y = gate x sigmoid(gate) x up, y contiguous; program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    a = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@jit
def swiglu_backward_kernel(
    grad: "Pointer",
    gate: "Pointer",
    up: "Pointer",
    grad_gate: "Pointer",
    grad_up: "Pointer",
    columns: "Scalar",
    grad_stride: "Scalar",
    gate_stride: "Scalar",
    up_stride: "Scalar",
    BLOCK: constexpr,
) -> None:
    """Gradients of gate and up, contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    out = row * columns + column
    tl.store(grad_up + out, (g * silu).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate + out, (g * b * (sigmoid + silu * (1.0 - sigmoid))).to(grad_gate.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        a, b = as_rows(gate), as_rows(up)
        rows, columns = a.shape
        with on_device_of(gate):
            swiglu_forward_kernel[(rows, divide_up(columns, _BLOCK))](a, b, y, columns, a.stride(0), b.stride(0), BLOCK=_BLOCK)
    return y


@_swiglu.register_fake
def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op(f"{NAMESPACE}::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        g, a, b = as_rows(grad), as_rows(gate), as_rows(up)
        rows, columns = a.shape
        strides = g.stride(0), a.stride(0), b.stride(0)
        with on_device_of(gate):
            swiglu_backward_kernel[(rows, divide_up(columns, _BLOCK))](g, a, b, grad_gate, grad_up, columns, *strides, BLOCK=_BLOCK)
    return grad_gate, grad_up


@_swiglu_backward.register_fake
def _swiglu_backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_fake(gate, up), _swiglu_fake(gate, up)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _swiglu_backward(grad, *ctx.saved_tensors)
    return gradients


_swiglu.register_autograd(_differentiate, setup_context=_keep)


def swiglu(x: Tensor) -> Tensor:
    """As `reference.swiglu`; the rows of `x` may lie apart."""
    require_triton()
    gate, up = x.chunk(2, dim=-1)
    return _swiglu(gate, up)
