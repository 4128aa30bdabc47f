"""Loss scalers are bookkeeping: growth, backoff with hysteresis, the minimum, their saved state."""

import json

import pytest

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.optim.loss_scaler import DynamicLossScaler, LossScaler, make_loss_scaler


def dynamic(initial: float = 64.0, minimum: float = 1.0, window: int = 3, hysteresis: int = 2) -> DynamicLossScaler:
    return DynamicLossScaler(
        OptimizerConfig(initial_loss_scale=initial, min_loss_scale=minimum, loss_scale_window=window, hysteresis=hysteresis)
    )


def scales(scaler: LossScaler, outcomes: str) -> list[float]:
    """The scale after each outcome: + a good step, - an overflow."""
    found = []
    for outcome in outcomes:
        scaler.update(outcome == "-")
        found.append(scaler.scale)
    return found


def test_grows_after_a_window_of_good_steps_in_a_row() -> None:
    assert scales(dynamic(), "+++++-+++") == [64, 64, 128, 128, 128, 128, 128, 128, 256]


def test_the_first_halving_needs_hysteresis_overflows_and_the_next_only_one() -> None:
    assert scales(dynamic(), "---") == [64, 32, 16]


def test_growth_renews_the_hysteresis() -> None:
    assert scales(dynamic(), "--+++--") == [64, 32, 32, 32, 64, 64, 32]


def test_hysteresis_of_one_halves_at_once() -> None:
    assert scales(dynamic(hysteresis=1), "--") == [32, 16]


def test_exhausted_exactly_when_one_more_overflow_would_go_below_the_minimum() -> None:
    scaler = dynamic(initial=4.0)
    seen = []
    for _ in range(3):
        seen.append(scaler.exhausted)
        scaler.update(True)
    assert seen == [False, False, False]  # two overflows to 2, a third to 1
    assert scaler.scale == 1.0
    assert scaler.exhausted


def test_hysteresis_is_used_up_before_it_is_exhausted() -> None:
    scaler = dynamic(initial=1.0)
    assert not scaler.exhausted
    scaler.update(True)
    assert scaler.scale == 1.0
    assert scaler.exhausted


def test_state_continues_bit_for_bit() -> None:
    first, second = dynamic(), dynamic()
    scales(first, "-++")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert scales(first, "+-+++") == scales(second, "+-+++")


def test_kind_follows_precision_and_configuration() -> None:
    none = make_loss_scaler(OptimizerConfig(loss_scale=8.0), fp16=False)
    static = make_loss_scaler(OptimizerConfig(loss_scale=8.0), fp16=True)
    changing = make_loss_scaler(OptimizerConfig(initial_loss_scale=32.0), fp16=True)
    assert [(s.scale, s.skips) for s in (none, static, changing)] == [(1.0, False), (8.0, True), (32.0, True)]
    assert scales(static, "--+") == [8.0, 8.0, 8.0]


def test_state_of_another_kind_is_not_taken_over() -> None:
    scaler = dynamic(initial=64.0)
    scaler.load_state_dict(make_loss_scaler(OptimizerConfig(), fp16=False).state_dict())
    assert scaler.scale == 64.0
    fresh = make_loss_scaler(OptimizerConfig(), fp16=False)
    fresh.load_state_dict(dynamic().state_dict())
    assert fresh.scale == 1.0


@pytest.mark.parametrize("outcomes", ["-" * 40])
def test_the_scale_never_passes_the_minimum(outcomes: str) -> None:
    assert min(scales(dynamic(minimum=2.0), outcomes)) == 2.0
