"""Rank arithmetic, for small grids drawn by hand and for thousands of ranks."""

import pytest

from megatron_llm.parallel.grid import Grid
from megatron_llm.utils.errors import UserError


def test_groups_of_a_cube() -> None:
    grid = Grid(tp=2, dp=2, pp=2)
    assert grid.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert grid.groups("tp", "pp") == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert grid.group_of(5, "dp") == (5, 7)
    assert grid.describe(5) == "rank 5 (tp 1, dp 0, pp 1)"


@pytest.mark.parametrize(("tp", "dp", "pp"), [(8, 64, 8), (4, 1, 3), (1, 1024, 1), (8, 5, 7)])
def test_axes_partition_the_world_and_coordinates_invert(tp: int, dp: int, pp: int) -> None:
    grid = Grid(tp=tp, dp=dp, pp=pp)
    for axes in (("tp",), ("dp",), ("pp",), ("tp", "pp"), ("tp", "dp", "pp")):
        groups = grid.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        assert all(list(group) == sorted(group) for group in groups)
    for rank in range(0, grid.world_size, 7):
        assert grid.rank(**grid.coords(rank)) == rank


def test_world_that_does_not_divide_is_told_with_numbers() -> None:
    with pytest.raises(UserError, match=r"6 ranks cannot be laid out as TP 2 x PP 2 = 4"):
        Grid.from_world(6, tp=2, pp=2)
    with pytest.raises(UserError, match="at least 1"):
        Grid.from_world(4, tp=0, pp=2)
    assert Grid.from_world(12, tp=2, pp=3) == Grid(tp=2, dp=2, pp=3)
