"""The layers that parallelism lives in: column- and row-parallel linear layers and the vocabulary-parallel embedding.

Each takes an explicit group; over a group of one rank it is the plain layer. Each writes a `Placement` on its
parameters and initialises them through it, so that the values do not depend on the layout. Activations are [S, B, H];
under sequence parallelism (Korthikanti et al. 2022) they are [S/tp, B, H] outside the products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llm.kernels.products import Products, forward_product, operand
from megatron_llm.parallel.collectives import reduce_from_group, scatter_sequence
from megatron_llm.parallel.comm import all_gather_first_dim
from megatron_llm.parallel.deferred import DeferredGradients, Product, linear, splits
from megatron_llm.parallel.fp8 import fp8_linear
from megatron_llm.parallel.groups import Group
from megatron_llm.parallel.linear_loss import VocabularyShard
from megatron_llm.parallel.placement import Part, Placement, set_placement
from megatron_llm.parallel.random import fill_normal_
from megatron_llm.parallel.traceable import column_gradients, column_linear


@dataclass(frozen=True)
class ParallelContext:
    """What every layer of a model chunk shares: the TP group, sequence parallelism, where and how parameters are made.

    `deferred` takes the weight gradients that a split backward leaves for later. `products`: what linear layers multiply with.
    """

    tp: Group
    sequence_parallel: bool
    device: torch.device
    dtype: torch.dtype
    seed: int
    products: Products = "torch"
    deferred: DeferredGradients = field(default_factory=DeferredGradients, compare=False)

    @property
    def shards_sequence(self) -> bool:
        """Whether activations outside the products are split along the sequence."""
        return self.sequence_parallel and self.tp.size > 1


@dataclass(frozen=True)
class ColumnPart:
    """One of the outputs a column-parallel layer produces: `size` features over `shards` distinct shards.

    `shards` is the TP size unless there are fewer indivisible units (key/value heads) than ranks; then consecutive
    ranks hold the same shard. `unit` features belong together (the channels of a head).
    """

    name: str
    size: int
    shards: int
    unit: int = 0


def make_parameter(
    ctx: ParallelContext, placement: Placement, rows: int, columns: tuple[int, ...], std: float | None, fill: float = 0.0
) -> nn.Parameter:
    """A parameter of `rows` local rows: normal with `std` when given, else the constant `fill`; padding rows are zero."""
    data = torch.zeros(rows, *columns, dtype=ctx.dtype, device=ctx.device)
    for part in placement.parts if ctx.device.type != "meta" else ():
        if std is not None:
            fill_normal_(data, part, std, ctx.seed, placement.logical_name)
        elif fill:
            part.view(data).fill_(fill)
    return set_placement(nn.Parameter(data), placement)


def replicated_parameter(
    ctx: ParallelContext, logical_name: str, shape: tuple[int, ...], *, std: float | None = None, fill: float = 0.0, per_head: bool = False
) -> nn.Parameter:
    """A parameter every TP rank holds whole, applied to activations outside the products, or to each head (`per_head`).

    Gradients are partial where a rank sees a part of the activations only: its own part of the sequence under sequence
    parallelism, its own heads always.
    """
    part = Part("", shape, (0,) * len(shape), 0, shape, replicas=ctx.tp.size, replica=ctx.tp.rank)
    placement = Placement(logical_name, (part,), partial_grad=ctx.tp.size > 1 if per_head else ctx.shards_sequence)
    return make_parameter(ctx, placement, shape[0], shape[1:], std, fill)


class _ColumnLinear(torch.autograd.Function):
    """Product with the input gathered (sequence parallel) or copied; only this rank's input is kept for the backward.

    The backward hides communication behind the products (`column_gradients`); the weight's may be left to `deferred`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool, products: Products, deferred: DeferredGradients | None
    ) -> Tensor:
        ctx.group, ctx.sequence_parallel, ctx.products, ctx.deferred = group, sequence_parallel, products, deferred
        ctx.parameter = None if deferred is None else weight  # recomputation brings back detached copies of what is saved
        ctx.save_for_backward(x, weight)
        whole = all_gather_first_dim(x, group) if sequence_parallel else x
        return forward_product(whole, weight, None, products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        later = ctx.deferred is not None and ctx.deferred.collecting
        wants_weight, grad = ctx.needs_input_grad[1] and not later, operand(grads[0], ctx.products)
        grad_x, grad_weight = column_gradients(grad, x, weight, ctx.group, ctx.sequence_parallel, wants_weight, ctx.products)
        if later:
            ctx.deferred.put(Product(ctx.parameter, x.detach(), grad, ctx.products, ctx.group if ctx.sequence_parallel else None))
        return grad_x, grad_weight, None, None, None, None


def _column_linear(
    x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool, deferred: DeferredGradients, products: Products
) -> Tensor:
    if torch.compiler.is_compiling():
        traced: Tensor = column_linear(x, weight, group.name, sequence_parallel, products)
        return traced
    result: Tensor = _ColumnLinear.apply(x, weight, group, sequence_parallel, products, deferred if splits(weight, deferred) else None)
    return result


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredGradients, products: Products) -> Tensor:
    """A layer on one rank."""
    return fp8_linear(x, weight, bias, deferred) if products == "fp8" else linear(x, weight, bias, deferred, products)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W (output features) split over the group.

    `parts` fuses several outputs into one product (query, key and value; gate and up); the local output stacks this
    rank's shard of each part in order. Input [S, B, in] ([S/tp, B, in] under sequence parallelism), output
    [S, B, local out].
    """

    def __init__(
        self, ctx: ParallelContext, logical_name: str, in_features: int, parts: Sequence[ColumnPart], *, bias: bool, std: float
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel, self.deferred, self.products = ctx.tp, ctx.shards_sequence, ctx.deferred, ctx.products
        self.logical_name, self.in_features, self.parts = logical_name, in_features, tuple(parts)
        self.adapters = nn.ModuleList()  # each takes the layer's input and gives something to add to its output
        self.splits = [part.size // part.shards for part in parts]
        rows = sum(self.splits)
        self.weight = make_parameter(
            ctx, _column_placement(ctx, f"{logical_name}.weight", parts, (in_features,)), rows, (in_features,), std
        )
        self.bias = make_parameter(ctx, _column_placement(ctx, f"{logical_name}.bias", parts, ()), rows, (), None) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[S or S/tp, B, in] to [S, B, local out]."""
        if self.group.size == 1:
            y = _linear(x, self.weight, self.bias, self.deferred, self.products)
        else:
            y = _column_linear(x, self.weight, self.group, self.sequence_parallel, self.deferred, self.products)
            y = y if self.bias is None else y + self.bias
        for adapter in self.adapters:
            y = y + adapter(x)
        return y


def _column_placement(ctx: ParallelContext, logical_name: str, parts: Sequence[ColumnPart], columns: tuple[int, ...]) -> Placement:
    found, local_start, shared = [], 0, False
    for part in parts:
        if part.size % part.shards or ctx.tp.size % part.shards:
            raise ValueError(f"{logical_name}: {part.size} features in {part.shards} shards over {ctx.tp.size} ranks do not divide")
        rows, replicas = part.size // part.shards, ctx.tp.size // part.shards
        start = (ctx.tp.rank // replicas) * rows
        zeros = (0,) * len(columns)
        found.append(
            Part(
                part.name,
                (part.size, *columns),
                (start, *zeros),
                local_start,
                (rows, *columns),
                replicas,
                ctx.tp.rank % replicas,
                part.unit,
            )
        )
        local_start += rows
        shared = shared or replicas > 1
    return Placement(logical_name, tuple(found), partial_grad=shared)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_local W_local^T, plus b, with the columns of W (input features) split over the group.

    Input [S, B, in/tp], output [S, B, out], or [S/tp, B, out] under sequence parallelism.
    """

    def __init__(self, ctx: ParallelContext, logical_name: str, in_features: int, out_features: int, *, bias: bool, std: float) -> None:
        super().__init__()
        tp = ctx.tp
        if in_features % tp.size:
            raise ValueError(f"{logical_name}: {in_features} input features do not divide over {tp.size} ranks")
        self.group, self.sequence_parallel, self.deferred, self.products = tp, ctx.shards_sequence, ctx.deferred, ctx.products
        self.logical_name, self.in_features, self.out_features = logical_name, in_features, out_features
        self.adapters = nn.ModuleList()  # each takes the layer's input and gives a partial sum to add to its own
        columns = in_features // tp.size
        part = Part("", (out_features, in_features), (0, tp.rank * columns), 0, (out_features, columns))
        self.weight = make_parameter(ctx, Placement(f"{logical_name}.weight", (part,)), out_features, (columns,), std)
        self.bias = replicated_parameter(ctx, f"{logical_name}.bias", (out_features,)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, in/tp] to [S or S/tp, B, out]."""
        if self.group.size == 1 and not self.adapters:
            return _linear(x, self.weight, self.bias, self.deferred, self.products)
        partial = _linear(x, self.weight, None, self.deferred, self.products)
        for adapter in self.adapters:
            partial = partial + adapter(x)
        y = scatter_sequence(partial, self.group) if self.sequence_parallel else reduce_from_group(partial, self.group)
        return y if self.bias is None else y + self.bias


def vocabulary_rows(vocab_size: int, shards: int) -> int:
    """Rows of the vocabulary each rank holds, run-time padding included; large ones are rounded up for the matrix units."""
    rows = -(-vocab_size // shards)
    return rows if rows < 1024 else -(-rows // 64) * 64


def vocabulary_part(ctx: ParallelContext, vocab_size: int, hidden_size: int) -> Part:
    """This rank's rows of a vocabulary matrix; the last ranks may hold fewer rows than they have room for, or none."""
    rows = vocabulary_rows(vocab_size, ctx.tp.size)
    first = min(ctx.tp.rank * rows, vocab_size)
    return Part("", (vocab_size, hidden_size), (first, 0), 0, (min(rows, vocab_size - first), hidden_size))


def vocabulary_parameter(
    ctx: ParallelContext, logical_name: str, vocab_size: int, hidden_size: int, std: float, *, tied: bool = False, tied_copy: bool = False
) -> nn.Parameter:
    """A matrix of one row a vocabulary entry, split over the group: the input embedding or the output layer."""
    placement = Placement(logical_name, (vocabulary_part(ctx, vocab_size, hidden_size),), tied=tied, tied_copy=tied_copy)
    return make_parameter(ctx, placement, vocabulary_rows(vocab_size, ctx.tp.size), (hidden_size,), std)


class VocabParallelEmbedding(nn.Module):
    """Rows of the vocabulary split over the group. Ids [S, B] to [S, B, H] ([S/tp, B, H] under sequence parallelism)."""

    def __init__(
        self, ctx: ParallelContext, logical_name: str, vocab_size: int, hidden_size: int, std: float, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.group, self.sequence_parallel = ctx.tp, ctx.shards_sequence
        self.weight = vocabulary_parameter(ctx, f"{logical_name}.weight", vocab_size, hidden_size, std, tied=tied)
        part = vocabulary_part(ctx, vocab_size, hidden_size)
        self.first, self.count = part.global_start[0], part.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """[S, B] int64 to embeddings."""
        if self.group.size == 1:
            return F.embedding(ids, self.weight)
        columns = ids - self.first
        elsewhere = (columns < 0) | (columns >= self.count)
        found = F.embedding(columns.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return scatter_sequence(found, self.group) if self.sequence_parallel else reduce_from_group(found, self.group)


class VocabParallelHead(nn.Module):
    """Logits of this rank's vocabulary columns. `weight` is the module's own, or the embedding's when tied.

    `normalized`: each row is scaled to length 1 first, in every forward pass (the output layer of Baichuan 2).
    """

    def __init__(self, ctx: ParallelContext, weight: nn.Parameter, vocab_size: int, *, normalized: bool = False) -> None:
        super().__init__()
        self.group, self.sequence_parallel = ctx.tp, ctx.shards_sequence
        self.weight, self.normalized = weight, normalized
        part = vocabulary_part(ctx, vocab_size, weight.shape[1])
        self.first, self.valid = part.global_start[0], part.shape[0]

    @property
    def shard(self) -> VocabularyShard:
        """Which columns these are, as the loss wants to know it."""
        return VocabularyShard(self.first, self.valid, self.group, self.sequence_parallel)

    def projection(self) -> Tensor:
        """The matrix [local columns, H] that hidden states are multiplied by."""
        return F.normalize(self.weight, dim=-1) if self.normalized else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[S or S/tp, B, H] to [S, B, local columns]; columns from `valid` on are padding."""
        weight = self.projection()
        if self.group.size == 1:
            return F.linear(x, weight)
        logits: Tensor = _ColumnLinear.apply(x, weight, self.group, self.sequence_parallel, "torch", None)  # see `deferred`
        return logits
