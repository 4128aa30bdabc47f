"""What all parts of the benchmark write alike: where and when they ran, comparisons, tables, one picture.

A comparison is our figure beside a peer's on the same work. `ratio` is always "how many times better ours is", whichever
direction is better, so that above 1 is ahead and below 1 is behind everywhere. What did not run is a line with its
reason; it never counts as anything.
"""

import dataclasses
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_llm.utils.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
PANEL = 80  # bars in one panel of a picture


@dataclass(frozen=True)
class Comparison:
    """Ours beside one peer. `share` is ours as a share of what the machine could do at best, where that is known."""

    part: str
    what: str
    unit: str
    peer: str
    ours: float | None = None
    theirs: float | None = None
    lower_is_better: bool = True
    share: float | None = None
    not_run: str | None = None

    @property
    def ratio(self) -> float | None:
        """Times that ours is better; None when either did not run."""
        if self.not_run is not None or not self.ours or not self.theirs:
            return None
        return self.theirs / self.ours if self.lower_is_better else self.ours / self.theirs

    def as_json(self) -> dict[str, Any]:
        """A mapping with the ratio in it."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def stamp() -> dict[str, Any]:
    """Machine, versions, commit and time: what a figure means nothing without."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _commit() -> str:
    """Short hash of the checkout, with + when files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown (not a git checkout)"


def _cpu_name() -> str:
    """The model's name as the system tells it, with family and model where the name is only a brand."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or "unknown"
    found = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in found.items()}
    detail = f" (family {values['cpu family']}, model {values['model']})" if "cpu family" in values and "model" in values else ""
    return values.get("model name", "unknown") + detail


def save(path: Path, part: str, comparisons: Iterable[Comparison], **more: Any) -> None:
    """The JSON file of one part, stamped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"part": part, "stamp": stamp(), "comparisons": [one.as_json() for one in comparisons], **more})


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1000 or value == 0 else (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def comparison_table(comparisons: Iterable[Comparison]) -> str:
    """Every comparison, one a line."""
    heads = ("work", "peer", "unit", "ours", "peer's", "times better", "share of the limit")
    return table(heads, (_row(one) for one in comparisons))


def _row(one: Comparison) -> tuple[str, ...]:
    ratio, share = one.ratio, one.share
    last = f"{ratio:.2f}" if ratio is not None else f"not run: {one.not_run or 'one of the two has no figure'}"
    return one.what, one.peer, one.unit, number(one.ours), number(one.theirs), last, f"{share:.0%}" if share is not None else "-"


def stamp_lines(values: Mapping[str, Any]) -> str:
    """The stamp as a Markdown list."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in values.items())


def plot(comparisons: Sequence[Comparison], path: Path, title: str) -> bool:
    """Bars of all ratios on logarithmic axes, 1 marked, into a PNG; False when nothing was compared.

    Many bars stand in panels beside each other, with one scale.
    """
    shown = [(one, ratio) for one in comparisons if (ratio := one.ratio) is not None]
    if not shown:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = -(-len(shown) // PANEL)
    each = -(-len(shown) // panels)
    figure = Figure(figsize=(11 * panels, 1.4 + 0.32 * each), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, panels, sharex=True, squeeze=False)[0]):
        _draw_bars(axes, shown[number * each : (number + 1) * each])
        axes.set_ylim(each - 0.4, -0.6)
    figure.suptitle(title, fontsize=11)
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def _draw_bars(axes: Any, shown: Sequence[tuple[Comparison, float]]) -> None:
    """One panel: a bar for each ratio, from the top down, left of 1 where ours is behind."""
    places = range(len(shown))
    colors = ["#2a7f62" if ratio >= 1 else "#b5503c" for _, ratio in shown]
    axes.barh(places, [ratio - 1 for _, ratio in shown], left=1, color=colors)
    axes.set_yticks(places, [f"{one.what}  vs  {one.peer}" for one, _ in shown], fontsize=8)
    for place, (_, ratio) in zip(places, shown, strict=True):
        axes.text(max(ratio, 1.0), place, f" {ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.15)
    axes.set_xlabel("times better than the peer (right of 1: ours is ahead)")
