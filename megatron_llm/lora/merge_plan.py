"""Which weights of the base change, by what, and whether base and adapters belong together: all of it before anything is written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_llm.checkpoint.tensor_file import TensorSpec
from megatron_llm.lora.adapter import Adapter, ModuleParts
from megatron_llm.lora.base import Base
from megatron_llm.lora.edits import AddBias, Deferred, Edit, LowRank, Replace, ReplaceRows, check_factors, deferred
from megatron_llm.utils.errors import UserError

_SAME = 0.02  # relative difference up to which two copies of an embedding are the same one in different types
_SHOWN = 3


@dataclass(frozen=True)
class Stage:
    """What one adapter, by its number, does to a weight: edits in order, and their words for the report."""

    adapter: int
    weight: float
    edits: tuple[Edit, ...]
    words: str
    mirrored: bool = False


@dataclass
class Target:
    """A weight that changes. `rows` are those it has in the end, of the matrix as it is oriented for edits."""

    name: str
    source: str
    transposed: bool
    spec: TensorSpec
    stages: list[Stage] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the merged weight is stored in."""
        shape = list(self.spec.shape)
        for stage in self.stages:
            for edit in stage.edits:
                if isinstance(edit, Replace):
                    shape[1 if self.transposed else 0] = edit.rows
        return tuple(shape)

    @property
    def needs_all_rows(self) -> bool:
        """Whether one of the edits needs the whole matrix at once."""
        return any(edit.needs_all_rows for stage in self.stages for edit in stage.edits)


@dataclass(frozen=True)
class Plan:
    """Targets by name, and the sizes of the vocabulary before and after (None where the base has no known embedding)."""

    targets: dict[str, Target]
    vocab_size: tuple[int, int] | None
    notes: tuple[str, ...]


def make_plan(base: Base, adapters: Sequence[Adapter]) -> Plan:
    """Match every adapter with the base. UserError when one does not belong to it, with what does not fit."""
    targets: dict[str, Target] = {}
    notes: list[str] = []
    for number, adapter in enumerate(adapters):
        _check_names(base, adapter)
        touched: dict[str, list[Edit]] = {}
        words: dict[str, list[str]] = {}
        for module, parts in adapter.modules.items():
            for name, edit, word in _edits(base, adapter, module, parts, targets, check_copies=number == 0):
                touched.setdefault(name, []).append(edit)
                words.setdefault(name, []).append(word)
        stages = {name: Stage(number, adapter.weight, tuple(edits), " and ".join(words[name])) for name, edits in touched.items()}
        if base.tied:
            _tie(base, adapter, stages)
        for name, stage in stages.items():
            target = targets.get(name) or _target(base, name)
            if target.stages and any(isinstance(edit, Replace) for edit in stage.edits):
                notes.append(f"{adapter.folder.name} brings its own {name}, which takes the place of what the adapters before it did to it")
            target.stages.append(stage)
            targets[name] = target
    return Plan(targets, _vocabulary(base, targets), tuple(notes))


def _check_names(base: Base, adapter: Adapter) -> None:
    """Every module of the adapter is in the base, and every one that its settings name is in the adapter."""
    lost = [name for name, parts in adapter.modules.items() if any(base.find(name, kind) is None for kind in _parameters(parts))]
    if len(lost) == len(adapter.modules):
        raise UserError(
            f"{adapter.folder} matches no module of {base.folder}: it is for {_words(lost)}, the base has {_words(base.matrices())}"
        )
    if lost:
        raise UserError(f"{adapter.folder} is for modules that {base.folder} does not have: {_words(lost)}; it was trained on another base")
    found = {base.find(name, "weight") for name, parts in adapter.modules.items() if parts.down is not None}
    missing = [
        module
        for module in base.matrices()
        if f"{module}.weight" not in found and adapter.expects(module) and not (base.tied and f"{module}.weight" == base.head)
    ]
    if missing:
        raise UserError(
            f"{adapter.folder} has no factors for {_words(missing)}, which its target_modules name in {base.folder}: "
            "it was trained on another base, or not saved whole"
        )
    unsaved = adapter.absent_modules_to_save()
    if unsaved:
        raise UserError(
            f"{adapter.folder} lists {_words(unsaved)} under modules_to_save, but holds no weights of it: it was not saved whole"
        )


def _parameters(parts: ModuleParts) -> list[str]:
    needed = ["weight"] if parts.down or parts.tokens else []
    return [*needed, *(["bias"] if parts.up_bias else []), *parts.whole]


def _target(base: Base, name: str) -> Target:
    source = base.source(name)
    return Target(name, source, base.is_transposed(name), base.tensors.specs[source])


def _edits(
    base: Base, adapter: Adapter, module: str, parts: ModuleParts, targets: dict[str, Target], *, check_copies: bool
) -> Iterable[tuple[str, Edit, str]]:
    """Name of a weight, edit and its word, in the order in which they are applied."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, stored in parts.whole.items():
        name = _found(base, module, parameter)
        _check_whole(base, adapter, name, stored)
        if check_copies and parameter in parts.frozen and adapter.initialisation == "plain":
            _check_copy(base, adapter, name, stored)
        shapes[name] = adapter.tensors.specs[stored].shape
        yield name, _replace(adapter, stored, transposed=base.is_transposed(name)), "weights of the adapter"
    if parts.down is None and parts.tokens is None and parts.up_bias is None:
        return
    name = _found(base, module, "weight")
    shape = shapes.get(name) or (targets[name].shape if name in targets else base.tensors.specs[base.source(name)].shape)
    if parts.down is not None:
        yield name, _low_rank(base, adapter, module, parts, name, shape), "DoRA" if parts.magnitude else "LoRA"
    if parts.tokens is not None:
        yield name, _tokens(adapter, module, parts.tokens, shape), "rows of trained tokens"
    if parts.up_bias is not None and parts.up is not None:
        rank = adapter.tensors.specs[parts.up].shape[-1]
        bias = _found(base, module, "bias")
        values = adapter.tensors.read(parts.up_bias).float() * adapter.scaling(module, rank)
        if tuple(values.shape) != base.tensors.specs[bias].shape:
            raise UserError(
                f"{adapter.folder}: the LoRA bias of {module} has {len(values)} values, {bias} has {base.tensors.specs[bias].shape[0]}"
            )
        yield bias, AddBias(values), "LoRA bias"


def _replace(adapter: Adapter, stored: str, *, transposed: bool) -> Replace:
    shape = adapter.tensors.specs[stored].shape
    if not transposed:
        return Replace(shape[0], partial(adapter.tensors.read_rows, stored))
    return Replace(shape[1], lambda first, last: adapter.tensors.read(stored).t()[first:last], needs_all_rows=True)


def _found(base: Base, module: str, parameter: str) -> str:
    name = base.find(module, parameter)
    assert name is not None, "names were checked"
    return name


def _check_whole(base: Base, adapter: Adapter, name: str, stored: str) -> None:
    """Only the vocabulary may change its size."""
    ours, theirs = base.tensors.specs[base.source(name)].shape, adapter.tensors.specs[stored].shape
    same = ours == theirs
    if not same and not (base.has_vocabulary_rows(name) and len(theirs) == len(ours) and theirs[0] > 0 and theirs[1:] == ours[1:]):
        raise UserError(
            f"{adapter.folder} holds {name} of shape {list(theirs)}, in {base.folder} it has {list(ours)}: "
            "base and adapter do not belong together"
        )


def _check_copy(base: Base, adapter: Adapter, name: str, stored: str) -> None:
    """The base's matrix that peft saves beside its factors is the matrix of this base."""
    rows = min(base.tensors.specs[base.source(name)].shape[0], adapter.tensors.specs[stored].shape[0])
    apart = whole = 0.0
    for first in range(0, rows, 4096):
        ours = base.tensors.read_rows(base.source(name), first, min(first + 4096, rows)).float()
        theirs = adapter.tensors.read_rows(stored, first, min(first + 4096, rows)).float()
        apart, whole = apart + float((ours - theirs).square().sum()), whole + float(ours.square().sum())
    if apart > _SAME**2 * whole:
        raise UserError(
            f"{adapter.folder} was trained on another base: the copy of {name} that it holds differs from that of {base.folder} "
            f"by {(apart / max(whole, 1e-30)) ** 0.5:.2g} of its norm"
        )


def _low_rank(base: Base, adapter: Adapter, module: str, parts: ModuleParts, name: str, shape: tuple[int, ...]) -> Deferred:
    assert parts.down is not None and parts.up is not None
    if len(shape) != 2:
        raise UserError(f"{adapter.folder}: {name} of {base.folder} has shape {list(shape)}, only matrices can be merged")
    oriented = shape[::-1] if base.is_transposed(name) else shape
    specs, step = adapter.tensors.specs, -1 if parts.embedding else 1
    names = (parts.up, parts.down)[::step]
    check_factors(f"{adapter.folder} and {base.folder}, {name}", oriented, *(specs[stored].shape[::step] for stored in names))
    size = oriented[1] if parts.embedding else oriented[0]
    if parts.magnitude is not None and specs[parts.magnitude].shape != (size,):
        raise UserError(
            f"{adapter.folder}: DoRA's magnitude of {module} has shape {list(specs[parts.magnitude].shape)}, {name} needs {[size]}"
        )
    start = "plain" if parts.whole.get("weight") or parts.embedding else adapter.initialisation
    if start == "olora" and base.is_transposed(name):
        raise UserError(f"{adapter.folder}: OLoRA of {name}, which is stored transposed, cannot be merged")
    scale = adapter.scaling(module, specs[parts.down].shape[0])

    def build() -> LowRank:
        up, down = (adapter.tensors.read(stored).float() for stored in names)
        if parts.embedding:
            up, down = up.t().contiguous(), down.t().contiguous()
        magnitude = adapter.tensors.read(parts.magnitude).float() if parts.magnitude is not None else None
        return LowRank(up, down, scale, magnitude, across=parts.embedding, initialisation=start)

    return deferred(build, magnitude=parts.magnitude is not None, across=parts.embedding, initialisation=start)


def _tokens(adapter: Adapter, module: str, stored: str, shape: tuple[int, ...]) -> ReplaceRows:
    rows, ids = adapter.tensors.read(stored), adapter.token_ids(module)
    if tuple(rows.shape) != (len(ids), *shape[1:]):
        raise UserError(
            f"{adapter.folder}: trained tokens of {module} have shape {list(rows.shape)}, expected {[len(ids), *shape[1:]]}: "
            "base and adapter do not belong together"
        )
    outside = [index for index in ids if not 0 <= index < shape[0]]
    if outside:
        raise UserError(
            f"{adapter.folder} trains token {outside[0]} of {module}, but base and adapter have {shape[0]} rows: its rows were not saved"
        )
    return ReplaceRows(tuple(ids), rows)


def _tie(base: Base, adapter: Adapter, stages: dict[str, Stage]) -> None:
    """What an adapter does to one of two tied matrices, it does to the other where peft kept them tied."""
    assert base.embedding is not None
    pair = (base.embedding, base.head)
    given = [name for name in pair if name in stages]
    if len(given) != 1:
        return
    (name,) = given
    (other,) = (each for each in pair if each != name)
    stage = stages[name]
    if adapter.keeps_tying or all(isinstance(edit, ReplaceRows) for edit in stage.edits):
        stages[other] = Stage(stage.adapter, stage.weight, stage.edits, stage.words, mirrored=True)
        stages[name] = Stage(stage.adapter, stage.weight, stage.edits, stage.words, mirrored=True)


def _vocabulary(base: Base, targets: dict[str, Target]) -> tuple[int, int] | None:
    """Rows of the embedding before and after; those of the output layer must be as many."""
    if base.embedding is None:
        return None

    def rows(name: str) -> int:
        return targets[name].shape[0] if name in targets else base.tensors.specs[base.source(name)].shape[0]

    before, after = base.tensors.specs[base.embedding].shape[0], rows(base.embedding)
    if rows(base.head) != after:
        raise UserError(
            f"the adapters change the vocabulary to {after} entries in {base.embedding} and {rows(base.head)} in {base.head}: "
            "one of the two was not saved with the adapter (save_embedding_layers=True, or modules_to_save)"
        )
    return before, after


def still_tied(targets: dict[str, Target], base: Base) -> bool:
    """Whether embedding and output layer of a tied base are still one after the merge, as far as the edits alone tell."""
    embedding, head = targets.get(base.embedding or ""), targets.get(base.head)
    if embedding is None and head is None:
        return True
    return embedding is not None and head is not None and all(stage.mirrored for stage in (*embedding.stages, *head.stages))


def _words(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
