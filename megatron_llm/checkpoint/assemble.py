"""Whole weights out of the rectangles that ranks hold, for checkpoints that are Hugging Face folders.

Each weight gets one writer among all ranks of its pipeline stage, dealt by bytes over tensor- and data-parallel ranks.
The writer collects the rectangles from the ranks of its own tensor-parallel group (every replica has them all), so
replicas work side by side. In a round each rank of a group is the writer of at most one weight: what lies in flight is
about one tensor a rank, never a model, and all links are busy.

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

        They are written to `targets`, host tensors by key. Without it they are views of the model's memory, or, where they
        had to be put together, in new host memory.
        """
        plan = self._plan
        assert plan is not None, "ask for the share first"
        views = {(entry.key, entry.start): entry.tensor.detach() for entry in _held(entries)}
        tp, dp = self._groups.tp, self._groups.dp
        queues = [[whole for whole in plan.tensors if whole.writer == (rank, dp.rank)] for rank in range(tp.size)]
        collected = []
        for turn in range(max(map(len, queues))):
            row = {rank: queue[turn] for rank, queue in enumerate(queues) if turn < len(queue)}
            received = self._trade(row, views)
            if tp.rank in row:
                whole, start = row[tp.rank], (0,) * len(row[tp.rank].shape)
                target = targets[whole.key] if targets is not None else None
                tensor = views.get((whole.key, start))
                if list(whole.boxes) != [tp.rank] or whole.boxes[tp.rank] != [(start, whole.shape)] or tensor is None:
                    tensor = _join(whole, views, received, target)
                elif target is not None:
                    tensor = target.copy_(tensor)
                collected.append(Entry(whole.key, whole.shape, start, tensor))
        return collected

    def _trade(self, row: dict[int, WholeTensor], views: dict[Place, Tensor]) -> dict[int, Tensor]:
        """One round: send this rank's parts of the tensors that others write, receive the parts of the one it writes."""
        tp, device = self._groups.tp, self._groups.device
        sends, received = [], {}
        for writer, whole in row.items():
            if writer == tp.rank:
                for source, boxes in whole.boxes.items():
                    if source != tp.rank:
                        size = sum(math.prod(shape) for _, shape in boxes) * whole.dtype.itemsize
                        received[source] = torch.empty(size, dtype=torch.uint8, device=device)
                    elif device.type == "cuda":  # one copy to the host instead of one for each rectangle
                        received[source] = _pack(whole, source, views)
            elif tp.rank in whole.boxes:
                sends.append((_pack(whole, tp.rank, views), writer))
        exchange(sends, [(buffer, source) for source, buffer in received.items() if source != tp.rank], tp)
        return received

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


def _pack(whole: WholeTensor, rank: int, views: dict[Place, Tensor]) -> Tensor:
    """The bytes of this rank's rectangles of a tensor, one after the other."""
    return torch.cat([views[whole.key, start].contiguous().view(-1) for start, _ in whole.boxes[rank]]).view(torch.uint8)


def _join(whole: WholeTensor, views: dict[Place, Tensor], received: dict[int, Tensor], target: Tensor | None) -> Tensor:
    """The whole tensor in host memory, `target` where given; rectangles that were not received are this rank's own."""
    target = target if target is not None else torch.empty(whole.shape, dtype=whole.dtype)
    for source, boxes in whole.boxes.items():
        flat = received[source].cpu().view(whole.dtype) if source in received else None
        offset = 0
        for start, shape in boxes:
            place = target[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            if flat is None:
                place.copy_(views[whole.key, start])
            else:
                place.copy_(flat.narrow(0, offset, place.numel()).view(shape))
                offset += place.numel()
    return target
