"""Pipeline plans and runs as pictures: one row a stage, time to the right, so that the bubble can be seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.parallel.schedules import ActionKind
from megatron_llm.parallel.simulator import Simulation, Span, Spans
from megatron_llm.utils.optional import require

COLOURS = {ActionKind.FORWARD: "#4c78a8", ActionKind.BACKWARD: "#f58518", ActionKind.WEIGHT: "#54a24b"}
TRANSFER, RECEIVES = "#222222", (ActionKind.RECV_FORWARD, ActionKind.RECV_BACKWARD)
LIGHTEST = 0.35  # opacity of chunk 0; later chunks are darker


@dataclass(frozen=True)
class Panel:
    """One time axis: computations as bars, transfers as thin ones below them, a label for each stage's row."""

    title: str
    spans: Spans
    transfers: Spans
    labels: tuple[str, ...]

    @property
    def end(self) -> float:
        """The moment of the last computation's end."""
        return max(span.end for rank_spans in self.spans for span in rank_spans)


def simulated_panel(simulation: Simulation, title: str, unit: str = "ticks") -> Panel:
    """A simulated plan, with what it costs in the title and each stage's live activations beside it."""
    labels = tuple(f"stage {stage}\npeak {peak}" for stage, peak in enumerate(simulation.peak_activations))
    whole = f"{title}: {simulation.ticks:.4g} {unit}, {simulation.bubble:.0%} idle"
    return Panel(whole, simulation.spans, simulation.transfers, labels)


def measured_panel(spans: Sequence[Sequence[Span]], title: str) -> Panel:
    """What the ranks of one pipeline recorded of one step (`PipelineExecutor`'s `on_span`); transfers are the waits for them.

    All ranks' clocks must be the same: ranks of one machine.
    """
    start = min(span.start for rank_spans in spans for span in rank_spans)
    moved = [[Span(span.action, span.start - start, span.end - start) for span in rank_spans] for rank_spans in spans]
    computed = tuple(tuple(span for span in row if span.action.kind not in RECEIVES) for row in moved)
    waits = tuple(tuple(span for span in row if span.action.kind in RECEIVES) for row in moved)
    panel = Panel(title, computed, waits, tuple(f"stage {stage}" for stage in range(len(spans))))
    busy = sum(span.end - span.start for row in computed for span in row)
    return Panel(f"{title}: {panel.end:.4g} s, {1 - busy / (panel.end * len(spans)):.0%} idle", computed, waits, panel.labels)


def draw_panels(panels: Sequence[Panel], unit: str, path: Path) -> None:
    """Write a PNG of panels over each other, on one time axis.

    Blue forwards, orange backwards, green weight gradients where backwards are split, numbered by micro-batch, chunks
    from light to dark; transfers black. UserError when matplotlib is not installed.
    """
    end = max(panel.end for panel in panels)
    most = max(len(row) for panel in panels for row in panel.spans)
    rows = sum(len(panel.spans) for panel in panels)
    size = (min(40.0, 4.0 + 0.33 * most), 0.9 * len(panels) + 0.7 + 0.5 * rows)
    figure = require("matplotlib.figure", purpose="drawing a schedule").Figure(figsize=size, layout="constrained")
    ratios = [len(panel.spans) for panel in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw(axis, panel)
        axis.set_xlim(0, end)
    axes[-1].set_xlabel(unit)
    _legend(figure, panels)
    figure.savefig(path, dpi=110)


def draw_timeline(simulation: Simulation, title: str, path: Path) -> None:
    """Write a PNG of one simulated plan in ticks; see `draw_panels`."""
    draw_panels([simulated_panel(simulation, title)], "ticks (forward 1, backward 2, half of it weight gradients)", path)


def _draw(axis: Any, panel: Panel) -> None:
    chunks = 1 + max(span.action.chunk for row in panel.spans for span in row)
    for stage, row in enumerate(panel.spans):
        for span in row:
            opacity = 1.0 if chunks == 1 else LIGHTEST + (1 - LIGHTEST) * span.action.chunk / (chunks - 1)
            colour, width = COLOURS[span.action.kind], span.end - span.start
            axis.barh(stage, width, left=span.start, height=0.8, color=colour, alpha=opacity, edgecolor="white", linewidth=0.5)
            axis.text((span.start + span.end) / 2, stage, str(span.action.micro), ha="center", va="center", fontsize=7)
    for stage, row in enumerate(panel.transfers):
        for span in row:
            axis.barh(
                stage + 0.45, span.end - span.start, left=span.start, height=0.1, facecolor=TRANSFER, edgecolor=TRANSFER, linewidth=0.6
            )
    axis.set_yticks(range(len(panel.labels)), panel.labels)
    axis.set_ylim(len(panel.labels) - 0.4, -0.5)
    axis.set_title(panel.title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _legend(figure: Any, panels: Sequence[Panel]) -> None:
    """The kinds of bar there are."""
    patch = require("matplotlib.patches", purpose="drawing a schedule").Patch
    kinds = {span.action.kind for panel in panels for row in panel.spans for span in row}
    split = ActionKind.WEIGHT in kinds
    names = {
        ActionKind.FORWARD: "forward",
        ActionKind.BACKWARD: "backward (where split: of the input)" if split else "backward",
        ActionKind.WEIGHT: "weight gradients",
    }
    shown = [patch(color=COLOURS[kind], label=name) for kind, name in names.items() if kind in kinds]
    if any(span.end > span.start for panel in panels for row in panel.transfers for span in row):
        shown.append(patch(color=TRANSFER, label="transfer (in a run: the wait for it)"))
    figure.legend(handles=shown, loc="outside upper right", ncols=len(shown), frameon=False, fontsize=9)
