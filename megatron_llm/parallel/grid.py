"""Rank arithmetic: which rank holds which coordinates, and which ranks form a group. Pure, no processes.

The grid is one n-dimensional array of ranks. Axes are named and listed from the fastest-varying to the slowest, as
Megatron lays them out, so that tensor-parallel neighbours share a node and pipeline stages are furthest apart:

    tp=2, dp=2, pp=2            pp=0            pp=1
                            dp=0   dp=1     dp=0   dp=1
                            0 1    2 3      4 5    6 7       (each pair is one tp group)
"""

from dataclasses import dataclass

from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class Grid:
    """Sizes of the parallel axes: tensor, data and pipeline parallel, from fastest to slowest."""

    tp: int = 1
    dp: int = 1
    pp: int = 1

    @staticmethod
    def from_world(world_size: int, tp: int, pp: int) -> "Grid":
        """The grid with the data-parallel size that fills `world_size` ranks; UserError when it does not divide."""
        if tp < 1 or pp < 1:
            raise UserError(f"tensor and pipeline parallel sizes must be at least 1, got TP {tp} and PP {pp}")
        if world_size % (tp * pp):
            raise UserError(
                f"{world_size} ranks cannot be laid out as TP {tp} x PP {pp} = {tp * pp}: "
                f"start a multiple of {tp * pp} processes, or change tensor/pipeline-model-parallel-size"
            )
        return Grid(tp=tp, dp=world_size // (tp * pp), pp=pp)

    @property
    def axes(self) -> dict[str, int]:
        """Axis name to size, fastest-varying first."""
        return {"tp": self.tp, "dp": self.dp, "pp": self.pp}

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.dp * self.pp

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, e.g. {"tp": 1, "dp": 0, "pp": 1}."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a grid of {self.world_size} ranks")
        coords = {}
        for name, size in self.axes.items():
            coords[name] = rank % size
            rank //= size
        return coords

    def rank(self, **coords: int) -> int:
        """The rank at these coordinates; an axis not named is at 0."""
        rank, stride = 0, 1
        for name, size in self.axes.items():
            rank += coords.get(name, 0) * stride
            stride *= size
        return rank

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups that vary along `axes` only, each in rank order; together they partition the world."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coords = self.coords(rank)
            fixed = tuple(value for name, value in coords.items() if name not in axes)
            found.setdefault(fixed, []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group along `axes` that holds `rank`."""
        return next(group for group in self.groups(*axes) if rank in group)

    def describe(self, rank: int) -> str:
        """Coordinates as people read them: `rank 5 (tp 1, dp 0, pp 1)`."""
        return f"rank {rank} ({', '.join(f'{name} {value}' for name, value in self.coords(rank).items())})"
