"""Rotary position embedding in both layouts. The gradient is the same rotation by the negated angle.

A program turns several heads of one token, whose cosines and sines it reads once. Heads may be a slice of a wider tensor
(queries and keys beside values, or the first channels of each head): only the channels of a head must be adjacent.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels import reference
from megatron_llm.kernels.triton.language import (
    NAMESPACE,
    Pointer,
    Scalar,
    constexpr,
    divide_up,
    jit,
    on_device_of,
    power_of_two,
    require_triton,
    tl,
    warps,
)

_TILE = 2048  # pairs of channels a program turns, at most


@jit
def rotary_kernel(
    x: "Pointer",
    cos: "Pointer",
    sin: "Pointer",
    y: "Pointer",
    batch: "Scalar",
    heads: "Scalar",
    half: "Scalar",
    x_stride_s: "Scalar",
    x_stride_b: "Scalar",
    x_stride_h: "Scalar",
    table_stride_s: "Scalar",
    table_stride_b: "Scalar",
    INTERLEAVED: constexpr,
    BACKWARD: constexpr,
    HEADS: constexpr,
    HALF: constexpr,
) -> None:
    """y [S, B, heads, 2 half] contiguous; program (token, block of heads)."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    table = s * table_stride_s + b * table_stride_b + pair
    cosine = tl.load(cos + table, mask=pair < half, other=0.0)[None, :]
    sine = tl.load(sin + table, mask=pair < half, other=0.0)[None, :]
    if BACKWARD:
        sine = -sine
    source = x + s * x_stride_s + b * x_stride_b + head[:, None] * x_stride_h
    target = y + (token * heads + head[:, None]) * (2 * half)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * HALF)[None, :]
        inside = (head < heads)[:, None] & (channel < 2 * half)
        both = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (HEADS, HALF, 2)))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        tl.store(target + channel, tl.reshape(turned, (HEADS, 2 * HALF)).to(y.dtype.element_ty), mask=inside)
    else:
        inside = (head < heads)[:, None] & (pair < half)[None, :]
        first = tl.load(source + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair[None, :], (first * cosine - second * sine).to(y.dtype.element_ty), mask=inside)
        tl.store(target + half + pair[None, :], (second * cosine + first * sine).to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    """`x` [S, B, heads, D] turned, or turned back."""
    length, batch, heads, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    half = channels // 2
    width = power_of_two(half)
    block = max(1, min(power_of_two(heads), _TILE // width))
    with on_device_of(x):
        rotary_kernel[(length * batch, divide_up(heads, block))](
            x,
            cos,
            sin,
            y,
            batch,
            heads,
            half,
            *x.stride()[:3],
            cos.stride(0),
            cos.stride(1) if cos.shape[1] > 1 else 0,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            HEADS=block,
            HALF=width,
            num_warps=warps(2 * block * width),
        )
    return y


@_rotate.register_fake
def _rotate_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    return _rotate(grad, cos, sin, ctx.interleaved, not ctx.backward), None, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_keep)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotary`: `x` [S, B, heads, D]; `cos`, `sin` [S, B or 1, 1, D / 2] fp32.

    Tables that learn (CLEX) need a gradient of their own; those take the plain form.
    """
    if cos.requires_grad or sin.requires_grad:
        return reference.rotary(x, cos, sin)
    require_triton()
    return _rotate(x, cos, sin, False, False)


def rotary_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotary_interleaved`; shapes and learned tables as in `rotary`."""
    if cos.requires_grad or sin.requires_grad:
        return reference.rotary_interleaved(x, cos, sin)
    require_triton()
    return _rotate(x, cos, sin, True, False)
