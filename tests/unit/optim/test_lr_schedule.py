"""Learning-rate schedules: golden values from the closed formulas, and agreement with megatron-core's scheduler."""

import dataclasses
import math

import pytest

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.optim.lr_schedule import learning_rate
from megatron_llm.utils.errors import UserError

BASE = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_iters=110)


def rate(step: int, train_iters: int = 1000, **changes: object) -> float:
    return learning_rate(dataclasses.replace(BASE, **changes), step, train_iters)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_warmup_is_linear_from_zero_to_the_peak(style: str) -> None:
    assert [rate(step, lr_decay_style=style) for step in (0, 1, 5, 10)] == pytest.approx([0.0, 0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("style", "values"),
    [
        ("constant", {11: 1.0, 110: 1.0, 999: 1.0}),
        ("linear", {11: 1.0 - 0.9 * 0.01, 60: 0.55, 110: 0.1, 111: 0.1, 999: 0.1}),
        ("cosine", {35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55, 85: 0.1 + 0.45 * (1 - math.sqrt(0.5)), 110: 0.1, 111: 0.1}),
        ("inverse-square-root", {40: 0.5, 90: 1 / 3, 110: math.sqrt(10 / 110), 111: 0.1}),
        ("WSD", {11: 1.0, 99: 1.0, 110: 0.1, 111: 0.1}),
    ],
)
def test_golden_values(style: str, values: dict[int, float]) -> None:
    assert {step: rate(step, lr_decay_style=style) for step in values} == pytest.approx(values)


@pytest.mark.parametrize(("style", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1)])
def test_wsd_final_decay(style: str, halfway: float) -> None:
    def wsd(step: int) -> float:
        return rate(step, lr_decay_style="WSD", lr_wsd_decay_iters=40, lr_wsd_decay_style=style)

    assert wsd(70) == 1.0
    assert wsd(71) < 1.0
    assert wsd(90) == pytest.approx(0.1 + 0.9 * halfway)
    assert wsd(110) == pytest.approx(0.1)


def test_inverse_square_root_never_falls_below_the_minimum() -> None:
    assert rate(900, lr_decay_style="inverse-square-root", lr_decay_iters=None, min_lr=0.2) == 0.2


def test_decay_lasts_for_the_whole_run_by_default() -> None:
    assert rate(1000, lr_decay_style="linear", lr_decay_iters=None) == pytest.approx(0.1)
    assert rate(505, lr_decay_style="linear", lr_decay_iters=None) == pytest.approx(0.55)


def test_warmup_as_a_fraction_of_the_decay_wins_over_iterations() -> None:
    assert rate(11, lr_warmup_fraction=0.2) == pytest.approx(0.5)


def test_no_warmup_starts_at_the_peak() -> None:
    for style in ("constant", "linear", "cosine", "inverse-square-root", "WSD"):
        assert rate(0, lr_warmup_iters=0, lr_decay_style=style) == 1.0


def test_a_warmup_longer_than_the_run_does_not_fail() -> None:
    values = [rate(step, train_iters=3, lr_decay_iters=None, lr_decay_style="cosine") for step in range(3)]
    assert values == pytest.approx([0.0, 0.1, 0.2])


def test_one_step_without_warmup() -> None:
    assert rate(0, train_iters=1, lr_decay_iters=None, lr_warmup_iters=0, lr_decay_style="WSD") == 1.0


def test_unknown_style_is_told() -> None:
    with pytest.raises(UserError, match="staircase"):
        rate(50, lr_decay_style="staircase")


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
@pytest.mark.parametrize("wsd_style", ["linear", "cosine", "exponential"])
def test_equals_megatron_core(style: str, wsd_style: str) -> None:
    reason = "compares with megatron-core, a test-only dependency that is not installed"
    scheduler_module = pytest.importorskip("megatron.core.optimizer_param_scheduler", reason=reason)

    class Optimizer:
        param_groups = [{}]  # noqa: RUF012

    scheduler = scheduler_module.OptimizerParamScheduler(
        Optimizer(), 0.0, 1.0, 0.1, 10, 110, style, 0.0, 0.0, 1, "constant", wsd_decay_steps=30, lr_wsd_decay_style=wsd_style
    )
    for step in range(130):
        ours = rate(step, lr_decay_style=style, lr_wsd_decay_iters=30, lr_wsd_decay_style=wsd_style)
        assert ours == pytest.approx(Optimizer.param_groups[0]["lr"], rel=1e-12), step
        scheduler.step(1)
