"""The distributed optimizer on several ranks: equals one process's AdamW, sharded or not; skips, fails and resumes alike everywhere."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.optim.optimizer import DistributedOptimizer
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.placement import get_placement
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.utils.errors import UserError
from tests.ranks.sync_toys import SHAPES, Piece, ToyChunk, assemble, initial, pieces, samples_of, single_process_gradients, toy_chunks

SAMPLES, STEPS = 4, 6
CONFIG = OptimizerConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, clip_grad=5.0)
VARIANTS = list(itertools.product((False, True), (40, 10_000)))  # shard, bucket size


def rate(step: int) -> float:
    return 0.1 / (1 + step)


class Run:
    """One rank's chunks, gradient sync and optimizer, and its steps."""

    def __init__(self, groups: ParallelGroups, dtype: torch.dtype, shard: bool, bucket_size: int, config: OptimizerConfig = CONFIG) -> None:
        self.groups = groups
        self.chunks: list[ToyChunk] = toy_chunks(groups, dtype=dtype)
        self.sync = GradSync(self.chunks, groups, shard=shard, overlap=True, bucket_size=bucket_size)
        self.optimizer = DistributedOptimizer(self.sync, config, groups)

    def gradients(self, step: int) -> None:
        """All micro-batches of this rank."""
        self.sync.zero_grad()
        samples = samples_of(step, SAMPLES, self.groups.dp)
        for number, sample in enumerate(samples):
            if number == len(samples) - 1:
                self.sync.start_reduction(0)
            (self.chunks[0](sample) * self.optimizer.loss_scale).backward()

    def steps(self, first: int, last: int) -> list[float]:
        """Steps [first, last) and their gradient norms."""
        norms = []
        for step in range(first, last):
            self.gradients(step)
            norms.append(self.optimizer.step(rate(step)).grad_norm)
        return norms


def one_process(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[float]]:
    """torch's own AdamW and clip_grad_norm_ on whole fp32 tensors; gradients taken at values rounded to `dtype`."""
    main = {key: initial(key).to(dtype).float().requires_grad_() for key in SHAPES}
    matrices, vectors = ([p for p in main.values() if (p.dim() > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": CONFIG.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(CONFIG.adam_beta1, CONFIG.adam_beta2), eps=CONFIG.adam_eps)
    norms = []
    for step in range(STEPS):
        samples = range(step * SAMPLES, (step + 1) * SAMPLES)
        totals = single_process_gradients({key: p.detach() for key, p in main.items()}, samples, dtype)
        for key, parameter in main.items():
            parameter.grad = totals[key]
        norms.append(float(torch.nn.utils.clip_grad_norm_(main.values(), CONFIG.clip_grad)))
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.step()
    return {key: p.detach() for key, p in main.items()}, norms


def train_all(groups: ParallelGroups, dtype: torch.dtype) -> list[tuple[list[Piece], list[float]]]:
    """Every combination of options, on one rank."""
    found = []
    for shard, bucket_size in VARIANTS:
        run = Run(groups, dtype, shard, bucket_size)
        norms = run.steps(0, STEPS)
        found.append((pieces(run.chunks, gradients=False), norms))
    return found


LAYOUTS = [(1, 1, 1), (1, 1, 2), (4, 1, 1), (2, 1, 2), (1, 2, 4), (2, 2, 2)]
NAMES = [f"tp{tp}-pp{pp}-dp{dp}" for tp, pp, dp in LAYOUTS]


@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS, ids=NAMES)
def test_training_equals_one_process(tp: int, pp: int, dp: int) -> None:
    ranks = run_ranks(train_all, torch.float32, tp=tp, pp=pp, dp=dp)
    weights, norms = one_process(torch.float32)
    assert min(norms) > CONFIG.clip_grad, "the reference must clip, or clipping is not under test"
    answers = []
    for variant, options in enumerate(VARIANTS):
        assert len({tuple(rank[variant][1]) for rank in ranks}) == 1, "ranks disagree about the norm"
        assert ranks[0][variant][1] == pytest.approx(norms, rel=1e-6)
        answers.append(assemble(rank[variant][0] for rank in ranks))
        for key, weight in weights.items():
            torch.testing.assert_close(
                answers[-1][key], weight, rtol=1e-5, atol=1e-5, msg=lambda text, k=key, o=options: f"{k} {o}: {text}"
            )
    if tp <= 2:  # more TP replicas are added up in an order that depends on the size of the exchange
        for (_shard, size), answer in zip(VARIANTS, answers, strict=True):
            replicated = answers[VARIANTS.index((False, size))]
            assert all(torch.equal(answer[key], replicated[key]) for key in SHAPES), "ZeRO-1 differs from replication"


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2), (2, 2, 2)], ids=["one", "dp2", "tp2-pp2-dp2"])
def test_bf16_follows_an_fp32_main_copy(layout: tuple[int, int, int]) -> None:
    tp, pp, dp = layout
    ranks = run_ranks(train_all, torch.bfloat16, tp=tp, pp=pp, dp=dp)
    weights, norms = one_process(torch.bfloat16)
    for variant in range(len(VARIANTS)):
        assert ranks[0][variant][1] == pytest.approx(norms, rel=1e-2)
        answer = assemble(rank[variant][0] for rank in ranks)
        for key, weight in weights.items():
            torch.testing.assert_close(answer[key], weight.bfloat16().float(), rtol=2e-2, atol=2e-2)


HALF = OptimizerConfig(initial_loss_scale=2.0**18, hysteresis=1, loss_scale_window=3, clip_grad=0.0)


def overflow(groups: ParallelGroups) -> tuple[list[tuple[bool, float]], bool, int]:
    """fp16 from a loss scale that is too large: outcome of each step, whether skipped steps left everything alone."""
    run = Run(groups, torch.float16, True, 40, HALF)
    outcomes, untouched = [], True
    for step in range(8):
        run.gradients(step)
        before = [{name: t.clone() for name, t in s.tensors.items()} for s in run.optimizer.segments()]
        values = [p.detach().clone() for p in run.sync.parameters()]
        result = run.optimizer.step(1e-3)
        if result.skipped:
            after = [s.tensors for s in run.optimizer.segments()]
            untouched &= all(torch.equal(b[name], a[name]) for b, a in zip(before, after, strict=True) for name in b)
            untouched &= all(torch.equal(b, p) for b, p in zip(values, run.sync.parameters(), strict=True))
        outcomes.append((result.skipped, result.loss_scale))
    return outcomes, untouched, run.optimizer.step_count


def test_overflow_is_skipped_by_all_ranks_and_halves_the_scale() -> None:
    ranks = run_ranks(overflow, tp=2, pp=2, dp=2)
    outcomes, untouched, count = ranks[0]
    assert all(rank[0] == outcomes for rank in ranks)
    assert all(rank[1] for rank in ranks) and untouched
    skipped = [was for was, _ in outcomes]
    assert skipped[0] and not skipped[-1]
    assert count == skipped.count(False)
    for (was, scale), (_, following) in itertools.pairwise(outcomes):
        assert following == (scale / 2 if was else scale) or (not was and following == scale * 2)


def failing(groups: ParallelGroups, dtype: torch.dtype, config: OptimizerConfig) -> str:
    """An infinity in one gradient of one rank; the message every rank leaves with."""
    run = Run(groups, dtype, True, 40, config)
    run.gradients(0)
    if groups.grid.coords(groups.rank) == {"tp": 1, "dp": 1, "pp": 0}:
        run.sync.finish()
        run.sync.buckets[0].owned_grads.fill_(float("inf"))
    try:
        run.optimizer.step(0.1)
    except UserError as error:
        return str(error)
    return ""


def test_a_gradient_that_is_not_finite_is_named_on_every_rank() -> None:
    messages = run_ranks(failing, torch.float32, CONFIG, tp=2, dp=2)
    assert len(set(messages)) == 1
    assert "rank 3 (tp 1, dp 1, pp 0)" in messages[0]
    assert any(key.split("/")[0] in messages[0] for key in SHAPES)
    assert "diverged" in messages[0]


def test_a_loss_scale_without_room_is_explained_on_every_rank() -> None:
    config = OptimizerConfig(initial_loss_scale=2.0**20, min_loss_scale=2.0**20, hysteresis=1)
    messages = run_ranks(failing, torch.float16, config, pp=2)
    assert len(set(messages)) == 1
    assert "min-loss-scale" in messages[0]
    assert "bf16" in messages[0]
    assert "pp 1" in messages[0], "the last stage's gradients come first"


def owned(groups: ParallelGroups, shard: bool) -> list[tuple[int, str, int, int, int]]:
    """What each rank's optimizer owns: holder, parameter, range, and the parameter's size."""
    run = Run(groups, torch.bfloat16, shard, 40)
    found = []
    for segment in run.optimizer.segments():
        assert all(t.shape == (segment.end - segment.start,) and t.dtype == torch.float32 for t in segment.tensors.values())
        assert torch.equal(segment.tensors["main"], segment.parameter.detach().flatten()[segment.start : segment.end].float())
        placement = get_placement(segment.parameter)
        holder = groups.pp.rank * groups.tp.size + groups.tp.rank
        found.append((holder, placement.logical_name, segment.start, segment.end, segment.parameter.numel()))
    return found


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_segments_cover_every_parameter(shard: bool) -> None:
    ranks = run_ranks(owned, shard, tp=2, dp=4)
    ranges: dict[Any, list[tuple[int, int]]] = {}
    for holder, name, start, end, size in (entry for rank in ranks for entry in rank):
        ranges.setdefault((holder, name, size), []).append((start, end))
    assert {name for _, name, _ in ranges} == {key.split("/")[0] for key in SHAPES}
    for (_, name, size), parts in ranges.items():
        if not shard:
            assert parts == [(0, size)] * 4, name
            continue
        parts.sort()
        assert parts[0][0] == 0 and parts[-1][1] == size, name
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts)), name


def resumed(groups: ParallelGroups, dtype: torch.dtype, shard: bool) -> bool:
    """Whether steps 0..5 straight equal 0..2, a new optimizer loaded from its segments, and 3..5, bit for bit."""
    straight, first, second = (Run(groups, dtype, shard, 40) for _ in range(3))
    norms = straight.steps(0, STEPS)
    again = first.steps(0, 3)
    for parameter in second.sync.parameters():
        parameter.data.fill_(7.0)
    for source, target in zip(first.optimizer.segments(), second.optimizer.segments(), strict=True):
        assert (source.start, source.end) == (target.start, target.end)
        for name, tensor in target.tensors.items():
            tensor.copy_(source.tensors[name])
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.optimizer.after_load()
    again += second.steps(3, STEPS)
    same = all(torch.equal(a, b) for a, b in zip(straight.sync.parameters(), second.sync.parameters(), strict=True))
    return norms == again and same and second.optimizer.step_count == STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_from_segments_is_bit_exact(dtype: torch.dtype) -> None:
    assert all(run_ranks(resumed, dtype, True, pp=2, dp=2))
    assert all(run_ranks(resumed, dtype, False, dp=2))


def holders_after_many_steps(groups: ParallelGroups) -> list[Piece]:
    run = Run(groups, torch.bfloat16, True, 40)
    run.steps(0, 40)
    return pieces(run.chunks, gradients=False)


def test_copies_stay_equal_over_many_steps() -> None:
    assemble(run_ranks(holders_after_many_steps, tp=2, pp=2, dp=2))  # fails on the first bit that differs
