"""The output layer and its cross-entropy as one operation that never holds the logits of the whole batch.

At a large vocabulary the logits are the biggest tensors of a step: 2,048 tokens by 32,000 columns are 131 MB in bf16
and twice that in the fp32 that a softmax wants. Here rows are taken in chunks: a chunk's logits are made, reduced to
what the loss needs, turned in their own memory into their gradient, and multiplied back to the gradients of the hidden
states and of the weight, all while they are in the cache. So the backward pass of the loss happens in its forward, which
is possible because the loss is a weighted sum whose weights are known (the idea of cut cross-entropy, Wijmans et al.
2024, and of fused linear cross-entropy kernels). The vocabulary may be split over the TP ranks: two small reductions a
chunk, as in `loss`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels.dispatch import Kernels
from megatron_llm.kernels.products import multiply, multiply_into
from megatron_llm.parallel.comm import Pending, all_gather_first_dim, all_reduce, reduce_scatter_into
from megatron_llm.parallel.groups import Group

CHUNK_BYTES = 128 << 20  # of logits: large enough for the products to run at full speed


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns of the output layer: `valid` of them from vocabulary id `first` on, the others are padding.

    `sequence_parallel`: the hidden states come as this rank's part of the sequence.
    """

    first: int
    valid: int
    group: Group
    sequence_parallel: bool = False


def combine_statistics(statistics: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials and target logit, [N] fp32 each, from every rank's `softmax_statistics` [3, N]."""
    maximum, rest = statistics[0], statistics[1:]
    if group.size > 1:
        local, maximum = maximum, all_reduce(maximum.clone(), group, op="max")
        # A rank whose columns are all padding has no maximum and a sum of zero.
        rest = torch.stack((rest[0] * (local - maximum).nan_to_num(neginf=0.0).exp(), rest[1]))
        all_reduce(rest, group)
    return maximum + rest[0].log(), rest[1]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, shard: VocabularyShard, kernels: Kernels, rows: int
    ) -> Tensor:
        flat = (all_gather_first_dim(hidden, shard.group) if shard.sequence_parallel else hidden).flatten(0, -2)
        losses = torch.empty(flat.shape[0], dtype=torch.float32, device=flat.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(flat) if wants_hidden else None
        grad_weight = _WeightGradient(weight, kernels) if wants_weight else None
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            x, target = flat[part], labels[part]
            logits = multiply(x, weight.t(), kernels.products)
            log_sum, target_logit = combine_statistics(kernels.softmax_statistics(logits, target, shard.first, shard.valid), shard.group)
            torch.sub(log_sum, target_logit, out=losses[part])
            if not (wants_hidden or wants_weight):
                continue
            kernels.softmax_gradient_(logits, target, log_sum, weights[part], shard.first, shard.valid)
            if grad_hidden is not None:
                multiply_into(grad_hidden[part], logits, weight, kernels.products)
            if grad_weight is not None:
                grad_weight.add(logits, x)
        ctx.group, ctx.grad_weight = shard.group, grad_weight.total() if grad_weight is not None else None
        ctx.grad_hidden = _reduce(grad_hidden, hidden, shard) if grad_hidden is not None else None
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        hidden = ctx.grad_hidden.wait() if ctx.grad_hidden is not None else None
        weight, scale = ctx.grad_weight, grads[0]
        ctx.grad_hidden = ctx.grad_weight = None  # they are handed on: nothing here keeps them alive
        if scale.device.type == "cpu" and scale.item() == 1.0:  # the usual case, and on the CPU it costs nothing to ask
            return hidden, weight, None, None, None, None, None
        for gradient in (hidden, weight):
            if gradient is not None:
                gradient.mul_(scale)
        return hidden, weight, None, None, None, None, None


class _WeightGradient:
    """Sums the chunks' parts of the weight's gradient: in fp32 when there are several, else as the product gives it."""

    def __init__(self, weight: Tensor, kernels: Kernels) -> None:
        self._weight, self._accumulate, self._products = weight, kernels.accumulate_, kernels.products
        self._first: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, grad_logits: Tensor, x: Tensor) -> None:
        """Add grad_logits^T x."""
        if self._first is None:
            self._first = multiply(grad_logits.t(), x, self._products)
        elif self._first.dtype == torch.float32:
            multiply_into(self._first, grad_logits.t(), x, self._products, add=True)
        else:
            if self._sum is None:
                self._sum = self._first.float()
            self._accumulate(self._sum, grad_logits.t() @ x, False)

    def total(self) -> Tensor:
        """The sum in the weight's type."""
        if self._first is None:
            return torch.zeros_like(self._weight)
        return self._first if self._sum is None else self._sum.to(self._weight.dtype)


def _reduce(grad_hidden: Tensor, hidden: Tensor, shard: VocabularyShard) -> Pending:
    """Start summing the ranks' parts of the hidden states' gradient, shaped like `hidden`."""
    if shard.sequence_parallel:
        whole = grad_hidden.view(-1, *hidden.shape[1:])
        return reduce_scatter_into(torch.empty_like(hidden, memory_format=torch.contiguous_format), whole, shard.group, async_op=True)
    return all_reduce(grad_hidden.view(hidden.shape), shard.group, async_op=True)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    shard: VocabularyShard,
    kernels: Kernels,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Weighted sum of the tokens' cross-entropies, an fp32 scalar equal on all ranks of the group.

    `hidden` [S, B, H] ([S/tp, B, H] under sequence parallelism), `weight` [columns, H], `labels` [S x B] global ids and
    `token_weights` [S x B] fp32 in the order of the flattened hidden states. Gradients are those of the weighted sum;
    like `weight`'s they are computed in the forward pass, and `chunk_bytes` of logits are held at a time.
    """
    rows = max(1, chunk_bytes // max(1, weight.shape[0] * weight.element_size()))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, shard, kernels, rows)
    return loss
