"""Whole weights out of the rectangles that ranks hold, for checkpoints that are Hugging Face folders.

Each weight gets one writer among all ranks of its pipeline stage, dealt by bytes over tensor- and data-parallel ranks.
The writer collects the rectangles from the ranks of its own tensor-parallel group (every replica has them all), so
replicas work side by side. In a round each rank of a group is the writer of a few weights: what lies in flight is some
megabytes a rank, never a model, all links are busy, and ranks wait for each other a few times instead of once a weight.

Who writes what follows from the table of rectangles, which ranks exchange once and again only when it changed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.entries import Entry, tiling_problem
from megatron_llm.checkpoint.exchange import gather_json
from megatron_llm.checkpoint.tensor_file import dtype_from_name, dtype_name
from megatron_llm.parallel.comm import all_reduce, exchange
from megatron_llm.parallel.groups import ParallelGroups

ROUND = 32 * 1024 * 1024  # bytes that a rank puts together in one round, or one weight

Box = tuple[tuple[int, ...], tuple[int, ...]]  # start and shape
Place = tuple[str, tuple[int, ...]]  # key and start


@dataclass(frozen=True)
class WholeTensor:
    """A weight, the rectangles of it that each rank of the tensor-parallel group holds, and its writer's tp and dp rank."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: dict[int, list[Box]]
    writer: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def lies_on(self, rank: int) -> bool:
        """Whether a rank holds it as one rectangle, and no other rank holds any of it."""
        return self.boxes == {rank: [((0,) * len(self.shape), self.shape)]}


@dataclass(frozen=True)
class Share:
    """What this rank writes: `tensors` in the order of the model, as file `number` of `count`, from 0; None for no file."""

    tensors: list[WholeTensor]
    number: int | None
    count: int


@dataclass(frozen=True)
class _Plan:
    table: list[list[Any]]
    tensors: list[WholeTensor]
    number: int | None
    count: int


class WeightCollector:
    """Puts whole weights together at their writers. Its methods are collective over the world."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups
        self._plan: _Plan | None = None

    def share(self, entries: Iterable[Entry]) -> Share:
        """Which whole weights this rank is to write, from the counted entries of all ranks.

        ValueError on every rank when the counted entries of some tensor-parallel group do not cover a tensor exactly once.
        """
        plan = self._plan = self._current_plan(_table(_held(entries)))
        here = (self._groups.tp.rank, self._groups.dp.rank)
        return Share([whole for whole in plan.tensors if whole.writer == here], plan.number, plan.count)

    @torch.no_grad()
    def collect(self, entries: Iterable[Entry], targets: Mapping[str, Tensor] | None = None) -> list[Entry]:
        """The whole weights of this rank's `share`, which must have been asked for with the same entries.

        One that lies whole in this rank's memory is given as it lies there. The others are put together in `targets`, host
        tensors by key, or without it in new host memory.
        """
        plan = self._plan
        assert plan is not None, "ask for the share first"
        views = {(entry.key, entry.start): entry.tensor.detach() for entry in _held(entries)}
        tp, dp = self._groups.tp, self._groups.dp
        queues = [_rounds([whole for whole in plan.tensors if whole.writer == (rank, dp.rank)], ROUND) for rank in range(tp.size)]
        collected = []
        for turn in range(max(map(len, queues))):
            row = {rank: queue[turn] for rank, queue in enumerate(queues) if turn < len(queue)}
            received = self._trade(row, views)
            for whole in row.get(tp.rank, []):
                start = (0,) * len(whole.shape)
                if whole.lies_on(tp.rank):
                    tensor = views[whole.key, start]
                else:
                    tensor = _join(whole, views, received, targets[whole.key] if targets is not None else None)
                collected.append(Entry(whole.key, whole.shape, start, tensor))
        return collected

    def _trade(self, row: dict[int, list[WholeTensor]], views: dict[Place, Tensor]) -> dict[int, "_Stream"]:
        """One round: send this rank's parts of the tensors that others write, receive the parts of those it writes.

        What was received from each rank, in the order of the tensors.
        """
        tp, device = self._groups.tp, self._groups.device
        sends, received = [], {}
        for writer, tensors in row.items():
            if writer != tp.rank:
                parts = _pack(tensors, tp.rank, views)
                if parts is not None:
                    sends.append((parts, writer))
                continue
            for source in sorted({source for whole in tensors for source in whole.boxes}):
                if source != tp.rank:
                    size = sum(_held_by(whole, source) for whole in tensors)
                    received[source] = torch.empty(size, dtype=torch.uint8, device=device)
        exchange(sends, [(buffer, source) for source, buffer in received.items()], tp)
        joined = [whole for whole in row.get(tp.rank, []) if not whole.lies_on(tp.rank)]
        own = _pack(joined, tp.rank, views) if device.type == "cuda" else None
        if own is not None:  # one copy to the host instead of one for each rectangle
            received[tp.rank] = own
        return {source: _Stream(buffer.cpu()) for source, buffer in received.items()}

    def _current_plan(self, table: list[list[Any]]) -> _Plan:
        """The plan in use, made anew on all ranks when the table of any rank is not the one it was made from."""
        groups, plan = self._groups, self._plan
        changed = torch.tensor(int(plan is None or plan.table != table), device=groups.device)
        if not all_reduce(changed, groups.world, op="max").item() and plan is not None:
            return plan
        tensors = _deal(_merge(gather_json(table, groups, groups.tp)), groups.tp.size, groups.dp.size)
        problems = [
            f"{whole.key}: {problem}"
            for whole in tensors
            if (problem := tiling_problem(whole.shape, [box for boxes in whole.boxes.values() for box in boxes]))
        ]
        mine = any(whole.writer == (groups.tp.rank, groups.dp.rank) for whole in tensors)
        everyone = gather_json([mine, problems[:1]], groups)
        found = [problem for _, problems in everyone for problem in problems]
        if found:
            raise ValueError(f"a weight cannot be put together from the ranks of one stage: {found[0]}")
        writers = [rank for rank, (writes, _) in enumerate(everyone) if writes]
        number = writers.index(groups.world.rank) if mine else None
        return _Plan(table, tensors, number, len(writers))


def _held(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.counted and entry.tensor.numel()]


def _table(held: Sequence[Entry]) -> list[list[Any]]:
    """What this rank holds, as JSON: for each key its type, global shape and rectangles, in order."""
    rows: dict[str, list[Any]] = {}
    for entry in held:
        row = rows.setdefault(entry.key, [entry.key, dtype_name(entry.tensor.dtype), list(entry.global_shape), []])
        row[3].append([list(entry.start), list(entry.shape)])
    return list(rows.values())


def _merge(tables: Sequence[list[list[Any]]]) -> list[WholeTensor]:
    """One list of the tensors of a tensor-parallel group, in the order in which its ranks name them."""
    tensors: dict[str, WholeTensor] = {}
    for rank, table in enumerate(tables):
        for key, dtype, shape, boxes in table:
            whole = tensors.setdefault(key, WholeTensor(key, dtype_from_name(dtype), tuple(shape), {}))
            whole.boxes[rank] = [(tuple(start), tuple(extent)) for start, extent in boxes]
    return list(tensors.values())


def _deal(tensors: Sequence[WholeTensor], tp: int, dp: int) -> list[WholeTensor]:
    """Give each tensor a writer, the largest first, each to the rank with the least so far.

    A tensor that lies whole on one rank is written by it or by its replicas, so that nothing is sent.
    """
    load = {(t, d): 0 for d in range(dp) for t in range(tp)}
    writers: dict[str, tuple[int, int]] = {}
    for whole in sorted(tensors, key=lambda tensor: -tensor.size):
        allowed = [place for place in load if len(whole.boxes) > 1 or place[0] in whole.boxes]
        writer = min(allowed, key=load.__getitem__)
        load[writer] += whole.size
        writers[whole.key] = writer
    return [WholeTensor(whole.key, whole.dtype, whole.shape, whole.boxes, writers[whole.key]) for whole in tensors]


class _Stream:
    """Bytes, from which tensors are taken one after the other."""

    def __init__(self, data: Tensor) -> None:
        self._data, self._taken = data, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, a view."""
        size = math.prod(shape) * dtype.itemsize
        part = self._data.narrow(0, self._taken, size)
        self._taken += size
        return part.view(dtype).view(shape)


def _rounds(tensors: Sequence[WholeTensor], limit: int) -> list[list[WholeTensor]]:
    """The tensors in groups of at least one and otherwise at most `limit` bytes, each of one type: so none lies at an odd byte."""
    rounds: list[list[WholeTensor]] = []
    room = 0
    for whole in tensors:
        if not rounds or whole.size > room or whole.dtype != rounds[-1][-1].dtype:
            rounds.append([])
            room = limit
        rounds[-1].append(whole)
        room -= whole.size
    return rounds


def _held_by(whole: WholeTensor, rank: int) -> int:
    """Bytes of a tensor that a rank holds."""
    return sum(math.prod(shape) for _, shape in whole.boxes.get(rank, [])) * whole.dtype.itemsize


def _pack(tensors: Sequence[WholeTensor], rank: int, views: dict[Place, Tensor]) -> Tensor | None:
    """The bytes of this rank's rectangles of some tensors, one after the other; None when it has none."""
    parts = [views[whole.key, start].contiguous().view(-1) for whole in tensors for start, _ in whole.boxes.get(rank, [])]
    return torch.cat(parts).view(torch.uint8) if parts else None


def _join(whole: WholeTensor, views: dict[Place, Tensor], received: dict[int, _Stream], target: Tensor | None) -> Tensor:
    """The whole tensor in host memory, `target` where given; rectangles that were not received are this rank's own."""
    target = target if target is not None else torch.empty(whole.shape, dtype=whole.dtype)
    for source, boxes in whole.boxes.items():
        for start, shape in boxes:
            place = target[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            place.copy_(received[source].take(shape, whole.dtype) if source in received else views[whole.key, start])
    return target
