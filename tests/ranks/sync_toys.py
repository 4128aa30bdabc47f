"""Toy model chunks whose gradients are known in closed form, for the tests of gradient sync and the optimizer.

The loss of sample s is the sum over all logical tensors of 0.5 * |p - target(s)|^2, so one process's answer is a few
lines. The chunks hold those tensors in every way a real model does: rows sharded with padding, a fused weight whose
second part is shared by neighbouring TP ranks, replicated with equal and with partial gradients, tied across stages,
vectors and matrices, prime sizes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_llm.parallel.groups import Group, ParallelGroups
from megatron_llm.parallel.placement import Part, Placement, get_placement, set_placement

# Logical tensors by name and part: the global answer is a dict with these keys.
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding/": (11, 6),
    "qkv/q": (8, 6),
    "qkv/k": (6, 6),
    "norm/": (13,),
    "unused/": (3, 5),
    "mlp/": (12, 7),
    "bias/": (5,),
}
FIRST_STAGE, LAST_STAGE = ("embedding", "qkv", "norm"), ("mlp", "unused", "bias", "head")


def _values(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial(key: str) -> Tensor:
    """Global initial values."""
    return _values(1 + list(SHAPES).index(key), SHAPES[key])


def target(key: str, sample: int) -> Tensor:
    """Global target of one sample."""
    return _values(1000 * (sample + 1) + list(SHAPES).index(key), SHAPES[key])


def uses(key: str, sample: int) -> bool:
    """Whether a sample's loss depends on the tensor: `unused` is used by sample 1 alone."""
    return key != "unused/" or sample == 1


def _row_sharded(name: str, part: str, tp: Group, local_start: int, shards: int | None = None) -> Part:
    """This rank's rows of a logical tensor, cut into `shards` (default: TP) equal shards, the last ones maybe short."""
    shape = SHAPES[f"{name}/{part}"]
    shards = shards or tp.size
    replicas = tp.size // shards
    rows = -(-shape[0] // shards)
    start = min((tp.rank // replicas) * rows, shape[0])
    count = min(rows, shape[0] - start)
    return Part(part, shape, (start, *(0,) * (len(shape) - 1)), local_start, (count, *shape[1:]), replicas, tp.rank % replicas)


def _placement(name: str, groups: ParallelGroups) -> tuple[Placement, int]:
    """The placement of one parameter, and its local rows."""
    tp, split = groups.tp, groups.embedding.size > 1
    if name in ("embedding", "head"):
        part = _row_sharded("embedding", "", tp, 0)
        return Placement("embedding", (part,), tied=split, tied_copy=split and name == "head"), -(-11 // tp.size)
    if name == "qkv":
        q, k = _row_sharded(name, "q", tp, 0), _row_sharded(name, "k", tp, 8 // tp.size, shards=min(2, tp.size))
        return Placement(name, (q, k), partial_grad=k.replicas > 1), q.shape[0] + k.shape[0]
    if name == "mlp":
        part = _row_sharded(name, "", tp, 0)
        return Placement(name, (part,)), part.shape[0]
    shape = SHAPES[f"{name}/"]
    part = Part("", shape, (0,) * len(shape), 0, shape, replicas=tp.size, replica=tp.rank)
    return Placement(name, (part,), partial_grad=name == "norm"), shape[0]


def _cut(part: Part, whole: Tensor) -> Tensor:
    return whole[tuple(slice(start, start + size) for start, size in zip(part.global_start, part.shape, strict=True))]


class ToyChunk(nn.Module):
    """One model chunk holding the named parameters; `forward(sample)` is its part of the sample's loss."""

    def __init__(self, names: Sequence[str], groups: ParallelGroups, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name in names:
            placement, rows = _placement(name, groups)
            data = torch.zeros(rows, *placement.parts[0].shape[1:])
            for part in placement.parts:
                part.view(data).copy_(_cut(part, initial(f"{placement.logical_name}/{part.name}")))
            self.register_parameter(name, set_placement(nn.Parameter(data.to(dtype)), placement))

    def forward(self, sample: int) -> Tensor:
        """Scalar loss in fp32."""
        total = torch.zeros(())
        for parameter in self.parameters():
            placement = get_placement(parameter)
            for part in placement.parts:
                key = f"{placement.logical_name}/{part.name}"
                if uses(key, sample):
                    share = _share(placement, part)
                    wanted = _cut(part, target(key, sample)).to(parameter.dtype)
                    total = total + share * 0.5 * (part.view(parameter) - wanted).square().sum(dtype=torch.float32)
        return total


def _share(placement: Placement, part: Part) -> float:
    """How much of the gradient this holder sees: unequal powers of two that add up to 1 over partial replicas and over tied copies."""
    share = 1.0
    if placement.partial_grad and part.replicas > 1:
        share = 2.0 ** -min(part.replica + 1, part.replicas - 1)
    if placement.tied:
        share *= 0.75 if placement.tied_copy else 0.25
    return share


def toy_chunks(groups: ParallelGroups, chunks: int = 1, dtype: torch.dtype = torch.float32) -> list[ToyChunk]:
    """This stage's chunks. On one stage the head is the embedding: the same Parameter, registered twice."""
    if groups.pp.size == 1:
        names = [*FIRST_STAGE, *LAST_STAGE[:-1]]
        middle = len(names) // chunks if chunks > 1 else len(names)
        found = [ToyChunk(part, groups, dtype) for part in (names[:middle], names[middle:]) if part]
        found[0].register_parameter("head", found[0].embedding)  # type: ignore[arg-type]
        return found
    names = list(FIRST_STAGE if groups.is_first_stage else LAST_STAGE)
    return [ToyChunk(names, groups, dtype)] if chunks == 1 else [ToyChunk(names[:1], groups, dtype), ToyChunk(names[1:], groups, dtype)]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a global tensor as one rank has it."""

    key: str
    start: tuple[int, ...]
    data: Tensor


def pieces(chunks: Iterable[nn.Module], *, gradients: bool) -> list[Piece]:
    """All rectangles this rank holds, owned or not, of gradients or values."""
    found = []
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        placement = get_placement(parameter)
        local = parameter.main_grad if gradients else parameter.detach()  # type: ignore[attr-defined]
        found += [Piece(f"{placement.logical_name}/{part.name}", part.global_start, part.view(local).clone()) for part in placement.parts]
    return found


def assemble(ranks: Iterable[list[Piece]]) -> dict[str, Tensor]:
    """Global tensors; everything covered, and whatever several ranks hold equal to the last bit."""
    whole = {key: torch.full(shape, float("nan"), dtype=torch.float32) for key, shape in SHAPES.items()}
    for piece in (piece for rank in ranks for piece in rank):
        view = whole[piece.key][tuple(slice(start, start + size) for start, size in zip(piece.start, piece.data.shape, strict=True))]
        known = ~view.isnan()
        assert torch.equal(view[known], piece.data.float()[known]), f"holders of {piece.key} differ"
        view.copy_(piece.data)
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key} is not covered"
    return whole


def samples_of(step: int, count: int, dp: Group) -> list[int]:
    """The sample ids of one data-parallel rank in a step of `count` samples, one a micro-batch."""
    return [step * count + sample for sample in range(dp.rank, count, dp.size)]


def single_process_gradients(values: dict[str, Tensor], samples: Iterable[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Summed gradients by autograd on whole tensors; parameters in `dtype`, sums in fp32."""
    totals = {key: torch.zeros_like(value) for key, value in values.items()}
    for sample in samples:
        leaves = {key: value.to(dtype).requires_grad_() for key, value in values.items()}
        used = [key for key in leaves if uses(key, sample)]
        loss = sum(((leaves[key] - target(key, sample).to(dtype)).square().sum(dtype=torch.float32) * 0.5 for key in used), torch.zeros(()))
        for key, gradient in zip(used, torch.autograd.grad(loss, [leaves[key] for key in used]), strict=True):
            totals[key] += gradient
    return totals
