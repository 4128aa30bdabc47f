"""The global gradient norm: each element of each logical parameter counted once, whatever the layout.

Placements say what this rank counts (not a TP replica of another rank's rectangle, not a tied copy, no padding of the
vocabulary); of that each data-parallel rank takes its equal share, replicated or not. The squares are added in fp64, and one
all-reduce over the world adds the ranks' sums, so that every rank gets the same number to the last bit and clips,
or skips, alike. The norm is what gradients are clipped by (Pascanu et al. 2013, "On the difficulty of training
recurrent neural networks").
"""

import math

import torch

from megatron_llm.kernels.dispatch import Kernels, torch_kernels
from megatron_llm.parallel.buffers import Bucket
from megatron_llm.parallel.comm import all_gather_first_dim, all_reduce
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.placement import get_placement

_REPORT_BYTES = 256


class GradNorm:
    """Computes the norm of a GradSync's gradients. Collective over the world."""

    def __init__(self, grad_sync: GradSync, groups: ParallelGroups, kernels: Kernels | None = None) -> None:
        """`kernels` by default in plain torch."""
        self._groups, self._kernels = groups, torch_kernels() if kernels is None else kernels
        self._views = [bucket.grads[start:end] for bucket in grad_sync.buckets for start, end in counted_ranges(bucket)]

    def compute(self) -> float:
        """The L2 norm of all (reduced) gradients; infinite or NaN if and only if a counted gradient is."""
        total = self._sum_of_squares(exact=False)
        if not math.isfinite(total):  # either a gradient is not finite or a square does not fit fp32
            total = self._sum_of_squares(exact=True)
        return math.sqrt(total) if total >= 0 else math.nan

    def _sum_of_squares(self, *, exact: bool) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        for view in self._views:
            # Squaring in fp64 is many times slower, and needed only to tell an overflow of fp32 from a bad gradient.
            total += torch.linalg.vector_norm(view, dtype=torch.float64).square() if exact else self._kernels.sum_of_squares(view)
        return float(all_reduce(total, self._groups.world))


def counted_ranges(bucket: Bucket) -> list[tuple[int, int]]:
    """The ranges of the bucket's buffers whose gradients this rank counts.

    Ranges that are apart only by the zeros between parameters are joined.
    """
    ranges: list[tuple[int, int]] = []
    previous_end = -1  # where the last parameter ended, if it was counted up to its end
    for segment in bucket.segments(bucket.slice_range):
        shift = segment.offset - segment.start
        for start, end in sorted(get_placement(segment.parameter).counted()):
            start, end = max(start, segment.start), min(end, segment.end)
            if start >= end:
                continue
            if ranges and (ranges[-1][1] == start + shift or (start == segment.start and ranges[-1][1] == previous_end)):
                ranges[-1] = (ranges[-1][0], end + shift)
            else:
                ranges.append((start + shift, end + shift))
        previous_end = segment.end + shift
    return ranges


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply gradients by so that their norm is at most `limit`; 1 when `limit` is 0 or not exceeded."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def describe_nonfinite(grad_sync: GradSync, groups: ParallelGroups) -> str:
    """Collective over the world: name the parameter whose gradient went non-finite first, and the rank that holds it.

    First in the backward's order: of the last pipeline stage that has one, the parameter nearest the loss.
    """
    parameter = grad_sync.first_nonfinite()
    report = "" if parameter is None else f"{get_placement(parameter).logical_name} on {groups.describe()}"
    encoded = torch.zeros(1, _REPORT_BYTES, dtype=torch.uint8, device=groups.device)
    text = report.encode()[:_REPORT_BYTES]
    encoded[0, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    reports = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in all_gather_first_dim(encoded, groups.world).cpu()]
    by_stage = sorted((rank for rank in range(len(reports)) if reports[rank]), key=lambda rank: -groups.grid.coords(rank)["pp"])
    return reports[by_stage[0]] if by_stage else "no parameter (the values became finite again)"
