"""`--img-log-dir`: the training curves as one PNG, redrawn while the run goes on.

Redrawing costs part of a second on rank 0, which the other ranks wait for, so it happens at most every `REDRAW_SECONDS`
and never takes more than two percent of the time. After a resume the curves go on from the state in the checkpoint or,
without one, from the JSONL log.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_llm.training.callbacks.base import Callback, EvalMetrics, RunInfo, StepMetrics, TrainSummary
from megatron_llm.training.callbacks.jsonl import read_log
from megatron_llm.utils.figure import draw
from megatron_llm.utils.series import Series

FILE_NAME = "training.png"
REDRAW_SECONDS = 30.0
REDRAW_SHARE = 0.02
STEP_KEYS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "loss_scale", "seconds", "data_wait")
EVALUATION_KEYS = ("validation_loss",)


class PlotCallback(Callback):
    """Draws `folder`/training.png. `log` is the JSONL log that curves are taken from when a checkpoint holds none."""

    name = "plot"

    def __init__(self, folder: str | Path, log: str | Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = Path(folder) / FILE_NAME
        self._log = Path(log) if log is not None else None
        self._clock = clock
        self._series = {key: Series(average=key != "loss_scale") for key in (*STEP_KEYS, *EVALUATION_KEYS)}
        self._title = ""
        self._last_drawn, self._cost = clock(), 0.0

    def on_train_start(self, info: RunInfo) -> None:
        """Take over the curves of the run that is resumed."""
        self._title = f"{info.config.model.model}, {info.parameter_count / 1e6:.3g} M parameters, {info.layout}"
        if info.start_step and not any(map(len, self._series.values())) and self._log is not None and self._log.exists():
            self._read(self._log)
        for series in self._series.values():
            series.drop_after(info.start_step)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Note the step; redraw when it is time to."""
        for key in STEP_KEYS:
            self._series[key].add(metrics.step, getattr(metrics, key))
        if self._clock() - self._last_drawn >= max(REDRAW_SECONDS, self._cost / REDRAW_SHARE):
            self._draw()

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Note the evaluation."""
        self._series["validation_loss"].add(metrics.step, metrics.loss)

    def on_train_end(self, summary: TrainSummary) -> None:
        """Draw the whole run."""
        self._draw()

    def state_dict(self) -> dict[str, Any]:
        """The curves, bounded in size whatever the length of the run."""
        return {key: series.state_dict() for key, series in self._series.items() if len(series)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for key, series in self._series.items():
            if key in state:
                series.load_state_dict(state[key])

    def _read(self, log: Path) -> None:
        for line in read_log(log):
            if line["event"] == "step":
                for key in STEP_KEYS:
                    self._series[key].add(line["step"], line.get(key))
            elif line["event"] == "evaluation":
                self._series["validation_loss"].add(line["step"], line["loss"])

    def _draw(self) -> None:
        start = self._clock()
        draw(self.path, self._title, self._series)
        self._last_drawn = self._clock()
        self._cost = self._last_drawn - start
