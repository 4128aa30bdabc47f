"""What a callback is told and when.

Steps are counted by completion: `step` 1 is the first step of a run, and a run resumed from a checkpoint of step 100
starts with `start_step` 100 and reports 101 next. A loss that is not known is None, never a number.

Callbacks run on rank 0 only; the profiler, which records other ranks too, says so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_llm.config.schema import RunConfig


@dataclass(frozen=True)
class RunInfo:
    """The run that starts, as callbacks show it.

    config           resolved
    start_step       completed steps when it starts: 0, or the step of the checkpoint
    parameter_count  true parameters of the whole model, each once
    layout           one line: sizes of the parallel axes, device, backend
    lr_points        (step, learning rate) at the places where the schedule turns
    notes            further lines for the header: kernels in use, what the MFU is measured against, advice
    """

    config: RunConfig
    start_step: int
    train_iters: int
    world_size: int
    parameter_count: int
    layout: str
    lr_points: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepMetrics:
    """One completed step.

    loss is the mean over the unmasked tokens of the global batch, None where it is not known; tokens is the size of the
    global batch, masked tokens too; seconds is the step's wall time and data_wait the part of it in which
    rank 0 waited for its batches; mfu is a share of 1 and None where the peak is not
    known; skipped says that the optimizer did not move because a gradient overflowed.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float
    loss_scale: float | None
    skipped: bool
    tokens: int
    seconds: float
    data_wait: float
    consumed_samples: int
    tokens_per_second: float
    mfu: float | None


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation on the validation split after `step` steps; perplexity is exp(loss)."""

    step: int
    loss: float | None
    perplexity: float | None


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended: after all steps (`finished`) or early, `reason` says why in a few words."""

    step: int
    finished: bool
    reason: str
    seconds: float
    tokens: int


class Callback:
    """Told about a run as it goes. Every hook does nothing unless overridden; `name` keys the state in a checkpoint."""

    name: str = "callback"

    def on_train_start(self, info: RunInfo) -> None:
        """The run is about to take its first step; state has been loaded."""

    def on_step_end(self, metrics: StepMetrics) -> None:
        """A step is complete."""

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """An evaluation is complete."""

    def on_checkpoint(self, step: int, path: str) -> None:
        """A checkpoint is complete on disk."""

    def on_train_end(self, summary: TrainSummary) -> None:
        """The run ends, after its last step or early; not called when it dies of an error."""

    def state_dict(self) -> dict[str, Any]:
        """What the callback needs to go on after a resume, in JSON's types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, called before `on_train_start`."""


class CallbackList(Callback):
    """Several callbacks as one, told in the order given."""

    name = "callbacks"

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = tuple(callbacks)
        names = [callback.name for callback in self.callbacks]
        if len(set(names)) != len(names):
            raise ValueError(f"two callbacks share a name: {names}")

    def on_train_start(self, info: RunInfo) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            callback.on_train_start(info)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            callback.on_step_end(metrics)

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            callback.on_evaluation(metrics)

    def on_checkpoint(self, step: int, path: str) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            callback.on_checkpoint(step, path)

    def on_train_end(self, summary: TrainSummary) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            callback.on_train_end(summary)

    def state_dict(self) -> dict[str, Any]:
        """State by callback name; callbacks without state are left out."""
        states = {callback.name: callback.state_dict() for callback in self.callbacks}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every callback its state; state of a callback that is now off is left aside."""
        for callback in self.callbacks:
            if callback.name in state:
                callback.load_state_dict(state[callback.name])
