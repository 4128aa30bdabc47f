"""Training with 8-bit products: layers and layouts give one process's answer, schedules and recomputation to the last bit.

A single layer gives nearly the same: ranks scale their shards by their own largest elements, and scales are powers of two. Over
a model the other order of sums moves some element across a rounding boundary now and then; it is off by a sixteenth then, and
what follows of its micro-batch is rounded anew. So models are compared as closely as a few such events allow, which is still
closer than 8 bits are to fp32 (`test_it_is_neither_fp32_nor_far_from_it`); anything that is missing or counted twice is not.
"""

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.config.schema import LoraConfig
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import ParallelGroups, single_group, single_process_groups
from megatron_llm.parallel.layers import ColumnParallelLinear, ColumnPart, ParallelContext, RowParallelLinear
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from tests.ranks.equivalence import LR, MICRO, SAMPLES, Answer, Point, answer_of, reference, rows, run_point, whole_batch
from tests.ranks.test_compile import traced
from tests.ranks.test_zero_bubble import compare

FP8 = (("fp8", "tensorwise"),)
SMALL = (("num_layers", 2),)


def distance(got: Answer, expected: Answer) -> tuple[float, float]:
    """Largest relative difference of a loss, and norm of the difference of all gradients over the norm of the gradients."""
    assert got.gradients.keys() == expected.gradients.keys()
    losses = [abs(a - b) / b for a, b in zip(got.losses, expected.losses, strict=True) if a is not None and b is not None]
    assert len(losses) == len(expected.losses)
    squares = [
        ((got.gradients[key] - right).double().square().sum(), right.double().square().sum()) for key, right in expected.gradients.items()
    ]
    return max(losses), float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


def test_it_is_neither_fp32_nor_far_from_it() -> None:
    loss, gradient = distance(reference("llama", False, 97, FP8), reference("llama", False, 97))
    assert 1e-4 < loss < 1e-2 and 0.1 < gradient < 0.3


def results_of(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input's gradient, weight's gradient."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(upstream)
    return y.detach(), leaf.grad, layer.weight.grad  # type: ignore[return-value]


def errors_of_layers(groups: ParallelGroups, sequence_parallel: bool) -> list[float]:
    """Errors of this rank's outputs and gradients beside those of one rank, relative to the largest element."""

    def mine(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else tensor.chunk(groups.tp.size, dim)[groups.tp.rank]

    ctx = ParallelContext(groups.tp, sequence_parallel, torch.device("cpu"), torch.float32, seed=5, products="fp8")
    plain = dataclasses.replace(ctx, tp=single_group())
    sequence = 0 if sequence_parallel else None
    column = [ColumnParallelLinear(c, "a", 11, [ColumnPart("", 26, c.tp.size)], bias=True, std=0.5) for c in (ctx, plain)]
    row = [RowParallelLinear(c, "b", 26, 11, bias=True, std=0.5) for c in (ctx, plain)]
    generator, errors = torch.Generator().manual_seed(1), []
    for (layer, whole), (inputs, outputs), (of_x, of_y, of_weight) in (
        (column, (11, 26), (sequence, 2, 0)),
        (row, (26, 11), (2, sequence, 1)),
    ):
        x, upstream = (torch.randn(8, 3, width, generator=generator) for width in (inputs, outputs))
        x[..., : inputs // 2] *= 100.0  # shards of the row-parallel input have other scales
        got = results_of(layer, mine(x, of_x), mine(upstream, of_y))
        right = results_of(whole, x, upstream)
        for one, other, dim in zip(got, right, (of_y, of_x, of_weight), strict=True):
            errors.append(((one - mine(other, dim)).abs().max() / other.abs().max()).item())
    return errors


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sp"])
def test_layers_equal_those_of_one_rank(sequence_parallel: bool) -> None:
    for errors in run_ranks(errors_of_layers, sequence_parallel, tp=2):
        assert len(errors) == 6 and max(errors) < 1e-5, errors


LAYOUTS = {
    "tp2-gpt": Point(tp=2, family="gpt", options=FP8),
    "tp2-pp2-dp2-sp": Point(tp=2, pp=2, dp=2, sp=True, options=FP8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_process(name: str) -> None:
    point = LAYOUTS[name]
    answer = answer_of(run_ranks(run_point, point, tp=point.tp, pp=point.pp, dp=point.dp, timeout=120))
    loss, gradient = distance(answer, reference(point.family, point.tied, point.vocab, FP8))
    assert loss < 1e-3 and gradient < 6e-2


def test_zero_bubble_gives_the_gradients_of_1f1b() -> None:
    points = [Point(2, 2, 1, sp=True, options=FP8), Point(2, 2, 1, family="gpt", options=(*FP8, ("bf16", True)))]
    assert min(run_ranks(compare, points, LoraConfig(), tp=2, pp=2, timeout=120)) >= 4


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_nothing(granularity: str) -> None:
    recomputed = reference("llama", False, 97, (*FP8, *SMALL, ("recompute_granularity", granularity)))
    plain = reference("llama", False, 97, (*FP8, *SMALL))
    assert recomputed.losses == plain.losses and recomputed.norms == plain.norms
    assert all(torch.equal(recomputed.weights[key], plain.weights[key]) for key in plain.weights)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_graph_is_whole_and_equals_eager(tp: int) -> None:
    """One graph of all layers, by the traced autograd function (TP 1) and inside the operator (TP 2)."""
    one_layer = (*FP8, ("num_layers", 1))
    answer = answer_of(run_ranks(traced, Point(tp=tp, sp=tp > 1, options=one_layer), tp=tp, timeout=120))
    loss, gradient = distance(answer, reference("llama", False, 97, (*one_layer, ("kernels", "torch"))))
    assert loss < 1e-3 and gradient < 2e-2


@pytest.mark.full
def test_the_compiler_s_own_code_equals_eager() -> None:
    """It computes the same roundings, within loops that it fuses them into."""
    answer = answer_of(run_ranks(run_point, Point(options=(*FP8, *SMALL, ("compile", True))), timeout=240))
    loss, gradient = distance(answer, reference("llama", False, 97, (*FP8, *SMALL, ("kernels", "torch"))))
    assert loss < 1e-3 and gradient < 6e-2


def losses_of(groups: ParallelGroups, point: Point, steps: int) -> list[float]:
    """Losses of some steps over one batch."""
    engine = NativeEngine(point.config(), get_family(point.family), groups)
    batch = whole_batch(point.vocab, 0)
    micro = [rows(batch, first, MICRO) for first in range(0, 4 * MICRO, MICRO)]
    found = [engine.train_step(micro, step=step, first_sample=0, lr=10 * LR).loss for step in range(steps)]
    assert all(loss is not None for loss in found)
    return [float(loss) for loss in found if loss is not None]


def test_a_model_learns_as_it_does_in_bf16() -> None:
    common = (*SMALL, ("bf16", True), ("adam_eps", 1e-8))
    plain = losses_of(single_process_groups(), Point(options=common), 20)
    narrow = losses_of(single_process_groups(), Point(options=(*common, *FP8)), 20)
    assert narrow != plain
    assert narrow[-1] < 0.7 * narrow[0]
    assert narrow == pytest.approx(plain, abs=0.02 * plain[0])


def shapes_multiplied(groups: ParallelGroups, point: Point) -> list[tuple[int, ...]]:
    """Shapes of the weights whose forward was in 8 bits, in a model without recomputation."""
    engine = NativeEngine(point.config(), get_family(point.family), groups)
    seen: list[tuple[int, ...]] = []
    real = torch._scaled_mm

    def look(a: torch.Tensor, b: torch.Tensor, *scales: torch.Tensor, **options: Any) -> torch.Tensor:
        if options["use_fast_accum"]:
            seen.append((b.shape[1], b.shape[0]))
        return real(a, b, *scales, **options)

    with mock.patch.object(torch, "_scaled_mm", look):
        engine.compute_gradients([rows(whole_batch(point.vocab, 0), 0, MICRO)] * (SAMPLES // MICRO), step=0, first_sample=0)
    return seen


def test_the_layers_of_the_blocks_and_nothing_else() -> None:
    point = Point(options=(*FP8, *SMALL))
    model = point.config().model
    hidden, ffn, wide = model.hidden_size, model.ffn_hidden_size, 64
    assert ffn == 88 and wide == hidden + 2 * 4 * model.kv_channels  # type: ignore[operator]
    block = [(wide, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, 96)]  # 88 columns are padded to 96
    assert shapes_multiplied(single_process_groups(), point) == block * 2 * (SAMPLES // MICRO)
    assert shapes_multiplied(single_process_groups(), Point(options=SMALL)) == []


def test_adapters_stay_in_their_own_type() -> None:
    point = Point(options=(*FP8, *SMALL))
    config = dataclasses.replace(point.config(), lora=LoraConfig(lora_rank=3, lora_target_modules=["all-linear"]))
    with mock.patch.object(Point, "config", functools.partial(lambda found: found, config)):
        found = shapes_multiplied(single_process_groups(), point)
    assert len(found) == 4 * 2 * (SAMPLES // MICRO) and min(min(shape) for shape in found) >= 32
