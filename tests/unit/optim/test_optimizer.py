"""The optimizer in one process: torch's AdamW on flat buffers, settings per parameter, the norm's exactness."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.optim.grad_norm import GradNorm, clip_factor, counted_ranges
from megatron_llm.optim.optimizer import DistributedOptimizer
from megatron_llm.optim.param_groups import Run, runs_of, weight_decay_of
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.parallel.placement import Part, Placement, set_placement
from megatron_llm.utils.errors import UserError

CONFIG = OptimizerConfig(weight_decay=0.2, clip_grad=1.0)


class Model(nn.Module):
    """Two matrices and a vector, of odd sizes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in {"first": (7, 11), "second": (13, 3), "norm": (5,)}.items():
            placement = Placement(name, (Part("", shape, (0,) * len(shape), 0, shape),))
            self.register_parameter(name, set_placement(nn.Parameter(torch.randn(shape).to(dtype)), placement))


def make(dtype: torch.dtype = torch.float32, config: OptimizerConfig = CONFIG) -> tuple[Model, GradSync, DistributedOptimizer]:
    torch.manual_seed(3)
    model, groups = Model(dtype), single_process_groups()
    sync = GradSync([model], groups, shard=True, overlap=True, bucket_size=1000)
    return model, sync, DistributedOptimizer(sync, config, groups)


def set_gradients(model: nn.Module, sync: GradSync, scale: float, seed: int = 0) -> list[Tensor]:
    sync.finish()
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(p.shape, generator=generator) * scale for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        parameter.main_grad.copy_(gradient)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["unclipped", "clipped"])
def test_equals_torch_adamw_with_clipping(scale: float) -> None:
    model, sync, optimizer = make()
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    torch_groups = [{"params": copies[:2], "weight_decay": 0.2}, {"params": copies[2:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(torch_groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        sync.zero_grad()
        for copy, gradient in zip(copies, set_gradients(model, sync, scale, step), strict=True):
            copy.grad = gradient
        norm = float(torch.nn.utils.clip_grad_norm_(copies, CONFIG.clip_grad))
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        reference.step()
        result = optimizer.step(0.1 / (step + 1))
        assert (result.skipped, result.loss_scale) == (False, 1.0)
        assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        torch.testing.assert_close(parameter, copy, rtol=1e-5, atol=1e-6)


def test_step_finishes_the_reduction_itself() -> None:
    model, sync, optimizer = make()
    sync.zero_grad()
    model.first.sum().backward()  # type: ignore[operator, union-attr]
    assert optimizer.step(0.1).grad_norm == pytest.approx(math.sqrt(77))


def test_loss_scale_is_taken_out_before_the_norm_and_the_update() -> None:
    plain, scaled = OptimizerConfig(clip_grad=1.0), OptimizerConfig(clip_grad=1.0, loss_scale=1024.0)
    results = []
    for config, factor in ((plain, 1.0), (scaled, 1024.0)):
        # fp16 parameters need scaling; the values must fit fp16's range either way
        model, sync, optimizer = make(torch.float16 if factor > 1 else torch.float32, config)
        for segment in optimizer.segments():
            segment.tensors["main"].fill_(1.0)
        optimizer.after_load()
        set_gradients(model, sync, factor)
        assert optimizer.loss_scale == factor
        norm = optimizer.step(0.1).grad_norm
        results.append((norm, [s.tensors["main"].clone() for s in optimizer.segments()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, two in zip(results[0][1], results[1][1], strict=False):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_static_scale_skips_on_overflow() -> None:
    model, sync, optimizer = make(torch.float16, OptimizerConfig(loss_scale=4.0))
    sync.finish()
    before = [p.detach().clone() for p in model.parameters()]
    model.norm.main_grad[2] = float("inf")  # type: ignore[union-attr, index]
    result = optimizer.step(0.1)
    assert (result.skipped, result.loss_scale, optimizer.step_count) == (True, 4.0, 0)
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_without_scaling_a_gradient_that_is_not_finite_is_fatal_and_named(dtype: torch.dtype, value: float) -> None:
    model, sync, optimizer = make(dtype)
    sync.finish()
    model.second.main_grad[4, 1] = value  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match=r"second on rank 0 .*lower lr"):
        optimizer.step(0.1)


def test_weights_loaded_without_state_reach_the_main_copy() -> None:
    model, _, optimizer = make(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    optimizer.read_parameters()
    assert all(bool((s.tensors["main"] == 0.5).all()) for s in optimizer.segments())


def test_only_matrices_decay() -> None:
    model, sync, _ = make()
    assert [weight_decay_of(p, CONFIG) for p in model.parameters()] == [0.2, 0.2, 0.0]
    for bucket in sync.buckets:
        assert runs_of(bucket, CONFIG) == [Run(0, len(bucket.params), 0.2 if bucket.slots[0].parameter.dim() > 1 else 0.0)]


def test_runs_are_cut_where_the_decay_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, sync, _ = make()
    monkeypatch.setattr("megatron_llm.optim.param_groups.weight_decay_of", lambda p, config: float(p.shape[0] == 7))
    matrices = next(bucket for bucket in sync.buckets if len(bucket.slots) == 2)
    assert [slot.start for slot in matrices.slots] == [0, 64]
    assert runs_of(matrices, CONFIG) == [Run(0, 64, 0.0), Run(64, len(matrices.params), 1.0)]


@pytest.mark.parametrize("value", [1e-3, 1.0, 1e15, 1e25], ids=str)
def test_norm_is_exact_also_where_squares_do_not_fit_fp32(value: float) -> None:
    model, sync, _ = make()
    set_gradients(model, sync, value)
    whole = torch.cat([p.main_grad.flatten() for p in model.parameters()]).double()  # type: ignore[attr-defined]
    assert GradNorm(sync, single_process_groups()).compute() == pytest.approx(float(whole.norm()), rel=1e-6)


def test_norm_of_a_large_buffer_keeps_its_precision() -> None:
    placement = Placement("w", (Part("", (1000, 4099), (0, 0), 0, (1000, 4099)),))
    chunk = nn.Module()
    chunk.register_parameter("w", set_placement(nn.Parameter(torch.zeros(1000, 4099)), placement))
    sync = GradSync([chunk], single_process_groups(), shard=True, overlap=True, bucket_size=1000)
    sync.buckets[0].grads[: 1000 * 4099].fill_(0.1)
    assert GradNorm(sync, single_process_groups()).compute() == pytest.approx(0.1 * math.sqrt(1000 * 4099), rel=1e-6)


def test_counted_ranges_leave_out_padding_replicas_and_tied_copies() -> None:
    def only(shape: tuple[int, ...], *parts: Part, tied_copy: bool = False) -> list[tuple[int, int]]:
        chunk = nn.Module()
        chunk.register_parameter("p", set_placement(nn.Parameter(torch.zeros(shape)), Placement("p", parts, tied_copy=tied_copy)))
        return counted_ranges(GradSync([chunk], single_process_groups(), shard=True, overlap=True, bucket_size=1000).buckets[0])

    whole = Part("", (6, 4), (0, 0), 0, (6, 4))
    assert only((6, 4), whole) == [(0, 24)]
    assert only((8, 4), whole) == [(0, 24)]  # two rows of padding
    assert only((6, 4), whole, tied_copy=True) == []
    assert only((6, 4), dataclasses.replace(whole, replicas=2, replica=1)) == []
    shared = Part("k", (2, 4), (0, 0), 6, (2, 4), replicas=2, replica=1)
    assert only((9, 4), whole, shared, Part("v", (1, 4), (0, 0), 8, (1, 4))) == [(0, 24), (32, 36)]


def test_ranges_of_whole_neighbours_are_joined_over_the_gap() -> None:
    _, sync, _ = make()
    matrices = next(bucket for bucket in sync.buckets if len(bucket.slots) == 2)
    assert counted_ranges(matrices) == [(0, 64 + 77)]


@pytest.mark.parametrize(("norm", "limit", "factor"), [(0.5, 1.0, 1.0), (4.0, 1.0, 1.0 / (4.0 + 1e-6)), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_clip_factor(norm: float, limit: float, factor: float) -> None:
    assert clip_factor(norm, limit) == factor


def test_state_dict_is_plain_and_continues_the_bias_correction() -> None:
    model, sync, optimizer = make()
    for _ in range(3):
        set_gradients(model, sync, 1.0)
        optimizer.step(0.01)
    state = optimizer.state_dict()
    assert state == {"step": 3, "loss_scaler": {"kind": "static"}}
    other_model, other_sync, other = make()
    for source, target in zip(optimizer.segments(), other.segments(), strict=True):
        for name, tensor in target.tensors.items():
            tensor.copy_(source.tensors[name])
    other.load_state_dict(state)
    other.after_load()
    for m, s, o in ((model, sync, optimizer), (other_model, other_sync, other)):
        set_gradients(m, s, 1.0, seed=9)
        o.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
