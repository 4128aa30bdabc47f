"""Process groups over the grid, made once and passed to whoever communicates.

A `Group` of one rank holds no process group at all: collectives over it return their input, so the same layer is a
plain layer on one device. Nothing here is global; two `ParallelGroups` with different grids can live in one process.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_llm.parallel.grid import Grid


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, this process being number `rank` of `size`; `pg` is None when alone.

    `name` is that of the process group, by which an operator in a compiled graph finds it.
    """

    ranks: tuple[int, ...]
    rank: int
    pg: dist.ProcessGroup | None = None
    name: str = ""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


def single_group(rank: int = 0) -> Group:
    """The group of one rank: every collective over it is the identity."""
    return Group(ranks=(rank,), rank=0)


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of one rank.

    tp         ranks that split one layer                       (all-reduce, all-gather, reduce-scatter in the layers)
    dp         replicas that see different samples               (gradient reduction, optimizer shards)
    pp         stages of one pipeline, in stage order            (point to point)
    model      tp x pp: all the ranks of one replica             (gradient norm when replicated, overflow)
    embedding  first and last stage, when they share a tied weight (gradient sum); alone on the stages between
    world      everybody                                         (metrics, barriers)
    """

    grid: Grid
    rank: int
    tp: Group
    dp: Group
    pp: Group
    model: Group
    embedding: Group
    world: Group
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.pp.rank == self.pp.size - 1

    def describe(self) -> str:
        """This rank with its coordinates, as in `rank 5 (tp 1, dp 0, pp 1)`."""
        return self.grid.describe(self.rank)


def single_process_groups(device: torch.device | str = "cpu") -> ParallelGroups:
    """Groups for one process without `torch.distributed`: every layer is its plain self."""
    alone = single_group()
    return ParallelGroups(Grid(), 0, alone, alone, alone, alone, alone, alone, torch.device(device))


def build_groups(grid: Grid, device: torch.device, timeout: timedelta | None = None) -> ParallelGroups:
    """Make this rank's groups. Collective: every rank of the initialised default group calls it with the same grid."""
    rank = dist.get_rank()
    if grid.world_size != dist.get_world_size():
        raise ValueError(f"grid of {grid.world_size} ranks in a world of {dist.get_world_size()}")

    def make(all_ranks: list[tuple[int, ...]]) -> Group:
        mine = single_group(rank)
        for ranks in all_ranks:  # every rank takes part in making every group, in the same order
            pg = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                mine = Group(ranks, ranks.index(rank), pg, pg.group_name if pg is not None else "")
        return mine

    ends: list[tuple[int, ...]] = [(stages[0], stages[-1]) for stages in grid.groups("pp")] if grid.pp > 1 else []
    return ParallelGroups(
        grid=grid,
        rank=rank,
        tp=make(grid.groups("tp")),
        dp=make(grid.groups("dp")),
        pp=make(grid.groups("pp")),
        model=make(grid.groups("tp", "pp")),
        embedding=make(ends),
        world=make(grid.groups("tp", "dp", "pp")),
        device=device,
    )
