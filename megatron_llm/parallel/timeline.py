"""A pipeline plan as a picture: one row a stage, time to the right, so that the bubble can be seen."""

from pathlib import Path

from megatron_llm.parallel.schedules import ActionKind
from megatron_llm.parallel.simulator import Simulation
from megatron_llm.utils.optional import require

COLOURS = {ActionKind.FORWARD: "#4c78a8", ActionKind.BACKWARD: "#f58518"}
LIGHTEST = 0.35  # opacity of chunk 0; later chunks are darker


def draw_timeline(simulation: Simulation, title: str, path: Path) -> None:
    """Write a PNG: blue forwards, orange backwards, numbered by micro-batch, chunks from light to dark.

    UserError when matplotlib is not installed.
    """
    stages = len(simulation.spans)
    chunks = 1 + max(span.action.chunk for spans in simulation.spans for span in spans)
    figure = require("matplotlib.figure", purpose="drawing a schedule").Figure(
        figsize=(min(40.0, 2.0 + 0.22 * simulation.ticks), 1.6 + 0.5 * stages), layout="constrained"
    )
    axes = figure.add_subplot()
    for stage, spans in enumerate(simulation.spans):
        for span in spans:
            kind, chunk, micro, _ = span.action
            opacity = 1.0 if chunks == 1 else LIGHTEST + (1 - LIGHTEST) * chunk / (chunks - 1)
            axes.barh(stage, span.end - span.start, left=span.start, height=0.9, color=COLOURS[kind], alpha=opacity, edgecolor="white")
            axes.text((span.start + span.end) / 2, stage, str(micro), ha="center", va="center", fontsize=7)
    peaks = simulation.peak_activations
    axes.set_yticks(range(stages), [f"stage {stage}\npeak {peaks[stage]}" for stage in range(stages)])
    axes.invert_yaxis()
    axes.set_xlim(0, simulation.ticks)
    axes.set_xlabel("ticks (forward 1, backward 2)")
    axes.set_title(f"{title}: {simulation.ticks:g} ticks, {simulation.bubble:.0%} idle", loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for kind, label in ((ActionKind.FORWARD, "forward"), (ActionKind.BACKWARD, "backward")):
        axes.barh(0, 0, color=COLOURS[kind], label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
