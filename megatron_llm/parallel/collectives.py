"""Collectives that autograd can go through (Shoeybi et al. 2019; Korthikanti et al. 2022).

                      forward          backward
    reduce_from_group all-reduce       identity      output of a row-parallel product
    scatter_sequence  reduce-scatter   all-gather    the same under sequence parallelism

Their conjugates, which bring the input to a column-parallel product, are part of that product's own autograd function
(`layers`), where they overlap with it. All act on the first dimension, the sequence; over a group of one rank each is
the identity.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_llm.parallel.comm import all_gather_first_dim, all_reduce, reduce_scatter_first_dim
from megatron_llm.parallel.groups import Group
from megatron_llm.parallel.traceable import scatter_sum, sum_over_group


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce(total, group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_first_dim(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_first_dim(grads[0].contiguous(), ctx.group), None


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Sum over the group; the gradient passes unchanged."""
    if group.size == 1:
        return x
    result: Tensor = sum_over_group(x, group.name) if torch.compiler.is_compiling() else _ReduceFromGroup.apply(x, group)
    return result


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Partial sums [S, ...] of each rank to this rank's [S/n, ...] of the total; the gradient is gathered."""
    if group.size == 1:
        return x
    result: Tensor = scatter_sum(x, group.name) if torch.compiler.is_compiling() else _ScatterSequence.apply(x, group)
    return result


def sequence_slice(x: Tensor, group: Group) -> Tensor:
    """This rank's [S/n, ...] of a tensor [S, ...] that every rank has and that needs no gradient (positions, masks)."""
    if group.size == 1:
        return x
    length = x.shape[0] // group.size
    return x.narrow(0, group.rank * length, length)
