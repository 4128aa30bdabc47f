"""The two passes over the logits that a vocabulary-parallel cross-entropy needs, each over one rank's columns.

The first gives each row's maximum, its sum of exponentials and its label's logit; the ranks reduce these. The second turns
the logits into their gradient in place, so that nothing of the logits' size is allocated. Columns from `valid` on are
padding of the vocabulary.
"""

import torch
from torch import Tensor

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

_BLOCK = 4096  # columns a program reads at a time


@jit
def softmax_statistics_kernel(
    logits: "Pointer",
    labels: "Pointer",
    out: "Pointer",
    rows: "Scalar",
    stride: "Scalar",
    first: "Scalar",
    valid: "Scalar",
    BLOCK: constexpr,
) -> None:
    """out [3, rows]; a program reads one row once, rescaling its sum whenever the maximum grows (online softmax)."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for start in range(0, valid, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(line + column, mask=column < valid, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(maximum, tl.max(values, 0))
        # A row of minus infinities so far has the sum 0, not NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(values - shift), 0)
        maximum = largest
    label = tl.load(labels + row) - first
    here = (label >= 0) & (label < valid)
    target = tl.load(line + tl.where(here, label, 0), mask=here, other=0.0).to(tl.float32)
    tl.store(out + row, maximum)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, target)


@jit
def softmax_gradient_kernel(
    logits: "Pointer",
    labels: "Pointer",
    log_sum_exp: "Pointer",
    scale: "Pointer",
    stride: "Scalar",
    columns: "Scalar",
    first: "Scalar",
    valid: "Scalar",
    BLOCK: constexpr,
) -> None:
    """In place (softmax - one-hot) x scale; program (row, block of columns). A row with scale 0 is not read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + column
    factor = tl.load(scale + row)
    if factor == 0.0:
        # Not multiplied: a row that does not count may hold anything, and its log-sum-exp may be infinite.
        tl.store(place, tl.zeros((BLOCK,), dtype=logits.dtype.element_ty), mask=column < columns)
    else:
        values = tl.load(place, mask=column < valid, other=float("-inf")).to(tl.float32)
        result = tl.exp(values - tl.load(log_sum_exp + row))
        result = tl.where(column == tl.load(labels + row) - first, result - 1.0, result) * factor
        result = tl.where(column < valid, result, 0.0)
        tl.store(place, result.to(logits.dtype.element_ty), mask=column < columns)


@torch.library.custom_op(f"{NAMESPACE}::softmax_statistics", mutates_args=())
def _softmax_statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    rows = logits.shape[0]
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(_BLOCK, power_of_two(max(valid, 1)))
    if rows:
        with on_device_of(logits):
            softmax_statistics_kernel[(rows,)](
                logits, labels.contiguous(), out, rows, logits.stride(0), first, valid, BLOCK=block, num_warps=warps(block)
            )
    return out


@_softmax_statistics.register_fake
def _softmax_statistics_fake(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::softmax_gradient_", mutates_args=("logits",))
def _softmax_gradient(logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, valid: int) -> None:
    rows, columns = logits.shape
    target = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(_BLOCK, power_of_two(max(columns, 1)))
    if logits.numel():
        with on_device_of(logits):
            softmax_gradient_kernel[(rows, divide_up(columns, block))](
                target,
                labels.contiguous(),
                log_sum_exp.contiguous(),
                scale.contiguous(),
                target.stride(0),
                columns,
                first,
                valid,
                BLOCK=block,
                num_warps=warps(block),
            )
    if target is not logits:
        logits.copy_(target)


@_softmax_gradient.register_fake
def _softmax_gradient_fake(logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, valid: int) -> None:
    return None


def softmax_statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """[3, N] fp32 of `logits` [N, columns]: maximum over the columns below `valid`, sum of exp(logit - maximum), label's logit.

    Column c is vocabulary id first + c. The label's logit is 0 where the label is not among these columns. Without a valid
    column the maximum is minus infinity and the sum 0. `labels` [N] int64. No gradient flows through it.
    """
    require_triton()
    result: Tensor = _softmax_statistics(logits, labels, first, valid)
    return result


def softmax_gradient_(logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, valid: int) -> None:
    """In place of `logits` [N, columns]: (exp(logit - log_sum_exp) - one-hot of the label) x scale, zero from `valid` on.

    `log_sum_exp` and `scale` [N] fp32. Rows with scale 0 become zeros whatever they hold.
    """
    require_triton()
    _softmax_gradient(logits, labels, log_sum_exp, scale, first, valid)
