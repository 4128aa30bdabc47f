"""The log of a run as one JSON object a line, made to be read by programs.

`event` says what a line is: start, step, evaluation, checkpoint, end. A number that JSON cannot express is the text
"nan", "inf" or "-inf"; a value that is not known is null. Losses are written in full precision, so that two runs can be
compared bit by bit.

On resume, lines about steps after the checkpoint are removed, since those steps run again: no step appears twice. A
fresh run beside an old log moves the old one to log.jsonl.1 (2, 3 ...).
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from megatron_llm.training.callbacks.base import Callback, EvalMetrics, RunInfo, StepMetrics, TrainSummary
from megatron_llm.utils.atomic import atomic_file, make_folder, write_error


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The log's objects, with non-finite numbers as floats. A last line torn by a crash is left out."""
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield {key: _decoded(value) for key, value in json.loads(line).items()}


class JsonlCallback(Callback):
    """Appends to `path` and flushes every line, so that nothing is lost when the process dies."""

    name = "jsonl"

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._stream: TextIO | None = None

    def on_train_start(self, info: RunInfo) -> None:
        """Open the log where the run stands."""
        make_folder(self._path.parent)
        if self._path.exists() and info.start_step:
            _keep_until(self._path, info.start_step)
        elif self._path.exists():
            _move_aside(self._path)
        try:
            self._stream = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        except OSError as error:
            raise write_error(self._path, error) from error
        start = {"step": info.start_step, "train_iters": info.train_iters, "world_size": info.world_size, "layout": info.layout}
        self._write("start", {**start, "parameter_count": info.parameter_count})

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Append the step."""
        self._write("step", asdict(metrics))

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Append the evaluation."""
        self._write("evaluation", asdict(metrics))

    def on_checkpoint(self, step: int, path: str) -> None:
        """Append where the checkpoint lies."""
        self._write("checkpoint", {"step": step, "path": path})

    def on_train_end(self, summary: TrainSummary) -> None:
        """Append the end and close the file."""
        self._write("end", asdict(summary))
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        if self._stream is None:
            raise ValueError("the log is not open: on_train_start comes first")
        line = {"event": event, **{key: _encoded(value) for key, value in values.items()}, "time": round(time.time(), 3)}
        try:
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise write_error(self._path, error) from error


def _keep_until(path: Path, step: int) -> None:
    """Remove the lines about later steps, the end of an earlier run, and a torn last line."""
    kept = [line for line in read_log(path) if line["step"] <= step and line["event"] != "end"]
    with atomic_file(path, "w") as stream:
        for line in kept:
            stream.write(json.dumps({key: _encoded(value) for key, value in line.items()}, allow_nan=False) + "\n")


def _move_aside(path: Path) -> None:
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.rename(path, target)


def _encoded(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
