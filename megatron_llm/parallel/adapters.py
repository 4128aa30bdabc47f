"""Low-rank adapters of the parallel layers (Hu et al. 2022, "LoRA"), laid out as the layer they adapt.

An adapter mirrors its layer: its first factor A takes what the layer takes, its second factor B gives what the layer
gives. Beside a column-parallel layer A is whole on every rank and B is split by rows; beside a row-parallel layer A is
split by columns and B is whole, and what it adds is a partial sum, which the layer's own reduction completes. So
adapters need no collectives of their own size: only their narrow middle (`rank` features) is ever gathered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llm.parallel.layers import ColumnParallelLinear, ParallelContext, make_parameter, replicated_parameter
from megatron_llm.parallel.placement import Part, Placement


@dataclass(frozen=True)
class AdapterShape:
    """`rank` features in the middle, the product multiplied by `scale`."""

    rank: int
    scale: float


def _first_factor_std(in_features: int) -> float:
    """The standard deviation of peft's uniform initialisation of A, between -1 / sqrt(in) and 1 / sqrt(in)."""
    return 1.0 / math.sqrt(3.0 * in_features)


class ColumnAdapter(nn.Module):
    """What is added to the local output of a column-parallel layer by one low-rank pair over some of its parts.

    `parts` names the parts that B stacks (one projection's, or all of a fused tensor's); the other parts get zeros.
    Input [S, B, in] ([S/tp, B, in] under sequence parallelism), output [S, B, local out].
    """

    def __init__(
        self, ctx: ParallelContext, layer: ColumnParallelLinear, name: str, parts: Sequence[str], in_features: int, shape: AdapterShape
    ) -> None:
        super().__init__()
        self.scale, self.sizes = shape.scale, list(layer.splits)
        chosen = [part for part in layer.parts if part.name in parts]
        self.chosen = [part.name in parts for part in layer.parts]
        self.a = replicated_parameter(ctx, f"{name}.lora_A.weight", (shape.rank, in_features), std=_first_factor_std(in_features))
        # In the weights' type: its narrow products cost little, and 8 bits would round what is learned.
        self.b = ColumnParallelLinear(replace(ctx, products="torch"), f"{name}.lora_B", shape.rank, chosen, bias=False, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """The addition to the layer's local output."""
        found = self.b(F.linear(x, self.a)) * self.scale
        if all(self.chosen):
            return found
        pieces = iter(found.split([size for size, chosen in zip(self.sizes, self.chosen, strict=True) if chosen], dim=-1))
        return torch.cat(
            [
                next(pieces) if chosen else found.new_zeros(*found.shape[:-1], size)
                for size, chosen in zip(self.sizes, self.chosen, strict=True)
            ],
            dim=-1,
        )


class RowAdapter(nn.Module):
    """What is added to the partial output of a row-parallel layer, before its reduction. [S, B, in/tp] to [S, B, out]."""

    def __init__(self, ctx: ParallelContext, name: str, in_features: int, out_features: int, shape: AdapterShape) -> None:
        super().__init__()
        self.scale = shape.scale
        tp, columns = ctx.tp, in_features // ctx.tp.size
        part = Part("", (shape.rank, in_features), (0, tp.rank * columns), 0, (shape.rank, columns))
        self.a = make_parameter(ctx, Placement(f"{name}.lora_A.weight", (part,)), shape.rank, (columns,), _first_factor_std(in_features))
        whole = Part("", (out_features, shape.rank), (0, 0), 0, (out_features, shape.rank), replicas=tp.size, replica=tp.rank)
        # Each rank's gradient of B comes from its own columns of the input.
        self.b = make_parameter(
            ctx, Placement(f"{name}.lora_B.weight", (whole,), partial_grad=tp.size > 1), out_features, (shape.rank,), None
        )

    def forward(self, x: Tensor) -> Tensor:
        """The addition to the layer's partial output."""
        return F.linear(F.linear(x, self.a), self.b) * self.scale
