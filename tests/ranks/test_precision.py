"""16-bit training under every kind of parallelism at once: close to fp32, main copies in step, overflows skipped together."""

import pytest
import torch

from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.sanity import require_agreement
from tests.ranks.equivalence import LR, MICRO, SAMPLES, Point, reference, rows, whole_batch

CUBE = Point(tp=2, pp=2, dp=2, tied=True, sp=True)


def train(groups: ParallelGroups, point: Point, steps: int) -> list[tuple[float | None, float, bool, float | None]]:
    """(loss, gradient norm, skipped, loss scale) of some steps; weights stay the rounded main copies, copies stay equal."""
    engine = NativeEngine(point.config(), get_family(point.family), groups)
    outcomes = []
    for step in range(steps):
        batch = whole_batch(point.vocab, step % 2)
        starts = range(groups.dp.rank * MICRO, SAMPLES, MICRO * groups.dp.size)
        before = [segment.tensors["main"].clone() for segment in engine.optimizer.segments()]
        outcome = engine.train_step([rows(batch, first, MICRO) for first in starts], step=step, first_sample=0, lr=LR)
        after = [segment.tensors["main"] for segment in engine.optimizer.segments()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == outcome.skipped
        for segment in engine.optimizer.segments():
            weights = segment.parameter.detach().view(-1)[segment.start : segment.end]
            assert weights.dtype != torch.float32 and torch.equal(weights, segment.tensors["main"].to(weights.dtype))
        require_agreement(engine.chunks, groups, step)
        outcomes.append((outcome.loss, outcome.grad_norm, outcome.skipped, outcome.loss_scale))
    return outcomes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_and_norms_are_close_to_fp32(precision: str) -> None:
    point = Point(tp=2, pp=2, dp=2, tied=True, sp=True, options=((precision, True), ("initial_loss_scale", 256.0)))
    expected = reference("llama", True, 97)
    results = run_ranks(train, point, 2, tp=2, pp=2, dp=2, timeout=120)
    assert all(result == results[0] for result in results)
    for step, (loss, norm, skipped, scale) in enumerate(results[0]):
        assert loss == pytest.approx(expected.losses[step], rel=1e-2) and norm == pytest.approx(expected.norms[step], rel=3e-2)
        assert not skipped and scale == (256.0 if precision == "fp16" else None)


def test_fp16_overflow_is_skipped_on_all_ranks_until_the_scale_fits() -> None:
    options = (("fp16", True), ("initial_loss_scale", 2.0**24), ("hysteresis", 1))
    results = run_ranks(train, Point(tp=2, pp=2, dp=2, options=options), 14, tp=2, pp=2, dp=2, timeout=120)
    skipped = [outcome[2] for outcome in results[0]]
    first = skipped.index(False)
    assert first > 0 and skipped == [True] * first + [False] * (14 - first)
    for result in results:
        assert [outcome[2:] for outcome in result] == [outcome[2:] for outcome in results[0]]
    assert [outcome[3] for outcome in results[0]][: first + 1] == [2.0 ** (24 - step) for step in range(first + 1)]
