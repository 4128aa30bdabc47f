"""Any layout equals one process: loss, every gradient, gradient norm, weights after two steps (fp32, relative 1e-5).

The whole matrix is every factorisation of 1, 2, 4 and 8 ranks into tp x pp x dp, with two virtual stages where they
fit, for tied and untied embeddings, sequence parallelism on and off, a vocabulary that divides and one that is prime,
GPT and LLaMA with grouped heads. CI runs a fixed part of it; `-m full` runs all (see docs/guide/testing.md).
"""

import itertools

import pytest

from tests.ranks.equivalence import Point, check_point


def layouts() -> list[tuple[int, int, int, int]]:
    """(tp, pp, dp, vpp) for every factorisation of 1, 2, 4 and 8 ranks."""
    sizes = (1, 2, 4, 8)
    found = [(tp, pp, dp, 1) for tp, pp, dp in itertools.product(sizes, repeat=3) if tp * pp * dp in sizes]
    # Interleaving needs micro-batches in multiples of the stages (24 samples, 3 in a micro-batch) and 8 layers for pp x vpp.
    found += [(tp, pp, dp, 2) for tp, pp, dp, _ in found if pp in (2, 4) and (8 // dp) % pp == 0]
    return found


def matrix() -> list[Point]:
    """Every point."""
    return [
        Point(tp, pp, dp, vpp, family, tied, sp, vocab)
        for tp, pp, dp, vpp in layouts()
        for family, tied, sp, vocab in itertools.product(("llama", "gpt"), (False, True), (False, True), (97, 128))
        if tp > 1 or not sp
    ]


# One point for each layout and both values of every variation, chosen so that neighbours in the list differ in all of them.
CI = [
    Point(2, 1, 1, sp=True),
    Point(1, 2, 1, tied=True, family="gpt"),
    Point(1, 1, 2, vocab=128),
    Point(1, 1, 4, tied=True, family="gpt"),
    Point(4, 1, 1, tied=True, sp=True, family="gpt"),
    Point(2, 2, 1, sp=True, tied=True),
    Point(2, 1, 2, family="gpt", vocab=128),
    Point(1, 2, 2, tied=True),
    Point(1, 2, 1, 2, family="gpt"),
    Point(1, 4, 1, 2, tied=True),
    Point(8, 1, 1, sp=True),
    Point(8, 1, 1, tied=True, family="gpt"),
    Point(1, 8, 1, tied=True, vocab=128),
    Point(2, 2, 2, tied=True, sp=True),
    Point(2, 2, 2, family="gpt", tied=True, sp=True),
    Point(2, 2, 2, 2, tied=True, sp=True, family="gpt"),
    Point(2, 2, 2, 2),
    Point(4, 1, 2, vocab=128, sp=True),
    Point(1, 1, 8),
    Point(2, 4, 1, tied=True, family="gpt"),
]

# What the matrix leaves at its defaults, each against the same one process.
VARIATIONS = [
    Point(2, 2, 2, options=(("use_distributed_optimizer", False),)),
    Point(1, 1, 2, options=(("overlap_grad_reduce", False),)),
    Point(2, 2, 1, options=(("pipeline_schedule", "gpipe"),)),
    Point(1, 2, 2, tied=True, options=(("pipeline_schedule", "zero-bubble"),)),
    Point(1, 4, 1, tied=True, options=(("decoder_first_pipeline_num_layers", 3), ("decoder_last_pipeline_num_layers", 1))),
    Point(2, 2, 1, sp=True, tied=True, options=(("kernels", "torch"),)),
    Point(2, 1, 1, sp=True, options=(("recompute_granularity", "full"),)),
    Point(2, 1, 1, options=(("recompute_granularity", "selective"),)),
    Point(2, 1, 1, sp=True, options=(("num_query_groups", 1),)),
    Point(4, 1, 2, options=(("num_query_groups", 2),)),
    Point(1, 2, 2, family="gpt", options=(("hidden_dropout", 0.2), ("recompute_granularity", "full"))),
]


@pytest.mark.parametrize("point", CI, ids=lambda point: point.id)
def test_equivalence(point: Point) -> None:
    check_point(point)


@pytest.mark.parametrize("point", VARIATIONS, ids=lambda point: point.id)
def test_equivalence_of_variations(point: Point) -> None:
    check_point(point)


@pytest.mark.full
@pytest.mark.parametrize("point", matrix(), ids=lambda point: point.id)
def test_equivalence_of_whole_matrix(point: Point) -> None:
    check_point(point)


def test_matrix_covers_what_it_says() -> None:
    points = matrix()
    assert len({point.id for point in points}) == len(points)
    assert {(p.tp, p.pp, p.dp) for p in points} == {
        (tp, pp, dp) for tp, pp, dp in itertools.product((1, 2, 4, 8), repeat=3) if tp * pp * dp in (1, 2, 4, 8)
    }
    assert {(p.tp, p.pp, p.dp, p.vpp) for p in CI} <= set(layouts())
