"""RMSNorm and LayerNorm, alone or with the addition of the residual before them, forward and backward.

One kernel each way serves all four: a program takes a tile of whole rows, so a row is read once. The weight's gradient is
a sum over rows: a fixed number of programs each add up their rows, and the programs' sums are added by torch, so that the
result does not change from call to call.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels.triton.language import (
    NAMESPACE,
    Pointer,
    Scalar,
    as_rows,
    check_row,
    constexpr,
    divide_up,
    jit,
    on_device_of,
    power_of_two,
    processors,
    require_triton,
    tl,
    warps,
)

_TILE = 4096  # elements of a program's tile, unless a row alone is longer


@jit
def norm_forward_kernel(
    x: "Pointer",
    residual: "Pointer",
    weight: "Pointer",
    bias: "Pointer",
    y: "Pointer",
    total: "Pointer",
    means: "Pointer",
    scales: "Pointer",
    rows: "Scalar",
    columns: "Scalar",
    x_stride: "Scalar",
    residual_stride: "Scalar",
    epsilon: "Scalar",
    ADD: constexpr,
    CENTERED: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
) -> None:
    """y = norm(x) or norm(x + residual); total, y are contiguous; means and scales [rows] are kept for the backward."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present, inside = row < rows, (row < rows)[:, None] & (column < columns)[None, :]
    wide = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    out = row[:, None] * columns + column[None, :]
    if ADD:
        wide += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + out, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if CENTERED:
        mean = tl.sum(wide, 1) / columns
        tl.store(means + row, mean, mask=present)
        wide = tl.where(inside, wide - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / columns + epsilon)
    tl.store(scales + row, scale, mask=present)
    result = wide * scale[:, None]
    if CENTERED:
        result = result * factor + tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    else:
        result = result.to(x.dtype.element_ty).to(tl.float32) * factor
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)


@jit
def norm_backward_kernel(
    grad: "Pointer",
    grad_total: "Pointer",
    x: "Pointer",
    weight: "Pointer",
    means: "Pointer",
    scales: "Pointer",
    grad_x: "Pointer",
    weight_sums: "Pointer",
    bias_sums: "Pointer",
    rows: "Scalar",
    columns: "Scalar",
    grad_stride: "Scalar",
    total_stride: "Scalar",
    x_stride: "Scalar",
    ADD: constexpr,
    CENTERED: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
) -> None:
    """grad_x (contiguous), and this program's part of the weight's and bias's gradients, [programs, columns] fp32."""
    column = tl.arange(0, COLUMNS)
    valid = (column < columns)[None, :]
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    bias_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & valid
        scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            normal = tl.where(inside, normal - tl.load(means + row, mask=row < rows, other=0.0)[:, None], 0.0)
        normal = normal * scale
        outer = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        inner = outer * factor
        result = inner - normal * (tl.sum(inner * normal, 1) / columns)[:, None]
        if CENTERED:
            result = result - (tl.sum(inner, 1) / columns)[:, None]
            bias_sum += tl.sum(outer, 0)
            weight_sum += tl.sum(outer * normal, 0)
        else:
            weight_sum += tl.sum(outer * normal.to(x.dtype.element_ty).to(tl.float32), 0)
        result = result * scale
        if ADD:
            result += tl.load(grad_total + row[:, None] * total_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row[:, None] * columns + column[None, :], result.to(grad_x.dtype.element_ty), mask=inside)
    sums = tl.program_id(0) * columns + column
    tl.store(weight_sums + sums, weight_sum, mask=column < columns)
    if CENTERED:
        tl.store(bias_sums + sums, bias_sum, mask=column < columns)


def _tile(columns: int) -> dict[str, int]:
    """Rows and columns of a tile, and its warps."""
    width = power_of_two(columns)
    rows = max(1, min(32, _TILE // width))
    return {"ROWS": rows, "COLUMNS": width, "num_warps": warps(rows * width)}


@torch.library.custom_op(f"{NAMESPACE}::norm", mutates_args=())
def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, x + residual (empty without one), and the rows' means (LayerNorm, else empty) and scales."""
    check_row(x.shape[-1])
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    flat, other = as_rows(x), as_rows(x if residual is None else residual)
    rows, columns = flat.shape
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    means = torch.empty(rows if bias is not None else 0, dtype=torch.float32, device=x.device)
    tile = _tile(columns)
    if x.numel():
        with on_device_of(x):
            norm_forward_kernel[(divide_up(rows, tile["ROWS"]),)](
                flat,
                other,
                weight.contiguous(),
                weight if bias is None else bias.contiguous(),
                y,
                total,
                means,
                scales,
                rows,
                columns,
                flat.stride(0),
                other.stride(0),
                epsilon,
                ADD=residual is not None,
                CENTERED=bias is not None,
                **tile,
            )
    return y, total, means, scales


@_norm.register_fake
def _norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    return y, total, y.new_empty(rows if bias is not None else 0, dtype=torch.float32), y.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias (empty without one)."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, outer, added = as_rows(x), as_rows(grad), as_rows(grad if grad_total is None else grad_total)
    rows, columns = flat.shape
    tile = _tile(columns)
    programs = min(divide_up(rows, tile["ROWS"]), 4 * processors(x.device))
    sums = torch.empty(2 if centered else 1, programs, columns, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device_of(x):
            norm_backward_kernel[(programs,)](
                outer,
                added,
                flat,
                weight.contiguous(),
                means,
                scales,
                grad_x,
                sums[0],
                sums[-1],
                rows,
                columns,
                outer.stride(0),
                added.stride(0),
                flat.stride(0),
                ADD=grad_total is not None,
                CENTERED=centered,
                **tile,
            )
    whole = sums.sum(1).to(weight.dtype)
    return grad_x, whole[0].clone(), whole[1].clone() if centered else weight.new_empty(0)


@_norm_backward.register_fake
def _norm_backward_fake(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = torch.empty_like(weight) if centered else weight.new_empty(0)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, means, scales = output
    ctx.added, ctx.centered = residual is not None, bias is not None
    ctx.save_for_backward(x if residual is None else total, weight, means, scales)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, grad_total = grads[0], grads[1]
    x, weight, means, scales = ctx.saved_tensors
    if grad is None:  # only the sum was used
        added = grad_total if ctx.added else None
        return added, added, None, None, None
    grad_x, grad_weight, grad_bias = _norm_backward(grad, grad_total if ctx.added else None, x, weight, means, scales, ctx.centered)
    return grad_x, grad_x if ctx.added else None, grad_weight, grad_bias if ctx.centered else None, None


_norm.register_autograd(_differentiate, setup_context=_keep)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `reference.rms_norm`: `x` [..., n], `weight` [n]."""
    require_triton()
    return _norm(x, None, weight, None, epsilon)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """As `reference.layer_norm`: `x` [..., n], `weight` and `bias` [n]."""
    require_triton()
    return _norm(x, None, weight, bias, epsilon)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and that sum, in one pass over memory."""
    require_triton()
    normal, total, _, _ = _norm(x, residual, weight, None, epsilon)
    return normal, total


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual, and that sum, in one pass over memory."""
    require_triton()
    normal, total, _, _ = _norm(x, residual, weight, bias, epsilon)
    return normal, total
