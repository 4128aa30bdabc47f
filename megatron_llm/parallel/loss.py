"""Cross-entropy over logits whose vocabulary is split over the TP ranks; the logits are never gathered.

The arithmetic is in plain functions and the three reductions (maximum, then sum of exponentials and target logit
together) in the autograd function, so that each half can be tested alone. Columns beyond the true vocabulary are
run-time padding: they get no probability and no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_llm.parallel.comm import all_reduce
from megatron_llm.parallel.groups import Group


def shift_and_exponentiate(logits: Tensor, row_maximum: Tensor) -> Tensor:
    """exp(logits - maximum) in place of `logits` [N, V]; `row_maximum` [N]."""
    return logits.sub_(row_maximum.unsqueeze(-1)).exp_()


def local_targets(labels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Column of each label among this rank's `count` columns starting at vocabulary id `first`, and whether it is here."""
    columns = labels - first
    here = (columns >= 0) & (columns < count)
    return columns.masked_fill(~here, 0), here


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, valid: int, group: Group) -> Tensor:
        wide = logits.float()
        if wide is logits:
            wide = logits.clone()
        wide[:, valid:] = float("-inf")
        maximum = wide.amax(-1)
        all_reduce(maximum, group, op="max")
        columns, here = local_targets(labels, first, valid)
        target = (wide.gather(-1, columns.unsqueeze(-1)).squeeze(-1) - maximum).masked_fill(~here, 0.0)
        exponentials = shift_and_exponentiate(wide, maximum)
        sums = torch.stack((exponentials.sum(-1), target))
        all_reduce(sums, group)
        probabilities = exponentials.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(probabilities, columns, here)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, columns, here = ctx.saved_tensors
        # In place on the saved tensor: at large vocabularies it is the biggest of the step and backward runs once.
        probabilities.scatter_add_(-1, columns.unsqueeze(-1), here.to(probabilities.dtype).neg().unsqueeze(-1))
        return probabilities.mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, first: int, valid: int, group: Group) -> Tensor:
    """Loss of each token [N] in fp32, equal on all ranks of the group.

    `logits` [N, columns]: this rank's columns, of which the first `valid` are vocabulary ids first .. first + valid - 1
    and the rest padding. `labels` [N] global ids.
    """
    result: Tensor = _VocabParallelCrossEntropy.apply(logits, labels, first, valid, group)
    return result
