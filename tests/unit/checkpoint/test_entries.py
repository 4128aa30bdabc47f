"""Rectangles: cutting flat ranges, overlaps, and the check that a tensor is covered exactly once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.checkpoint.entries import Entry, overlap, split_flat_range, tiling_problem


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    total = math.prod(shape)
    start = draw(st.integers(0, total))
    return shape, start, draw(st.integers(start, total))


@given(flat_ranges())
@settings(max_examples=300, deadline=None)
def test_pieces_of_a_flat_range_are_that_range(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, end = case
    numbers = torch.arange(math.prod(shape))
    segment = numbers[start:end]
    pieces = split_flat_range(shape, start, end)
    assert len(pieces) <= 2 * len(shape) - 1
    seen = []
    for piece in pieces:
        place = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
        assert torch.equal(numbers.view(shape)[place], piece.view(segment))
        seen += piece.view(segment).flatten().tolist()
    assert seen == list(range(start, end))


def test_a_matrix_shard_is_rest_of_row_rows_and_beginning_of_row() -> None:
    pieces = split_flat_range((5, 4), 3, 18)
    assert [(piece.start, piece.shape, piece.offset) for piece in pieces] == [
        ((0, 3), (1, 1), 0),
        ((1, 0), (3, 4), 1),
        ((4, 0), (1, 2), 13),
    ]


def test_writing_through_a_piece_changes_the_segment() -> None:
    segment = torch.zeros(6)
    split_flat_range((3, 4), 2, 8)[1].view(segment).fill_(7.0)
    assert segment.tolist() == [0, 0, 7, 7, 7, 7]


def test_a_range_outside_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        split_flat_range((2, 3), 0, 7)


@pytest.mark.parametrize(("shape", "start", "local"), [((4, 4), (2, 0), (3, 4)), ((4,), (-1,), (2,)), ((4, 4), (0,), (4, 4)), ((), (), ())])
def test_an_entry_outside_its_tensor_is_refused(shape: tuple[int, ...], start: tuple[int, ...], local: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="key"):
        Entry("key", shape, start, torch.zeros(local))


def test_overlap() -> None:
    assert overlap((0, 0), (3, 3), (2, 1), (4, 5)) == ((2, 1), (1, 2))
    assert overlap((0, 0), (3, 3), (3, 0), (1, 3)) is None


@given(flat_ranges(), st.lists(st.integers(0, 10_000), max_size=5))
@settings(max_examples=100, deadline=None)
def test_shards_of_a_tensor_tile_it_and_any_change_is_found(case: tuple[tuple[int, ...], int, int], cuts: list[int]) -> None:
    shape = case[0]
    total = math.prod(shape)
    bounds = sorted({0, total, *(cut % (total + 1) for cut in cuts)})
    tiles = [(p.start, p.shape) for a, b in zip(bounds, bounds[1:], strict=False) for p in split_flat_range(shape, a, b)]
    assert tiling_problem(shape, tiles) is None
    assert tiling_problem(shape, tiles[1:]) is not None
    assert tiling_problem(shape, [*tiles, tiles[0]]) is not None


def test_overlap_with_the_right_volume_is_found() -> None:
    problem = tiling_problem((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))])
    assert problem is not None and "overlap" in problem
