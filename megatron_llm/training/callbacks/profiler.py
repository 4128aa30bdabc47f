"""torch.profiler over some steps, on the ranks chosen. Unlike the other callbacks it runs on ranks other than 0 too."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_llm.training.callbacks.base import Callback, RunInfo, StepMetrics, TrainSummary
from megatron_llm.utils.atomic import make_folder


class ProfilerCallback(Callback):
    """Records the steps `first` to `stop` - 1 (the first step of a run is 1) and writes one trace a rank to `folder`.

    Open the trace at https://ui.perfetto.dev or in chrome://tracing. A run that ends earlier writes what it has; a run
    that resumes after `first` records from its first step if that is before `stop`.
    """

    name = "profiler"

    def __init__(self, first: int, stop: int, folder: str | Path, rank: int) -> None:
        self._first, self._stop, self._folder, self._rank = first, stop, Path(folder), rank
        self._profile: profile | None = None
        self._started = 0

    def on_train_start(self, info: RunInfo) -> None:
        """Start at once when the first step is to be recorded."""
        self._start_before(info.start_step + 1)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Stop after the last step wanted, start before the first."""
        if self._profile is not None and metrics.step + 1 >= self._stop:
            self._finish(metrics.step)
        else:
            self._start_before(metrics.step + 1)

    def on_train_end(self, summary: TrainSummary) -> None:
        """Write what there is."""
        if self._profile is not None:
            self._finish(summary.step)

    def _start_before(self, step: int) -> None:
        if self._profile is not None or not self._first <= step < self._stop:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile, self._started = profile(activities=activities, record_shapes=True), step
        self._profile.__enter__()

    def _finish(self, step: int) -> None:
        assert self._profile is not None
        self._profile.__exit__(None, None, None)
        path = make_folder(self._folder) / f"steps_{self._started}_to_{step}_rank_{self._rank}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
