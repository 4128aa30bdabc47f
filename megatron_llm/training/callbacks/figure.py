"""The picture of a run: six panels on one page. Knows curves only, nothing of training.

Matplotlib's own objects are used without pyplot, which keeps global state and may look for a display.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llm.training.callbacks.series import Series
from megatron_llm.utils.atomic import atomic_file
from megatron_llm.utils.optional import require

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, GREY = "#3566a8", "#d9822b", "#3a8f5c", "#b8433f", "#7a5aa6", "#2a8c94", "#8a8f98"


def draw(path: str | Path, title: str, series: Mapping[str, Series]) -> None:
    """Write the grid of curves to `path` (PNG, atomically). Keys: loss, validation_loss, lr, grad_norm, tokens_per_second,
    loss_scale, mfu, seconds; an empty series is a panel without a curve."""
    require("matplotlib", purpose="--img-log-dir")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    last = max((curve.steps[-1] for curve in series.values() if len(curve)), default=0)
    figure.suptitle(f"{title}\nstep {last:,}", fontsize=12, color="#30343b")
    panels = figure.subplots(2, 3)
    _curve(panels[0, 0], "training loss", series["loss"], BLUE)
    _validation(panels[0, 1], series["validation_loss"], series["loss"])
    _curve(panels[0, 2], "learning rate", series["lr"], GREEN, smooth=False)
    panels[0, 2].ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    _curve(panels[1, 0], "gradient norm (before clipping)", series["grad_norm"], RED)
    _curve(panels[1, 1], "tokens / s", series["tokens_per_second"], PURPLE, from_zero=True)
    _last_panel(panels[1, 2], series)
    for panel in panels.flat:
        _style(panel)
    with atomic_file(path) as stream:
        canvas.print_png(stream)


def _last_panel(panel: Any, series: Mapping[str, Series]) -> None:
    if len(series["loss_scale"]):
        _curve(panel, "loss scale (fp16)", series["loss_scale"], TEAL, smooth=False)
        panel.set_yscale("log", base=2)
    elif len(series["mfu"]):
        _curve(panel, "MFU (share of the peak)", series["mfu"], TEAL, from_zero=True)
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    else:
        _curve(panel, "seconds / step", series["seconds"], TEAL, from_zero=True)


def _curve(panel: Any, title: str, curve: Series, color: str, *, smooth: bool = True, from_zero: bool = False) -> None:
    """The raw values, and over them a smoothed line when there are enough of them."""
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#30343b")
    if not len(curve):
        _say(panel, "no values yet")
        return
    smooth = smooth and len(curve) >= 20
    panel.plot(curve.steps, curve.values, color=color, linewidth=0.8 if smooth else 1.8, alpha=0.35 if smooth else 1.0)
    shown = curve.smoothed() if smooth else curve.values
    if smooth:
        panel.plot(curve.steps, shown, color=color, linewidth=2.0)
    if len(curve) == 1:
        panel.plot(curve.steps, curve.values, "o", color=color)
    _clip_outliers(panel, curve.values, shown, from_zero=from_zero)
    panel.set_title(f"{shown[-1]:.4g}", loc="right", fontsize=11, color=color)
    if curve.not_finite:
        panel.text(
            0.99, 0.97, f"{curve.not_finite} steps without a finite value", transform=panel.transAxes, ha="right", va="top", color=RED
        )


def _clip_outliers(panel: Any, values: list[float], shown: list[float], *, from_zero: bool) -> None:
    """Keep a few spikes (a first step, a checkpoint) from flattening the curve: the axis ends at the 99th percentile's reach."""
    ordered = sorted(values)
    low, high = ordered[int(0.005 * (len(ordered) - 1))], ordered[math.ceil(0.99 * (len(ordered) - 1))]
    low, high = min(low, *shown) if len(shown) > 1 else low, max(high, *shown) if len(shown) > 1 else high
    low = 0.0 if from_zero else low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    panel.set_ylim(low if from_zero else low - margin, high + margin)


def _validation(panel: Any, validation: Series, loss: Series) -> None:
    """Validation loss over the faint training loss, with the perplexity on the right-hand scale."""
    panel.set_title("validation loss", loc="left", fontsize=11, fontweight="bold", color="#30343b")
    if not len(validation):
        _say(panel, "no evaluation yet")
        return
    values = validation.values
    if len(loss) >= 2:
        panel.plot(loss.steps, loss.smoothed(), color=BLUE, linewidth=1.2, alpha=0.4, label="training (smoothed)")
    panel.plot(validation.steps, values, "o-", color=ORANGE, linewidth=1.8, markersize=5 if len(values) < 60 else 0, label="validation")
    best = min(range(len(values)), key=values.__getitem__)
    panel.plot(
        validation.steps[best],
        values[best],
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=ORANGE,
        label=f"best {values[best]:.4g} at {validation.steps[best]:,}",
    )
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    panel.set_ylim(low - margin, high + margin)
    panel.set_title(f"{values[-1]:.4g}", loc="right", fontsize=11, color=ORANGE)
    panel.legend(frameon=False, fontsize=9, loc="upper right")
    if high < 50:  # beyond that exp() is no perplexity anybody reads
        right = panel.secondary_yaxis("right", functions=(_exp, _log))
        right.set_ylabel("perplexity", color=GREY, fontsize=9)
        right.tick_params(colors=GREY, labelsize=8)
        right.spines["right"].set_visible(False)


def _exp(value: Any) -> Any:
    import numpy

    return numpy.exp(numpy.clip(value, -100, 100))


def _log(value: Any) -> Any:
    import numpy

    return numpy.log(numpy.clip(value, 1e-40, None))


def _say(panel: Any, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY, fontsize=11)
    panel.set_yticks([])


def _style(panel: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#c4c8ce")
    panel.tick_params(colors="#5a5f68", labelsize=9)
    panel.grid(True, color="#e8eaed", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.set_xlabel("step", color="#5a5f68", fontsize=9)
    panel.margins(x=0.02)
