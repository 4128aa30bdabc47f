"""TensorBoard events, one scalar a step; a resumed run replaces what was written after its checkpoint."""

from typing import Any

from megatron_llm.config.serialize import to_yaml
from megatron_llm.training.callbacks.base import Callback, EvalMetrics, RunInfo, StepMetrics, TrainSummary
from megatron_llm.utils.optional import require


class TensorBoardCallback(Callback):
    """Writes to `folder`. UserError at construction when tensorboard is not installed."""

    name = "tensorboard"

    def __init__(self, folder: str) -> None:
        require("tensorboard", extra="track", purpose="--tensorboard-dir")
        self._module = require("torch.utils.tensorboard", extra="track", purpose="--tensorboard-dir")
        self._folder = folder
        self._writer: Any = None

    def on_train_start(self, info: RunInfo) -> None:
        """Open the event file and write the configuration as text."""
        purge = info.start_step + 1 if info.start_step else None
        self._writer = self._module.SummaryWriter(self._folder, purge_step=purge)
        self._writer.add_text("config", f"```\n{to_yaml(info.config)}```", info.start_step)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Write what is known of the step."""
        for key, value in step_scalars(metrics).items():
            self._writer.add_scalar(key, value, metrics.step)

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Write the validation scalars and make them visible at once."""
        for key, value in evaluation_scalars(metrics).items():
            self._writer.add_scalar(key, value, metrics.step)
        self._writer.flush()

    def on_train_end(self, summary: TrainSummary) -> None:
        """Close the event file."""
        self._writer.close()


def step_scalars(metrics: StepMetrics) -> dict[str, float]:
    """Scalars of a step by tag; a value that is not known is left out."""
    values = {
        "train/loss": metrics.loss,
        "train/lr": metrics.lr,
        "train/grad_norm": metrics.grad_norm,
        "train/loss_scale": metrics.loss_scale,
        "train/consumed_samples": metrics.consumed_samples,
        "speed/tokens_per_second": metrics.tokens_per_second,
        "speed/seconds_per_step": metrics.seconds,
        "speed/data_wait_seconds": metrics.data_wait,
        "speed/mfu": metrics.mfu,
    }
    return {key: value for key, value in values.items() if value is not None}


def evaluation_scalars(metrics: EvalMetrics) -> dict[str, float]:
    """Scalars of an evaluation by tag."""
    values = {"validation/loss": metrics.loss, "validation/perplexity": metrics.perplexity}
    return {key: value for key, value in values.items() if value is not None}
