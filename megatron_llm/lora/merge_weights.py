"""The merged weights: each computed in blocks of rows, in fp32, rounded once, measured against the base, and written."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.checkpoint.hf_folder import INDEX, index_json, plan_shards, shard_names
from megatron_llm.checkpoint.tensor_file import FileSeal, TensorFileWriter, TensorSpec
from megatron_llm.lora.base import Base
from megatron_llm.lora.edits import Edit, toward
from megatron_llm.lora.merge_plan import Plan, Stage, Target, still_tied
from megatron_llm.utils.atomic import write_json
from megatron_llm.utils.progress import Progress

_BLOCK = 1 << 16  # elements computed at a time: they stay in the cache, and in memory that the allocator has at hand
_BUFFERS = 2  # pieces of a file in memory: one is filled while the other is on its way
_TIED = 1e-6  # relative difference up to which two matrices, of which one was computed twice, are one
_Edits = tuple[Stage, list[Edit]]


@dataclass
class Change:
    """How a merged weight, as it is written, differs from the base's in the same type.

    squares, base_squares   of the difference (new rows: of themselves) and of the base, summed
    elements                how many of the base's elements became others; added: elements of new rows
    stages                  for each adapter that touches it: squares of what it changed, before rounding, of what was there
                            before, and the relative change below which it is nothing but rounding
    finite                  whether every element of the merged weight is a number
    """

    squares: float = 0.0
    base_squares: float = 0.0
    elements: int = 0
    added: int = 0
    stages: dict[int, list[float]] = field(default_factory=dict)
    finite: bool = True

    @property
    def norm(self) -> float:
        """Euclidean norm of the difference."""
        return math.sqrt(self.squares)

    @property
    def relative(self) -> float:
        """The same over the norm of the base's weight; infinite where that is 0."""
        return math.sqrt(self.squares / self.base_squares) if self.base_squares else math.inf if self.squares else 0.0

    def by(self, adapter: int) -> float:
        """Norm of what an adapter changed, 0 when that is rounding."""
        squares, before, threshold = self.stages.get(adapter, [0.0, 0.0, 0.0])
        return math.sqrt(squares) if squares > threshold**2 * before else 0.0


def merged_rows(base: Base, target: Target, dtype: torch.dtype | None, change: Change) -> Iterator[Tensor]:
    """Blocks of rows of the merged weight as it is stored, in order, in `dtype` (None: the base's); `change` hears of each.

    Memory: a few blocks. The whole weight where it is stored transposed, or one of its edits needs all rows.
    """
    dtype = dtype if dtype is not None else target.spec.dtype
    for stage in target.stages:
        change.stages[stage.adapter] = [0.0, 0.0, max(edit.threshold for edit in stage.edits)]
    edits = [(stage, [edit.ready() for edit in stage.edits]) for stage in target.stages]
    if target.transposed:
        yield _merged_transposed(base, target, dtype, edits, change)
        return
    known = target.spec.shape[0]
    for first, last in _row_blocks(target.shape, whole=target.needs_all_rows):
        before = base.tensors.read_rows(target.source, min(first, known), min(last, known))
        after = _edited(before, edits, first, last, change).to(dtype)
        _measure(change, before.to(dtype), after)
        yield after


def _merged_transposed(base: Base, target: Target, dtype: torch.dtype, edits: Sequence[_Edits], change: Change) -> Tensor:
    """A weight stored as [in, out], whose edits are by rows of its transpose; merged in place where the type allows it."""
    stored = base.tensors.read(target.source)
    result = stored if stored.dtype == dtype else torch.empty(target.shape, dtype=dtype)
    old, new = stored.t(), result.t()
    for first, last in _row_blocks(tuple(new.shape), whole=target.needs_all_rows):
        before = old[first:last]
        after = _edited(before, edits, first, last, change).to(dtype)
        _measure(change, before.to(dtype), after)
        new[first:last] = after
    return result


def _row_blocks(shape: Sequence[int], *, whole: bool) -> Iterator[tuple[int, int]]:
    """First and last row of blocks of about `_BLOCK` elements."""
    step = max(shape[0], 1) if whole else max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def _edited(before: Tensor, edits: Sequence[_Edits], first: int, last: int, change: Change) -> Tensor:
    """Rows [first, last) after all stages, fp32, from those of them that the base has."""
    block = before.float()
    for stage, ready in edits:
        after = block
        for edit in ready:
            after = edit.apply(after, first, last)
        after = toward(block, after, stage.weight)
        _add_stage(change.stages[stage.adapter], block, after)
        block = after
    return block


def _add_stage(sums: list[float], before: Tensor, after: Tensor) -> None:
    common = min(len(before), len(after))
    sums[0] += _squares(after[:common] - before[:common]) + _squares(after[common:])
    sums[1] += _squares(before)


def _measure(change: Change, before: Tensor, after: Tensor) -> None:
    common = min(len(before), len(after))
    change.squares += _squares(after[:common].float() - before[:common].float()) + _squares(after[common:])
    change.base_squares += _squares(before)
    change.elements += int((after[:common] != before[:common]).sum())
    change.added += after[common:].numel()
    change.finite = change.finite and bool(torch.isfinite(after).all())


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double())) ** 2 if tensor.numel() else 0.0


def tied_after(base: Base, plan: Plan) -> bool:
    """Whether embedding and output layer of a tied base are one matrix after the merge: the same edits, or the same values."""
    if not base.tied:
        return False
    if still_tied(plan.targets, base):
        return True
    embedding, head = plan.targets.get(base.embedding or ""), plan.targets.get(base.head)
    if embedding is None or head is None:
        return False
    if embedding.shape != head.shape or embedding.needs_all_rows != head.needs_all_rows:
        return False
    apart = size = 0.0
    pair = (merged_rows(base, target, torch.float32, Change()) for target in (embedding, head))
    for one, other in zip(*pair, strict=True):
        apart, size = apart + _squares(one - other), size + _squares(one)
    return apart <= _TIED**2 * size


@dataclass(frozen=True)
class WrittenWeights:
    """Seals by file, changes by weight, and how many weights are as they were."""

    seals: dict[str, FileSeal]
    changes: dict[str, Change]
    unchanged: int
    specs: Sequence[TensorSpec]


def output_specs(base: Base, plan: Plan, dtype: torch.dtype | None, *, tied: bool) -> list[TensorSpec]:
    """Every tensor of the merged folder, in the order of layers; integers keep their type whatever `dtype` is."""
    specs = {name: spec for name, spec in base.tensors.specs.items() if not (base.has_copy and name == base.head)}
    if base.tied and not tied:
        source = base.tensors.specs[base.source(base.head)]
        specs[base.head] = TensorSpec(base.head, source.dtype, source.shape)
    result = []
    for name in sorted(specs, key=_natural):
        spec = specs[name]
        shape = plan.targets[name].shape if name in plan.targets else spec.shape
        result.append(TensorSpec(name, dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype, shape))
    return result


def write_weights(
    base: Base, plan: Plan, folder: Path, specs: Sequence[TensorSpec], max_shard_bytes: int, progress: Progress
) -> WrittenWeights:
    """Write the files of weights and their index to an existing folder, some rows in memory at a time."""
    shards = plan_shards(specs, max_shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    changes: dict[str, Change] = {}
    seals: dict[str, FileSeal] = {}
    for name, contents in files.items():
        with TensorFileWriter(folder / name, contents, {"format": "pt"}, buffers=_BUFFERS) as writer:
            for spec in contents:
                _write(writer, base, plan.targets.get(spec.name), spec, changes)
                progress.advance(spec.size)
            seals[name] = writer.close()
    if len(files) > 1:
        write_json(folder / INDEX, index_json(files))
    return WrittenWeights(seals, changes, len(specs) - len(changes), specs)


def _write(writer: TensorFileWriter, base: Base, target: Target | None, spec: TensorSpec, changes: dict[str, Change]) -> None:
    if target is not None:
        changes[spec.name] = Change()
        writer.write_rows(spec.name, merged_rows(base, target, spec.dtype, changes[spec.name]))
        return
    source = base.source(spec.name)
    if not spec.shape:
        writer.write(spec.name, base.tensors.read(source).to(spec.dtype))
        return
    blocks = (base.tensors.read_rows(source, first, last) for first, last in _row_blocks(spec.shape, whole=False))
    writer.write_rows(spec.name, (block.to(spec.dtype) for block in blocks))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def change_table(plan: Plan, written: WrittenWeights) -> list[Mapping[str, object]]:
    """What the report says of each changed weight."""
    return [
        {
            "tensor": name,
            "by": "; ".join(dict.fromkeys(stage.words for stage in plan.targets[name].stages)),
            "norm": change.norm,
            "relative": change.relative if math.isfinite(change.relative) else None,
            "elements": change.elements,
            "new_elements": change.added,
        }
        for name, change in written.changes.items()
    ]
