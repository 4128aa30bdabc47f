"""The picture of a run, pretraining or fine-tuning: six panels on one page. Knows curves only, nothing of training.

Matplotlib's own objects are used without pyplot, which keeps global state and may look for a display. Margins are fixed:
measuring every label, as its automatic layouts do, would take most of the drawing time.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_llm.utils.atomic import atomic_file
from megatron_llm.utils.optional import require
from megatron_llm.utils.progress import amount
from megatron_llm.utils.series import Series

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL = "#3566a8", "#d9822b", "#3a8f5c", "#b8433f", "#7a5aa6", "#2a8c94"
INK, GREY, LINE, GRID = "#30343b", "#6b7079", "#c4c8ce", "#e8eaed"
KEYS = ("loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "loss_scale", "mfu", "seconds")
SMOOTH_FROM = 20  # points; a smoothed line over fewer would be invented


def draw(path: str | Path, title: str, series: Mapping[str, Series]) -> None:
    """Write the grid of curves to `path` (PNG, atomically), one for each of `KEYS`; an empty series is a panel without a curve.

    The last panel shows the loss scale or, where there is none, the MFU or else the seconds of a step.
    """
    require("matplotlib", purpose="--img-log-dir")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.88, bottom=0.065, wspace=0.26, hspace=0.32)
    last = max((curve.steps[-1] for curve in series.values() if len(curve)), default=0)
    figure.text(0.05, 0.955, title, fontsize=13, color=INK)
    figure.text(0.985, 0.955, f"step {last:,}", fontsize=13, color=INK, ha="right")
    panels = figure.subplots(2, 3)
    for panel in panels.flat:
        _style(panel)
    _curve(panels[0, 0], "training loss", series["loss"], BLUE)
    _validation(panels[0, 1], series["validation_loss"], series["loss"])
    _curve(panels[0, 2], "learning rate", series["lr"], GREEN, smooth=False, text=_scientific)
    _curve(panels[1, 0], "gradient norm before clipping", series["grad_norm"], RED)
    _curve(panels[1, 1], "tokens / s", series["tokens_per_second"], PURPLE, from_zero=True, text=amount)
    _last_panel(panels[1, 2], series)
    with atomic_file(path) as stream:
        canvas.print_png(stream)


def _last_panel(panel: Any, series: Mapping[str, Series]) -> None:
    if len(series["loss_scale"]):
        _curve(panel, "loss scale (fp16)", series["loss_scale"], TEAL, smooth=False, text=lambda value: f"{value:g}")
        panel.set_yscale("log", base=2)
        panel.set_ylim(min(series["loss_scale"].values) / 2, max(series["loss_scale"].values) * 2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif len(series["mfu"]):
        _curve(panel, "MFU, share of the peak", series["mfu"], TEAL, from_zero=True, text=lambda value: f"{100 * value:.3g} %")
    else:
        _curve(panel, "seconds / step", series["seconds"], TEAL, from_zero=True)


def _curve(
    panel: Any,
    title: str,
    curve: Series,
    color: str,
    *,
    smooth: bool = True,
    from_zero: bool = False,
    text: Callable[[float], str] | None = None,
) -> None:
    """The raw values and over them, when there are enough, a smoothed line. `text` writes the values on the axis."""
    _title(panel, title)
    if not len(curve):
        _say(panel, "no values yet")
        return
    steps, values = curve.steps, curve.values
    smooth = smooth and len(curve) >= SMOOTH_FROM
    shown = curve.smoothed() if smooth else values
    if smooth:
        panel.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    panel.plot(steps, shown, color=color, linewidth=2.0, marker="o" if len(values) == 1 else None)
    _limit(panel, values, shown, from_zero=from_zero)
    _title(panel, text(shown[-1]) if text else f"{shown[-1]:.4g}", color, side="right")
    if text:
        panel.yaxis.set_major_formatter(lambda value, _: text(value))
    if curve.not_finite:
        note = f"{curve.not_finite} steps without a finite value"
        panel.text(0.99, 0.97, note, transform=panel.transAxes, ha="right", va="top", color=RED, fontsize=10)


def _limit(panel: Any, values: list[float], shown: list[float], *, from_zero: bool) -> None:
    """Keep a few spikes (a first step, a wild gradient) from flattening the curve: only 99 % of the raw values must fit."""
    ordered = sorted(values)
    low = min(ordered[int(0.005 * (len(ordered) - 1))], *shown, math.inf)
    high = max(ordered[math.ceil(0.99 * (len(ordered) - 1))], *shown, -math.inf)
    low = min(low, 0.0) if from_zero else low
    margin = _margin(low, high, 0.06)
    panel.set_ylim(low if from_zero else low - margin, high + margin)


def _margin(low: float, high: float, share: float) -> float:
    """Space above and below a curve: a share of its height, but so much that a flat curve looks flat."""
    return max(share * (high - low), 0.01 * max(abs(low), abs(high))) or 1.0


def _validation(panel: Any, validation: Series, loss: Series) -> None:
    """Validation loss over the faint training loss, with the perplexity on the right-hand scale."""
    _title(panel, "validation loss")
    if not len(validation):
        _say(panel, "no evaluation yet")
        return
    steps, values = validation.steps, validation.values
    if len(loss) >= SMOOTH_FROM:
        panel.plot(loss.steps, loss.smoothed(), color=BLUE, linewidth=1.2, alpha=0.45, label="training, smoothed")
    panel.plot(steps, values, "o-", color=ORANGE, linewidth=2.0, markersize=5 if len(values) < 60 else 0, label="validation")
    best = min(range(len(values)), key=values.__getitem__)
    label = f"best: {values[best]:.4g} at step {steps[best]:,}"
    panel.plot(steps[best], values[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=ORANGE, label=label)
    low, high = min(values), max(values)
    margin = _margin(low, high, 0.12)
    panel.set_ylim(low - margin, high + margin)
    _title(panel, f"{values[-1]:.4g}", ORANGE, side="right")
    panel.legend(frameon=False, fontsize=10, loc="upper right", labelcolor=INK)
    ticks = perplexity_ticks(low - margin, high + margin)
    if ticks:
        right = panel.twinx()
        right.set_ylim(panel.get_ylim())
        right.set_yticks([math.log(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        right.spines[:].set_visible(False)
        right.tick_params(colors=GREY, labelsize=9, length=0, pad=-1)
        right.set_ylabel("perplexity", color=GREY, fontsize=9, labelpad=2)


def perplexity_ticks(low_loss: float, high_loss: float) -> list[float]:
    """Perplexities between two losses, round and at most about six; none where exp(loss) is no number anybody reads."""
    if high_loss > 30 or low_loss < -1:
        return []
    round_numbers = [factor * 10.0**power for power in range(14) for factor in (1, 1.5, 2, 3, 5, 7)]
    inside = [value for value in round_numbers if low_loss <= math.log(value) <= high_loss]
    if len(inside) < 2:
        return [float(f"{math.exp(low_loss + share * (high_loss - low_loss)):.4g}") for share in (0.2, 0.5, 0.8)]
    return inside[:: math.ceil(len(inside) / 6)]


def _title(panel: Any, text: str, color: str = INK, side: str = "left") -> None:
    panel.set_title(text, loc=side, fontsize=12, fontweight="bold" if side == "left" else "normal", color=color)


def _scientific(value: float) -> str:
    """2.5e-4; zero is 0."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def _say(panel: Any, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY, fontsize=12)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_xlabel("")


def _style(panel: Any) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(LINE)
    panel.tick_params(colors=GREY, labelsize=9, length=3)
    panel.grid(True, color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    panel.set_xlabel("step", color=GREY, fontsize=9)
    panel.margins(x=0.02)
