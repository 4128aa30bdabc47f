"""The tensor-parallel products and sums as operators that `torch.compile` keeps in its graph.

The compiler cannot look into a collective, and an autograd function that waits for one breaks its graph into pieces.
Here each such function is an operator of its own, with a name for its group, a shape for the compiler and a backward
that is an operator too; inside they do what `layers` and `collectives` do in eager mode.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_llm.kernels.fp8 import Scaled
from megatron_llm.kernels.products import Products, forward_product, input_gradient, operand, weight_gradient
from megatron_llm.parallel.comm import (
    Pending,
    all_gather_first_dim,
    all_gather_into,
    all_reduce,
    reduce_scatter_first_dim,
    reduce_scatter_into,
)
from megatron_llm.parallel.groups import Group

# With the compiler's CUDA graphs (--compile-mode), what communicates runs between the recorded pieces and not in them.
OUTSIDE_GRAPHS = (torch.Tag.cudagraph_unsafe,)


def _group(name: str) -> Group:
    pg = _resolve_process_group(name)  # type: ignore[arg-type]
    return Group(tuple(range(pg.size())), pg.rank(), pg)


def _known(products: str) -> Products:
    return products  # type: ignore[return-value]  # operators have no other type for it


@torch.library.custom_op("megatron_llm::column_linear", mutates_args=(), tags=OUTSIDE_GRAPHS)
def column_linear(x: Tensor, weight: Tensor, group: str, sequence_parallel: bool, products: str) -> Tensor:
    """x W^T with `x` [S, B, in], or [S/tp, B, in] gathered over the group under sequence parallelism."""
    whole = all_gather_first_dim(x, _group(group)) if sequence_parallel else x
    return forward_product(whole, weight, None, _known(products))


@column_linear.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence_parallel: bool, products: str) -> Tensor:
    length = x.shape[0] * (_group(group).size if sequence_parallel else 1)
    return x.new_empty((length, *x.shape[1:-1], weight.shape[0]))


@torch.library.custom_op("megatron_llm::column_linear_backward", mutates_args=(), tags=OUTSIDE_GRAPHS)
def column_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence_parallel: bool, wants_weight: bool, products: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `column_linear`'s input and weight, the second empty unless `wants_weight`."""
    kind = _known(products)
    grad_x, grad_weight = column_gradients(operand(grad, kind), x, weight, _group(group), sequence_parallel, wants_weight, kind)
    return grad_x, weight.new_empty(0) if grad_weight is None else grad_weight


@column_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence_parallel: bool, wants_weight: bool, products: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if wants_weight else 0)


def column_gradients(
    grad: Tensor | Scaled, x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool, wants_weight: bool, products: Products
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a column-parallel product's input, summed over the group, and of its weight; `grad` is an `operand`.

    Under sequence parallelism the input is gathered again while its gradient is computed; the gradient is reduced while
    the weight's is computed.
    """
    gathered = Pending(x)
    if sequence_parallel and wants_weight:
        gathered = all_gather_into(x.new_empty((x.shape[0] * group.size, *x.shape[1:])), x.contiguous(), group, async_op=True)
    grad_x = input_gradient(grad, weight, products)
    total = gathered.wait()
    if sequence_parallel:
        reduced = reduce_scatter_into(torch.empty_like(x, memory_format=torch.contiguous_format), grad_x, group, async_op=True)
    else:
        reduced = all_reduce(grad_x, group, async_op=True)
    grad_weight = weight_gradient(total, grad, products) if wants_weight else None
    return reduced.wait(), grad_weight


def _column_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.group, ctx.sequence_parallel, ctx.products = inputs
    ctx.save_for_backward(x, weight)


def _column_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    x, weight = ctx.saved_tensors
    wants_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight = column_linear_backward(grad, x, weight, ctx.group, ctx.sequence_parallel, wants_weight, ctx.products)
    return grad_x, grad_weight if wants_weight else None, None, None, None


column_linear.register_autograd(_column_backward, setup_context=_column_setup)


@torch.library.custom_op("megatron_llm::sum_over_group", mutates_args=(), tags=OUTSIDE_GRAPHS)
def sum_over_group(x: Tensor, group: str) -> Tensor:
    """Sum over the group; the gradient passes unchanged."""
    return all_reduce(x.clone(memory_format=torch.contiguous_format), _group(group))


@sum_over_group.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    return None


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


sum_over_group.register_autograd(_sum_backward, setup_context=_sum_setup)


@torch.library.custom_op("megatron_llm::scatter_sum", mutates_args=(), tags=OUTSIDE_GRAPHS)
def scatter_sum(x: Tensor, group: str) -> Tensor:
    """This rank's [S/n, ...] of the sum over the group of [S, ...]; the gradient is gathered."""
    return reduce_scatter_first_dim(x.contiguous(), _group(group))


@scatter_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty((x.shape[0] // _group(group).size, *x.shape[1:]))


@torch.library.custom_op("megatron_llm::gather_sequence", mutates_args=(), tags=OUTSIDE_GRAPHS)
def gather_sequence(x: Tensor, group: str) -> Tensor:
    """Every rank's [n, ...] end to end."""
    return all_gather_first_dim(x.contiguous(), _group(group))


@gather_sequence.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty((x.shape[0] * _group(group).size, *x.shape[1:]))


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return gather_sequence(grad, ctx.group), None


scatter_sum.register_autograd(_scatter_backward, setup_context=_scatter_setup)
