"""Sums of partial gradients over the ranks that hold the same rectangle of a parameter.

Under sequence parallelism each TP rank sees its own part of the sequence, so the gradient of a norm weight is partial
on each (Korthikanti et al. 2022); with fewer key/value heads than TP ranks, neighbours hold the same head and each sees
its own queries. `Placement.partial_grad` marks such parameters and `Part.replicas` tells how many ranks to sum over.

Replicas are consecutive TP ranks, so no process groups beyond the TP group are needed: all partial gradients of a rank
travel in one all-reduce over TP, in a buffer with one place for each distinct shard of a part. All replicas read
the same place, hence the very same bits.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.parallel.buffers import Bucket, Segment
from megatron_llm.parallel.comm import all_reduce
from megatron_llm.parallel.groups import Group
from megatron_llm.parallel.placement import Part, get_placement


def require_agreement(description: str, group: Group, device: torch.device, what: str) -> None:
    """Collective: raise ValueError on every rank of the group unless all pass the same description."""
    if group.size == 1:
        return
    digest = zlib.crc32(description.encode())
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    highest, lowest = all_reduce(extremes, group, op="max").tolist()
    if highest != -lowest:
        raise ValueError(f"ranks {group.ranks} disagree about {what}; on this rank: {description[:500]}")


@dataclass(frozen=True)
class _Sum:
    """One flat range of the gradient buffer to be summed, and its place in the exchange buffer."""

    gradient: Tensor
    start: int


def part_range(part: Part, segment: Segment) -> tuple[int, int]:
    """The part's rows inside the segment, as a flat range of the local parameter; empty when start >= end."""
    row = segment.parameter.numel() // segment.parameter.shape[0]
    start = part.local_start * row
    return max(start, segment.start), min(start + part.numel, segment.end)


class ReplicaSums:
    """The TP sums of one rank's owned gradients. Collective over the TP group, on construction too."""

    def __init__(self, buckets: Sequence[Bucket], tp: Group, device: torch.device) -> None:
        self._tp, self._device = tp, device
        self._sums: list[_Sum] = []
        self._length = 0
        described = []
        for bucket, segment, part, start, end in _partial_ranges(buckets) if tp.size > 1 else ():
            distinct, shard = tp.size // part.replicas, tp.rank // part.replicas
            offset = segment.offset + start - segment.start
            gradient = bucket.grads[offset : offset + end - start]
            self._sums.append(_Sum(gradient, self._length + shard * gradient.numel()))
            self._length += distinct * gradient.numel()
            described.append((get_placement(segment.parameter).logical_name, part.name, part.replicas, start, end))
        require_agreement(repr(described), tp, device, "the parameters they hold copies of")

    def run(self) -> None:
        """Replace each partial gradient by its sum over the replicas."""
        if not self._sums:
            return
        exchange = torch.zeros(self._length, dtype=torch.float32, device=self._device)
        gradients = [entry.gradient for entry in self._sums]
        places = [exchange[entry.start : entry.start + entry.gradient.numel()] for entry in self._sums]
        torch._foreach_copy_(places, gradients)
        all_reduce(exchange, self._tp)
        torch._foreach_copy_(gradients, places)


def _partial_ranges(buckets: Sequence[Bucket]) -> Iterator[tuple[Bucket, Segment, Part, int, int]]:
    """Every range of an owned segment whose gradient is partial: bucket, segment, part, flat start and end."""
    for bucket in buckets:
        for segment in bucket.segments():
            placement = get_placement(segment.parameter)
            for part in placement.parts if placement.partial_grad else ():
                start, end = part_range(part, segment)
                if part.replicas > 1 and start < end:
                    yield bucket, segment, part, start, end
