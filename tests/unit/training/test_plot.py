"""The picture of a run: bounded curves, drawn rarely, complete after a resume, well formed as a file."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.training.callbacks import plot
from megatron_llm.training.callbacks.base import EvalMetrics, TrainSummary
from megatron_llm.training.callbacks.jsonl import JsonlCallback
from megatron_llm.training.callbacks.plot import REDRAW_SECONDS, PlotCallback
from megatron_llm.utils.figure import draw, perplexity_ticks
from megatron_llm.utils.series import Series
from tests.unit.training.samples import INFO, info, metrics

END = TrainSummary(step=10, finished=True, reason="", seconds=100.0, tokens=10_000)


def series_of(values: list[float | None], **options: Any) -> Series:
    """A series of values at steps 1, 2, 3 ..."""
    series = Series(**options)
    for step, value in enumerate(values, 1):
        series.add(step, value)
    return series


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-100, 100).map(float), max_size=70), st.integers(2, 12))
def test_a_series_is_bounded_and_keeps_the_sum_and_the_last_step(values: list[float], limit: int) -> None:
    series = series_of(list(values), limit=limit)
    assert len(series) <= limit
    state = series.state_dict()
    assert sum(state["counts"]) == len(values)
    assert sum(v * c for v, c in zip(state["values"], state["counts"], strict=True)) == pytest.approx(sum(values), abs=1e-6)
    assert series.steps == sorted(set(series.steps))
    assert series.steps[-1:] == ([len(values)] if values else [])
    copy = Series(limit=limit)
    copy.load_state_dict(state)
    for twin in (series, copy):
        twin.add(len(values) + 1, 7.0)
    assert copy.state_dict() == series.state_dict()


def test_a_short_series_is_exact_and_without_unknown_values() -> None:
    series = series_of([3.0, None, 1.0, math.nan, math.inf, 2.0])
    assert (series.steps, series.values, series.not_finite) == ([1, 3, 6], [3.0, 1.0, 2.0], 2)


def test_a_series_that_does_not_average_only_shows_values_there_were() -> None:
    series = series_of([float(2 ** (n // 7)) for n in range(50)], limit=4, average=False)
    assert len(series) <= 4
    assert all(value == 2.0 ** (math.log2(value) // 1) for value in series.values)
    assert series.values[-1] == 2.0**7


def test_points_after_a_step_can_be_dropped() -> None:
    series = series_of([float(n) for n in range(10)])
    series.drop_after(4)
    assert (series.steps, series.values) == ([1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0])


def test_smoothing_neither_lags_nor_bends_to_a_spike() -> None:
    line = [float(n) for n in range(200)]
    smooth = series_of([*line]).smoothed()
    assert smooth[50:150] == pytest.approx(line[50:150])
    line[100] = 1e6
    assert max(series_of([*line]).smoothed()) < 210


class Drawn:
    """Counts drawings instead of making them; each takes `cost` seconds of the plot's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
        self.times: list[float] = []
        self.now, self.cost = 0.0, cost
        monkeypatch.setattr(plot, "draw", self.draw)

    def draw(self, *_: object) -> None:
        self.times.append(self.now)
        self.now += self.cost


@pytest.mark.parametrize(("cost", "gap"), [(0.1, REDRAW_SECONDS), (2.0, 100.0)], ids=["cheap", "dear"])
def test_drawing_is_rare_and_takes_two_percent_at_most(cost: float, gap: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = Drawn(monkeypatch, cost)
    callback = PlotCallback(tmp_path, clock=lambda: drawn.now)
    callback.on_train_start(INFO)
    for step in range(1, 1001):
        drawn.now += 1.0
        callback.on_step_end(metrics(step))
    gaps = [later - sooner for sooner, later in zip(drawn.times[1:], drawn.times[2:], strict=False)]
    assert gaps and all(gap <= found <= gap + cost + 1.5 for found in gaps)
    before = len(drawn.times)
    callback.on_train_end(END)
    assert len(drawn.times) == before + 1


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, which must be whole."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


@pytest.mark.parametrize(("kind", "steps"), [("fp32", 0), ("fp16", 1), ("fp32", 2), ("fp16", 30)])
def test_the_file_is_a_picture_whatever_there_is_to_show(steps: int, kind: str, tmp_path: Path) -> None:
    callback = PlotCallback(tmp_path / "images")
    callback.on_train_start(INFO)
    for step in range(1, steps + 1):
        scale = 2.0**16 if kind == "fp16" else None
        callback.on_step_end(metrics(step, loss_scale=scale, mfu=None if step == 1 else 0.2, loss=None if step == 2 else 3.0))
    if steps > 1:
        callback.on_evaluation(EvalMetrics(2, 3.0, math.exp(3.0)))
    callback.on_train_end(END)
    assert png_size(tmp_path / "images" / "training.png") == (1500, 800)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["training.png"]


def test_values_that_are_not_finite_or_huge_do_not_stop_the_drawing(tmp_path: Path) -> None:
    series = {key: Series() for key in (*plot.STEP_KEYS, *plot.EVALUATION_KEYS)}
    for step, value in enumerate([math.nan, 1e30, -5.0, math.inf, 0.0, 1e-30], 1):
        for key, curve in series.items():
            curve.add(step, value if key != "loss_scale" else None)
    draw(tmp_path / "x.png", "title", series)
    assert png_size(tmp_path / "x.png") == (1500, 800)


def curves(callback: PlotCallback) -> dict[str, list[int]]:
    """Steps of the curves that a callback would draw."""
    return {key: state["last_steps"] for key, state in callback.state_dict().items()}


def run(callback: PlotCallback, start: int, stop: int) -> None:
    """Steps `start` + 1 to `stop` with an evaluation at 3."""
    for step in range(start + 1, stop + 1):
        callback.on_step_end(metrics(step))
        if step == 3:
            callback.on_evaluation(EvalMetrics(3, 2.0, math.exp(2.0)))


def test_curves_go_on_from_the_state_of_the_checkpoint(tmp_path: Path) -> None:
    first = PlotCallback(tmp_path)
    first.on_train_start(INFO)
    run(first, 0, 5)
    state = first.state_dict()
    second = PlotCallback(tmp_path)
    second.load_state_dict(state)
    second.on_train_start(info(5))
    run(second, 5, 8)
    run(first, 5, 8)
    assert second.state_dict() == first.state_dict()
    assert curves(second)["loss"] == list(range(1, 9))


def test_without_state_the_curves_come_from_the_log_up_to_the_checkpoint(tmp_path: Path) -> None:
    log = JsonlCallback(tmp_path / "log.jsonl")
    log.on_train_start(INFO)
    for step in range(1, 8):
        log.on_step_end(metrics(step))
    log.on_evaluation(EvalMetrics(7, 2.0, math.exp(2.0)))
    log.on_evaluation(EvalMetrics(4, 2.5, math.exp(2.5)))
    callback = PlotCallback(tmp_path, tmp_path / "log.jsonl")
    callback.on_train_start(info(5))
    assert curves(callback)["loss"] == [1, 2, 3, 4, 5]
    fresh = PlotCallback(tmp_path, tmp_path / "log.jsonl")
    fresh.on_train_start(INFO)
    assert curves(fresh) == {}, "a fresh run does not take over the log of another"


@pytest.mark.parametrize(("low", "high"), [(1.0, 6.0), (5.51, 5.62), (2.0, 2.0), (0.0, 29.0)])
def test_perplexity_ticks_lie_between_the_losses(low: float, high: float) -> None:
    ticks = perplexity_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and ticks == sorted(ticks)
    assert all(low - 1e-3 <= math.log(tick) <= high + 1e-3 for tick in ticks)


def test_no_perplexity_of_an_absurd_loss() -> None:
    assert perplexity_ticks(3.0, 1e6) == []
