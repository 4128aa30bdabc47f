"""The pipeline executor on toy stages: outputs and gradients equal those of one process, bit for bit, under every schedule."""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llm.parallel import executor
from megatron_llm.parallel.deferred import DeferredGradients, linear
from megatron_llm.parallel.executor import PipelineExecutor
from megatron_llm.parallel.groups import ParallelGroups, single_process_groups
from megatron_llm.parallel.p2p import Mailbox
from megatron_llm.parallel.schedules import Action, ActionKind, forward_part, make_schedule, post_early
from megatron_llm.parallel.simulator import peak_activations
from megatron_llm.testing.pool import RankError
from megatron_llm.testing.ranks import run_ranks

SHAPE = (5, 2, 8)  # sequence, batch, hidden


class ToyStage(nn.Module):
    """One virtual stage: a small nonlinear map; the first reads the batch, the last returns a loss. Seeded by its place."""

    def __init__(self, virtual: int, depth: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.last, self.deferred = virtual == 0, virtual == depth - 1, DeferredGradients()
        generator = torch.Generator().manual_seed(virtual)
        self.weight = nn.Parameter((torch.randn(SHAPE[2], SHAPE[2], generator=generator) * 0.3).to(dtype))
        self.bias = nn.Parameter((torch.randn(SHAPE[2], generator=generator) * 0.1).to(dtype))

    def forward(self, batch: tuple[Tensor, Tensor], hidden: Tensor | None) -> Tensor:
        assert (hidden is None) == self.first
        source = batch[0] if hidden is None else hidden
        result = torch.tanh(linear(source, self.weight, self.bias, self.deferred)) + source * source
        return (result - batch[1]).square().sum().float() if self.last else result


def toy_batches(count: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple((torch.randn(SHAPE, generator=generator) * 0.1).to(dtype) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def one_process(depth: int, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[list[Tensor], list[ToyStage]]:
    """Losses and stages with gradients, all stages run in sequence."""
    stages = [ToyStage(virtual, depth, dtype) for virtual in range(depth)]
    losses = []
    for batch in batches:
        hidden: Tensor | None = None
        for stage in stages:
            hidden = stage(batch, hidden)
        assert hidden is not None
        hidden.backward()
        losses.append(hidden.detach())
    return losses, stages


def own_stages(groups: ParallelGroups, chunks: int, dtype: torch.dtype = torch.float32) -> list[ToyStage]:
    size = groups.pp.size
    return [ToyStage(chunk * size + groups.pp.rank, chunks * size, dtype) for chunk in range(chunks)]


def pipeline_of(stages: list[ToyStage], groups: ParallelGroups, schedule: str, dtype: torch.dtype = torch.float32) -> PipelineExecutor:
    return PipelineExecutor(stages, groups, schedule, dtype, deferred=[stage.deferred for stage in stages])


def check_against_one_process(groups: ParallelGroups, schedule: str, chunks: int, micros: list[int], dtype: torch.dtype) -> int:
    """Compare everything on this rank; returns how many tensors were compared."""
    compared = 0
    for count in micros:
        batches = toy_batches(count, dtype, seed=groups.dp.rank * 10 + groups.tp.rank)
        losses, reference = one_process(groups.pp.size * chunks, batches, dtype)
        stages = own_stages(groups, chunks, dtype)
        pipeline = pipeline_of(stages, groups, schedule, dtype)

        outputs = pipeline.run(batches, SHAPE, forward_only=True)
        assert all(parameter.grad is None for stage in stages for parameter in stage.parameters())
        outputs += pipeline.run(batches, SHAPE)
        assert len(outputs) == (2 * count if groups.is_last_stage else 0)
        for output, loss in zip(outputs, losses * 2, strict=False):
            assert not output.requires_grad
            assert torch.equal(output, loss)
            compared += 1
        for chunk, stage in enumerate(stages):
            plain = reference[chunk * groups.pp.size + groups.pp.rank]
            for mine, theirs in zip(stage.parameters(), plain.parameters(), strict=True):
                assert mine.grad is not None and theirs.grad is not None
                assert theirs.grad.abs().sum() > 0
                assert torch.equal(mine.grad, theirs.grad), (schedule, chunks, count)
                compared += 1
    return compared


LAYOUTS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1)]


@pytest.mark.parametrize("pp", [2, 4], ids=["pp2", "pp4"])
@pytest.mark.parametrize(("schedule", "chunks"), LAYOUTS, ids=[f"{name}-vpp{chunks}" for name, chunks in LAYOUTS])
def test_equal_to_one_process(schedule: str, chunks: int, pp: int) -> None:
    results = run_ranks(check_against_one_process, schedule, chunks, [1, 3, 4, 7], torch.float32, pp=pp)
    assert results[0] == 4 * 2 * chunks
    assert results[-1] == 4 * 2 * chunks + 2 * (1 + 3 + 4 + 7)


class BlockingMailbox(Mailbox):
    """Transfers that hold this rank until the other end has met them: the strictest there are."""

    def post_receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, tag: int) -> Tensor:  # type: ignore[override]
        return super().post_receive(shape, dtype, source, 0).take()  # no tags either, as on NCCL

    def post_send(self, tensor: Tensor, target: int, way: str, tag: int) -> None:
        super().post_send(tensor, target, way, 0)
        self.finish()


def check_with_blocking_transfers(groups: ParallelGroups, schedule: str, chunks: int, micros: list[int]) -> int:
    with mock.patch.object(executor, "Mailbox", BlockingMailbox), mock.patch.object(executor, "matches_tags", lambda group: False):
        return check_against_one_process(groups, schedule, chunks, micros, torch.float32)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_plans_need_no_transfers_in_the_background(schedule: str, chunks: int) -> None:
    assert len(run_ranks(check_with_blocking_transfers, schedule, chunks, [3, 8], pp=4)) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_hidden_states_may_be_16_bit(dtype: torch.dtype) -> None:
    run_ranks(check_against_one_process, "interleaved", 2, [4], dtype, pp=2)


def test_pipelines_side_by_side_do_not_mix() -> None:
    run_ranks(check_against_one_process, "1f1b", 1, [5], torch.float32, tp=2, dp=2, pp=2)


@pytest.mark.parametrize(("schedule", "chunks"), LAYOUTS)
def test_one_stage_needs_no_process_group(schedule: str, chunks: int) -> None:
    assert check_against_one_process(single_process_groups(), schedule, chunks, [1, 4], torch.float32) == 2 * 2 * chunks + 2 * 5


def compare_with_torch(groups: ParallelGroups, chunks: int, count: int) -> int:
    """The same stages under torch's own schedule; returns how many gradients were compared."""
    from torch.distributed import pipelining  # here, because every rank imports this module

    batches = toy_batches(count)
    size, rank = groups.pp.size, groups.pp.rank
    mine = own_stages(groups, chunks)
    outputs = PipelineExecutor(mine, groups, "auto", torch.float32).run(batches, SHAPE)

    theirs = own_stages(groups, chunks)
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))  # torch splits along the first dimension
    wrapped = [TorchStage(stage) for stage in theirs]
    torch_stages = [
        pipelining.PipelineStage(module, chunk * size + rank, chunks * size, groups.device, group=groups.pp.pg)
        for chunk, module in enumerate(wrapped)
    ]
    arguments: dict[str, Any] = {"n_microbatches": count, "loss_fn": torch_loss, "scale_grads": False}
    one_chunk = pipelining.Schedule1F1B(torch_stages[0], **arguments)
    runner = one_chunk if chunks == 1 else pipelining.ScheduleInterleaved1F1B(torch_stages, **arguments)
    losses: list[Tensor] = []
    runner.step(*([inputs] if groups.is_first_stage else []), **({"target": targets, "losses": losses} if groups.is_last_stage else {}))
    assert len(losses) == len(outputs)
    for loss, output in zip(losses, outputs, strict=True):
        torch.testing.assert_close(output, loss.detach(), rtol=1e-6, atol=1e-6)
    compared = 0
    for my_stage, their_stage in zip(mine, theirs, strict=True):
        for a, b in zip(my_stage.parameters(), their_stage.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)
            compared += 1
    return compared


class TorchStage(nn.Module):
    """A toy stage as torch's pipelining wants it: one input, and the loss apart."""

    def __init__(self, stage: ToyStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, source: Tensor) -> Tensor:
        return torch.tanh(F.linear(source, self.stage.weight, self.stage.bias)) + source * source


def torch_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


@pytest.mark.parametrize(("pp", "chunks", "count"), [(2, 1, 4), (4, 1, 6), (2, 2, 4)], ids=["pp2-1f1b", "pp4-1f1b", "pp2-vpp2-interleaved"])
def test_equal_to_torch_pipelining(pp: int, chunks: int, count: int) -> None:
    assert run_ranks(compare_with_torch, chunks, count, pp=pp) == [2 * chunks] * pp


class LiveCounter:
    """Counts (chunk, micro-batch) pairs for which autograd holds saved tensors."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}
        self.most = 0

    @contextmanager
    def watch(self, key: tuple[int, int]) -> Iterator[None]:
        def pack(tensor: Tensor) -> "Held":
            return Held(tensor, self, key)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            yield


class Held:
    """A saved tensor that tells the counter when it is let go."""

    def __init__(self, tensor: Tensor, counter: LiveCounter, key: tuple[int, int]) -> None:
        self.tensor, self.counter, self.key = tensor, counter, key
        counter.held[key] = counter.held.get(key, 0) + 1
        counter.most = max(counter.most, len(counter.held))

    def __del__(self) -> None:
        self.counter.held[self.key] -= 1
        if self.counter.held[self.key] == 0:
            del self.counter.held[self.key]


def watched(stage: ToyStage, chunk: int, counter: LiveCounter, batches: list[Any]) -> Callable[[Any, Tensor | None], Tensor]:
    def run(batch: Any, hidden: Tensor | None) -> Tensor:
        micro = next(i for i, candidate in enumerate(batches) if candidate is batch)
        with counter.watch((chunk, micro)):
            return stage(batch, hidden)

    return run


def measure_live(groups: ParallelGroups, schedule: str, chunks: int, count: int) -> tuple[int, int]:
    batches, counter = toy_batches(count), LiveCounter()
    stages = [watched(stage, chunk, counter, batches) for chunk, stage in enumerate(own_stages(groups, chunks))]
    PipelineExecutor(stages, groups, schedule, torch.float32).run(batches, SHAPE)
    return counter.most, len(counter.held)


@pytest.mark.parametrize(("schedule", "chunks", "count"), [("gpipe", 1, 6), ("1f1b", 1, 6), ("interleaved", 2, 8), ("interleaved", 2, 5)])
def test_live_activations_are_what_the_simulator_says(schedule: str, chunks: int, count: int) -> None:
    plan = make_schedule(schedule, 4, count, chunks)
    results = run_ranks(measure_live, schedule, chunks, count, pp=4)
    assert results == [(peak_activations(actions), 0) for actions in plan]


class NumpyBacked(torch.autograd.Function):
    """Identity whose output lives in a numpy array, so that the end of its memory can be observed."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, alive: set[int]) -> Tensor:
        array = source.detach().numpy().copy()
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        return torch.from_numpy(np.asarray(array))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def count_outputs(groups: ParallelGroups, count: int) -> int:
    """Most outputs of the first stage in memory at once under GPipe, which keeps all graphs."""
    (stage,) = own_stages(groups, 1)
    alive: set[int] = set()
    most = 0

    def run(batch: Any, hidden: Tensor | None) -> Tensor:
        nonlocal most
        output = NumpyBacked.apply(stage(batch, hidden), alive) if groups.is_first_stage else stage(batch, hidden)
        most = max(most, len(alive))
        return output

    PipelineExecutor([run], groups, "gpipe", torch.float32).run(toy_batches(count), SHAPE)
    assert not alive
    return most


def test_an_output_is_let_go_when_it_is_sent() -> None:
    first, last = run_ranks(count_outputs, 8, pp=2)
    assert 1 <= first <= 2, "the one being computed and the one being sent"
    assert last == 0


def record_events(groups: ParallelGroups, chunks: int, count: int, forward_only: bool) -> list[Action | int]:
    events: list[Action | int] = []
    schedule = "auto" if chunks > 1 else "zero-bubble"
    stages = own_stages(groups, chunks)
    pipeline = PipelineExecutor(
        stages, groups, schedule, torch.float32, on_action=events.append, deferred=[stage.deferred for stage in stages]
    )

    def announced(chunk: int, awaited: Collection[nn.Parameter] | None) -> None:
        assert awaited is None if chunks > 1 else awaited == [stages[0].weight]
        events.append(chunk)

    pipeline.run(toy_batches(count), SHAPE, forward_only=forward_only, before_last_backward=announced)
    return events


def test_last_backward_is_announced_once_a_chunk_and_actions_are_observable() -> None:
    for rank, events in enumerate(run_ranks(record_events, 2, 5, False, pp=2)):
        actions = [event for event in events if isinstance(event, Action)]
        assert tuple(actions) == post_early(make_schedule("interleaved", 2, 5, 2)[rank])
        for chunk in (0, 1):
            announced = events.index(chunk)
            assert events.count(chunk) == 1
            assert events[announced - 1] == Action(ActionKind.BACKWARD, chunk, 4)
            later = events[announced:]
            assert not any(isinstance(e, Action) and e.kind is ActionKind.BACKWARD and e.chunk == chunk for e in later)
    for rank, events in enumerate(run_ranks(record_events, 1, 3, True, pp=2)):
        assert tuple(events) == post_early(forward_part(make_schedule("1f1b", 2, 3)[rank]))
    for rank, events in enumerate(run_ranks(record_events, 1, 3, False, pp=2)):
        assert tuple(event for event in events if isinstance(event, Action)) == post_early(make_schedule("zero-bubble", 2, 3)[rank])
        assert events.count(0) == 1 and events[events.index(0) - 1] == Action(ActionKind.WEIGHT, 0, 2)


def run_frozen_first_stage(groups: ParallelGroups) -> list[bool]:
    (stage,) = own_stages(groups, 1)
    stage.requires_grad_(not groups.is_first_stage)
    PipelineExecutor([stage], groups, "1f1b", torch.float32).run(toy_batches(3), SHAPE)
    return [parameter.grad is not None for parameter in stage.parameters()]


def test_a_first_stage_without_trainable_weights_works() -> None:
    assert run_ranks(run_frozen_first_stage, pp=2) == [[False, False], [True, True]]


def run_wrong_shape(groups: ParallelGroups) -> None:
    PipelineExecutor(own_stages(groups, 1), groups, "1f1b", torch.float32).run(toy_batches(2), (5, 2, 9))


def test_an_unexpected_hidden_shape_is_named_before_it_is_sent() -> None:
    with pytest.raises(RankError, match=r"chunk 0 of stage 0 returned torch.float32 \(5, 2, 8\), the next stage expects .*\(5, 2, 9\)"):
        run_ranks(run_wrong_shape, pp=2)
