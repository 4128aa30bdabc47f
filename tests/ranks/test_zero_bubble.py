"""Split backwards: what is put off, when it is computed, and that real models get 1F1B's gradients to the last bit."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from megatron_llm.config.schema import LoraConfig, RunConfig
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.executor import PipelineExecutor
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.schedules import Action, ActionKind, make_schedule
from megatron_llm.parallel.simulator import Span
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from tests.ranks.equivalence import LR, MICRO, SAMPLES, STEPS, Point, rows, whole_batch
from tests.ranks.test_executor import SHAPE, own_stages, pipeline_of, toy_batches


def train(groups: ParallelGroups, config: RunConfig, point: Point) -> tuple[list[float | None], list[torch.Tensor]]:
    """Losses of two optimizer steps, the gradients of the last and the weights after it, as this rank has them."""
    engine = NativeEngine(config, get_family(point.family), groups)
    losses = []
    for step in range(STEPS):
        batch = whole_batch(point.vocab, step)
        starts = range(groups.dp.rank * MICRO, SAMPLES // 2, MICRO * groups.dp.size)
        micro = [rows(batch, first, MICRO) for first in starts]
        losses.append(engine.compute_gradients(micro, step=step, first_sample=step * SAMPLES)[0])
        engine.optimizer.step(LR)
    return losses, [tensor.clone() for bucket in engine.grad_sync.buckets for tensor in (bucket.owned_grads, bucket.params)]


def compare(groups: ParallelGroups, points: list[Point], lora: LoraConfig) -> int:
    """Every point under 1F1B and under zero-bubble; how many buffers were compared."""
    compared = 0
    for point in points:
        plain = replace(point.config(), lora=lora)
        split = replace(plain, parallel=replace(plain.parallel, pipeline_schedule="zero-bubble"))
        assert plain.parallel.pipeline_schedule == "1f1b"
        (losses, tensors), (losses_too, tensors_too) = train(groups, plain, point), train(groups, split, point)
        assert losses == losses_too and losses[0] is not None
        for one, other in zip(tensors, tensors_too, strict=True):
            assert torch.equal(one, other), point.id
            compared += int(one.abs().sum() > 0)
    return compared


BF16 = (("bf16", True),)
POINTS = {
    "pp2": [Point(1, 2, 1, tied=True), Point(1, 2, 1, family="gpt", options=BF16)],
    "pp2-dp2": [Point(1, 2, 2, tied=True), Point(1, 2, 2, options=(("recompute_granularity", "full"), *BF16))],
    "tp2-pp2": [
        Point(2, 2, 1, sp=True, tied=True, family="gpt", options=BF16),
        Point(2, 2, 1, options=(("recompute_granularity", "selective"),)),
    ],
    "pp4": [Point(1, 4, 1, family="gpt", options=(("hidden_dropout", 0.2), ("recompute_granularity", "full")))],
}


@pytest.mark.parametrize("name", POINTS)
def test_gradients_and_weights_are_those_of_1f1b(name: str) -> None:
    points = POINTS[name]
    results = run_ranks(compare, points, LoraConfig(), tp=points[0].tp, pp=points[0].pp, dp=points[0].dp, timeout=120)
    assert all(compared >= 2 * len(points) for compared in results)


def test_adapters_too() -> None:
    lora = LoraConfig(lora_rank=3, lora_target_modules=["all-linear"])
    assert min(run_ranks(compare, [Point(2, 2, 1, sp=True)], lora, tp=2, pp=2, timeout=120)) >= 2


def started_early(groups: ParallelGroups, point: Point) -> tuple[int, int]:
    """Buckets whose reduction had begun when the pipeline was done, and all buckets."""
    engine = NativeEngine(point.config(), get_family(point.family), groups)
    started = []
    finish, launch_next = engine.grad_sync.finish, engine.grad_sync._launch_next
    batch = whole_batch(point.vocab, 0)
    starts = range(groups.dp.rank * MICRO, SAMPLES // 2, MICRO * groups.dp.size)

    def finish_and_look() -> None:
        started.append(launch.call_count)
        finish()

    with (
        mock.patch.object(engine.grad_sync, "_launch_next", wraps=launch_next) as launch,
        mock.patch.object(engine.grad_sync, "finish", finish_and_look),
    ):
        engine.compute_gradients([rows(batch, first, MICRO) for first in starts], step=0, first_sample=0)
    return started[0], len(engine.grad_sync.buckets)


def test_reductions_begin_with_the_last_weight_gradients() -> None:
    point = Point(1, 2, 2, options=(("pipeline_schedule", "zero-bubble"),))
    for started, buckets in run_ranks(started_early, point, pp=2, dp=2, timeout=120):
        assert started == buckets > 2


def count_deferred(groups: ParallelGroups, count: int) -> int:
    """Most micro-batches that wait for their weight gradients at once; the bias takes its own with the input's."""
    (stage,) = own_stages(groups, 1)
    most = 0

    def look(action: Action) -> None:
        nonlocal most
        waiting = [stage.deferred.parameters(micro) for micro in range(count)]
        assert all(parameters in ([], [stage.weight]) for parameters in waiting)
        most = max(most, sum(map(len, waiting)))

    pipeline = PipelineExecutor([stage], groups, "zero-bubble", torch.float32, look, deferred=[stage.deferred])
    pipeline.run(toy_batches(count), SHAPE)
    assert not any(stage.deferred.parameters(micro) for micro in range(count))
    return most


def test_later_stages_put_off_more_weight_gradients() -> None:
    assert run_ranks(count_deferred, 7, pp=4) == [1, 2, 3, 4]


def run_after_a_failed_step(groups: ParallelGroups) -> list[bool]:
    """Whether gradients are those of a fresh stage although an earlier step ended between the halves of a backward."""
    (stage,) = own_stages(groups, 1)
    stage.deferred.enabled = True
    with stage.deferred.collect(0):
        stage(toy_batches(1)[0], None if groups.is_first_stage else torch.ones(SHAPE)).sum().backward()
    assert stage.deferred.parameters(0) == [stage.weight]
    stage.zero_grad()
    pipeline_of([stage], groups, "zero-bubble").run(toy_batches(3), SHAPE)
    (fresh,) = own_stages(groups, 1)
    pipeline_of([fresh], groups, "1f1b").run(toy_batches(3), SHAPE)
    pairs = [(a.grad, b.grad) for a, b in zip(stage.parameters(), fresh.parameters(), strict=True)]
    return [a is not None and b is not None and torch.equal(a, b) for a, b in pairs]


def test_what_a_failed_step_put_off_is_forgotten() -> None:
    assert run_ranks(run_after_a_failed_step, pp=2) == [[True, True]] * 2


def record_spans(groups: ParallelGroups, count: int) -> list[Span]:
    spans: list[Span] = []
    stages = own_stages(groups, 1)
    pipeline = PipelineExecutor(stages, groups, "zero-bubble", torch.float32, deferred=[stages[0].deferred], on_span=spans.append)
    pipeline.run(toy_batches(count), SHAPE)
    return spans


def test_every_computation_and_wait_is_timed() -> None:
    receives = (ActionKind.RECV_FORWARD, ActionKind.RECV_BACKWARD)
    plan = make_schedule("zero-bubble", 2, 3)
    for actions, spans in zip(plan, run_ranks(record_spans, 3, pp=2), strict=True):
        computed = [span.action for span in spans if span.action.kind not in receives]
        assert computed == [action for action in actions if action.peer is None]
        assert len(spans) - len(computed) == sum(action.kind in receives for action in actions)
        assert all(a.start <= a.end <= b.start for a, b in itertools.pairwise(spans))
