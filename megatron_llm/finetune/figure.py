"""The picture of a fine-tuning run: loss, validation, learning rate, gradient norm, speed and time on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_llm.utils import figure
from megatron_llm.utils.series import Series


def draw(path: Path, title: str, entries: Sequence[dict[str, Any]]) -> None:
    """Write the PNG from the entries of a log (`recorder.Recorder`), atomically."""
    figure.draw(path, title, curves(entries))


def curves(entries: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """The curves of a log, by `figure.KEYS`."""
    series = {key: Series() for key in figure.KEYS}
    for entry in entries:
        if entry["event"] == "evaluation":
            series["validation_loss"].add(entry["step"], entry["loss"])
            continue
        for key in ("loss", "lr", "grad_norm", "seconds"):
            series[key].add(entry["step"], entry[key])
        series["tokens_per_second"].add(entry["step"], entry["tokens"] / max(entry["seconds"], 1e-9))
    return series
