"""Passes over flat buffers: the AdamW update with everything around it, and the sum of squares.

One pass of `adamw_` reads main, both moments and the gradient and writes main, both moments and the parameters in 16 bits:
scaling the gradient first and rounding afterwards would each read and write the buffers once more. (Adding a gradient into an
fp32 buffer needs no kernel here: torch converts while it adds, in one pass.)
"""

import math

import torch
from torch import Tensor

from megatron_llm.kernels.triton.language import NAMESPACE, Pointer, Scalar, constexpr, divide_up, jit, on_device_of, require_triton, tl

_BLOCK = 1024
_SQUARES = 8192


@jit
def adamw_kernel(
    main: "Pointer",
    exp_avg: "Pointer",
    exp_avg_sq: "Pointer",
    grad: "Pointer",
    rounded: "Pointer",
    count: "Scalar",
    decay: "Scalar",
    step_size: "Scalar",
    beta1: "Scalar",
    rest1: "Scalar",
    beta2: "Scalar",
    rest2: "Scalar",
    root_correction2: "Scalar",
    epsilon: "Scalar",
    grad_scale: "Scalar",
    ROUND: constexpr,
    BLOCK: constexpr,
) -> None:
    """One element each: decay main, update the moments, step; every operand is fp32 in registers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gradient = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * grad_scale
    weight = tl.load(main + at, mask=inside, other=0.0)
    first = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + rest1 * gradient
    second = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + rest2 * gradient * gradient
    weight = weight - decay * weight
    weight = weight - step_size * first / (tl.sqrt(second) / root_correction2 + epsilon)
    tl.store(exp_avg + at, first, mask=inside)
    tl.store(exp_avg_sq + at, second, mask=inside)
    tl.store(main + at, weight, mask=inside)
    if ROUND:
        tl.store(rounded + at, weight.to(rounded.dtype.element_ty), mask=inside)


@jit
def squares_kernel(flat: "Pointer", sums: "Pointer", count: "Scalar", BLOCK: constexpr) -> None:
    """sums[program] = sum of squares of one block, in fp64: no square overflows, and no order of addition shows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(flat + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(values * values, 0))


@torch.library.custom_op(f"{NAMESPACE}::adamw_", mutates_args=("main", "exp_avg", "exp_avg_sq", "rounded"))
def _adamw(
    main: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rounded: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    if not main.numel():
        return
    with on_device_of(main):
        adamw_kernel[(divide_up(main.numel(), _BLOCK),)](
            main,
            exp_avg,
            exp_avg_sq,
            grad,
            main if rounded is None else rounded,
            main.numel(),
            lr * weight_decay,
            lr / (1.0 - beta1**step),
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            math.sqrt(1.0 - beta2**step),
            eps,
            grad_scale,
            ROUND=rounded is not None,
            BLOCK=_BLOCK,
        )


@torch.library.custom_op(f"{NAMESPACE}::sum_of_squares", mutates_args=())
def _sum_of_squares(flat: Tensor) -> Tensor:
    flat = flat.contiguous().view(-1)
    blocks = divide_up(flat.numel(), _SQUARES)
    sums = torch.empty(blocks, dtype=torch.float64, device=flat.device)
    if blocks:
        with on_device_of(flat):
            squares_kernel[(blocks,)](flat, sums, flat.numel(), BLOCK=_SQUARES, num_warps=8)
    return sums.sum()


@_sum_of_squares.register_fake
def _sum_of_squares_fake(flat: Tensor) -> Tensor:
    return flat.new_empty((), dtype=torch.float64)


def adamw_(
    main: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rounded: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """AdamW (Loshchilov and Hutter 2019) in place on contiguous fp32 tensors of one length; `step` counts from 1.

    `grad` in fp32, bf16 or fp16 is multiplied by `grad_scale` as it is read. `rounded`, when given, gets `main` in its type.
    ValueError for tensors of other lengths or with gaps.
    """
    require_triton()
    tensors = [main, exp_avg, exp_avg_sq, grad, *([] if rounded is None else [rounded])]
    if any(t.numel() != main.numel() or not t.is_contiguous() for t in tensors):
        raise ValueError(f"adamw_ needs contiguous tensors of one length, got {[(tuple(t.shape), t.stride()) for t in tensors]}")
    _adamw(main, exp_avg, exp_avg_sq, grad, rounded, lr, beta1, beta2, eps, weight_decay, step, grad_scale)


def sum_of_squares(flat: Tensor) -> Tensor:
    """Sum of the squares of an fp32, bf16 or fp16 tensor as an fp64 scalar; the same number at every call."""
    require_triton()
    result: Tensor = _sum_of_squares(flat)
    return result
