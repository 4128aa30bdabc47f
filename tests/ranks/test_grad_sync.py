"""Gradient sync: sums equal one process's on every layout, holders of a copy agree to the last bit, nothing hangs."""

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from tests.ranks.sync_toys import SHAPES, Piece, ToyChunk, assemble, initial, pieces, samples_of, single_process_gradients, toy_chunks

SAMPLES = 8
VARIANTS = list(itertools.product((False, True), (False, True), (40, 10_000)))  # shard, overlap, bucket size


def backward_all(sync: GradSync, chunks: list[ToyChunk], samples: list[int], *, announce: bool = True) -> None:
    """One micro-batch a sample; chunks go backward from the last to the first, as in a pipeline."""
    for number, sample in enumerate(samples):
        for chunk in reversed(range(len(chunks))):
            if announce and number == len(samples) - 1:
                sync.start_reduction(chunk)
            chunks[chunk](sample).backward()


def reduced(
    groups: ParallelGroups, shard: bool, overlap: bool, bucket_size: int, count: int, dtype: torch.dtype, announce: bool
) -> list[Piece]:
    """Gradients of the second of two steps: the first must leave nothing behind."""
    chunks = toy_chunks(groups, count, dtype)
    sync = GradSync(chunks, groups, shard=shard, overlap=overlap, bucket_size=bucket_size)
    for samples in (samples_of(3, SAMPLES, groups.dp), samples_of(0, SAMPLES, groups.dp)):
        sync.zero_grad()
        backward_all(sync, chunks, samples, announce=announce)
        sync.finish()
    sync.gather_gradients()
    return pieces(chunks, gradients=True)


def all_variants(groups: ParallelGroups, count: int, dtype: torch.dtype) -> list[list[Piece]]:
    """The gradients of every combination of options, on one rank."""
    return [reduced(groups, *variant, count, dtype, announce=True) for variant in VARIANTS]


def expected(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    values = {key: initial(key) for key in SHAPES}
    return single_process_gradients(values, range(SAMPLES), dtype)


LAYOUTS = [(1, 1, 1), (1, 1, 2), (4, 1, 1), (2, 1, 2), (1, 2, 4), (2, 2, 2)]


@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS, ids=[f"tp{tp}-pp{pp}-dp{dp}" for tp, pp, dp in LAYOUTS])
def test_sums_equal_one_process(tp: int, pp: int, dp: int) -> None:
    ranks = run_ranks(all_variants, 1, torch.float32, tp=tp, pp=pp, dp=dp)
    answers = [assemble(rank[variant] for rank in ranks) for variant in range(len(VARIANTS))]
    for answer, variant in zip(answers, VARIANTS, strict=True):
        for key, gradient in expected().items():
            torch.testing.assert_close(answer[key], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, k=key, v=variant: f"{k} {v}: {text}")
    if tp <= 2:  # then no sum has an order: sharding and overlapping change nothing at all
        for (shard, overlap, size), answer in zip(VARIANTS, answers, strict=True):
            same = answers[VARIANTS.index((False, False, size))]
            assert all(torch.equal(answer[key], same[key]) for key in SHAPES), (shard, overlap, size)


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2), (2, 2, 2)], ids=["one", "dp2", "tp2-pp2-dp2"])
def test_bf16_gradients_accumulate_in_fp32(layout: tuple[int, int, int]) -> None:
    tp, pp, dp = layout
    ranks = run_ranks(all_variants, 1, torch.bfloat16, tp=tp, pp=pp, dp=dp)
    for variant in range(len(VARIANTS)):
        answer = assemble(rank[variant] for rank in ranks)
        for key, gradient in expected(torch.bfloat16).items():
            exact = layout in ((1, 1, 1), (1, 1, 2))  # elsewhere the halves that replicas see are rounded to bf16 apart
            torch.testing.assert_close(answer[key], gradient, rtol=1e-6 if exact else 1e-2, atol=1e-5 if exact else 3e-2)


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 2, 2)], ids=["dp2", "pp2-dp2"])
def test_several_chunks_on_a_rank(layout: tuple[int, int, int]) -> None:
    tp, pp, dp = layout
    ranks = run_ranks(all_variants, 2, torch.float32, tp=tp, pp=pp, dp=dp)
    for variant in range(len(VARIANTS)):
        answer = assemble(rank[variant] for rank in ranks)
        for key, gradient in expected().items():
            torch.testing.assert_close(answer[key], gradient, rtol=1e-5, atol=1e-5)


def test_finish_alone_reduces_everything() -> None:
    announced = run_ranks(reduced, True, True, 40, 1, torch.float32, announce=True, dp=2)
    silent = run_ranks(reduced, True, True, 40, 1, torch.float32, announce=False, dp=2)
    first, second = assemble(announced), assemble(silent)
    assert all(torch.equal(first[key], second[key]) for key in SHAPES)


def scattered(groups: ParallelGroups) -> tuple[list[Piece], list[Piece]]:
    """Gradients by the way taken on NCCL, a reduce-scatter, and by gloo's own."""
    with mock.patch("megatron_llm.parallel.grad_sync.scatters_natively", lambda group: True):
        native = reduced(groups, True, True, 40, 1, torch.float32, announce=True)
    return native, reduced(groups, True, True, 40, 1, torch.float32, announce=True)


def test_reduce_scatter_gives_the_same_sums() -> None:
    ranks = run_ranks(scattered, pp=2, dp=2)
    first, second = (assemble(rank[way] for rank in ranks) for way in range(2))
    assert all(torch.equal(first[key], second[key]) for key in SHAPES)


def launches(groups: ParallelGroups) -> list[tuple[str, int, int]]:
    """How many buckets are under way after each micro-batch of a step, by rank's own samples."""
    chunks = toy_chunks(groups)
    sync = GradSync(chunks, groups, shard=False, overlap=True, bucket_size=40)
    # Only one rank's last sample is the one that uses every parameter.
    samples = [3, 1] if groups.dp.rank == 0 else [2, 4]
    counts = []
    for number, sample in enumerate(samples):
        if number == 1:
            sync.start_reduction(0)
        chunks[0](sample).backward()
        counts.append(len(sync._pending))
    sync.finish()
    return [("launched", *counts), ("buckets", len(sync.buckets), len(sync._pending))]


def test_reduction_overlaps_and_waits_in_order_for_a_missing_gradient() -> None:
    complete, lacking = run_ranks(launches, dp=2)
    total = complete[1][1]
    assert complete[0] == ("launched", 0, total), "with every gradient there, all buckets start during the last backward"
    assert lacking[0][1] == 0
    assert lacking[0][2] < total, "buckets behind the one that lacks a gradient wait for finish"


def against_the_order(groups: ParallelGroups) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients that arrive in the opposite of the buckets' order, and what they should sum to."""
    chunk = ToyChunk(["mlp", "embedding"], groups)
    sync = GradSync([chunk], groups, shard=False, overlap=True, bucket_size=10)
    sync.start_reduction(0)
    (chunk.embedding.sum().tanh() * chunk.mlp.sum()).backward()  # type: ignore[operator, union-attr]
    sync.finish()
    with torch.no_grad():
        total = chunk.embedding.sum()  # type: ignore[operator, union-attr]
        mlp = total.tanh() * groups.dp.size
        embedding = (1 - total.tanh() ** 2) * chunk.mlp.sum() * groups.dp.size  # type: ignore[operator, union-attr]
    found = [chunk.mlp.main_grad[0, 0].clone(), chunk.embedding.main_grad[0, 0].clone()]  # type: ignore[union-attr, index]
    return found, [mlp, embedding]


def test_a_bucket_that_is_complete_too_early_waits_for_its_turn() -> None:
    for found, wanted in run_ranks(against_the_order, dp=2):
        torch.testing.assert_close(found, wanted)


def misuse(groups: ParallelGroups) -> list[str]:
    """The errors of wrong orders of calls, each from a fresh GradSync."""
    errors = []

    def fresh() -> tuple[ToyChunk, GradSync]:
        chunk = toy_chunks(groups)[0]
        return chunk, GradSync([chunk], groups, shard=True, overlap=True, bucket_size=40)

    chunk, sync = fresh()
    sync.start_reduction(0)
    chunk(1).backward()
    try:
        chunk(1).backward()
    except RuntimeError as error:
        errors.append(str(error))
    try:
        sync.zero_grad()
    except RuntimeError as error:
        errors.append(str(error))
    try:
        sync.gather_gradients()
    except RuntimeError as error:
        errors.append(str(error))
    sync.finish()
    try:
        chunk(1).backward()
    except RuntimeError as error:
        errors.append(str(error))
    return errors


def test_wrong_orders_of_calls_are_errors() -> None:
    for errors in run_ranks(misuse, dp=2):
        too_late, in_flight, unreduced, finished = errors
        assert "after its reduction began" in too_late
        assert "call finish first" in in_flight
        assert "before finish" in unreduced
        assert "zero_grad is missing" in finished


def disagree(groups: ParallelGroups, axis: str) -> str:
    """Ranks of one group bring different parameters; every one of them gets an error and none hangs."""
    different = groups.grid.coords(groups.rank)[axis] == 1
    names = {"dp": ["mlp", "bias"] if different else ["mlp"], "tp": ["mlp", "bias", "norm"] if different else ["mlp"]}
    try:
        GradSync([ToyChunk(names[axis], groups)], groups, shard=True, overlap=True, bucket_size=40)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_ranks_that_disagree_are_told_and_do_not_hang(axis: str) -> None:
    for message in run_ranks(disagree, axis, **{axis: 2}):
        assert "ranks (0, 1) disagree" in message
