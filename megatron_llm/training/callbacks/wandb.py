"""Weights & Biases, where it is installed. The run's id travels with the checkpoint, so a resumed run continues its curves."""

from collections.abc import Mapping
from typing import Any

from megatron_llm.config.serialize import to_dict
from megatron_llm.training.callbacks.base import Callback, EvalMetrics, RunInfo, StepMetrics, TrainSummary
from megatron_llm.training.callbacks.tensorboard import evaluation_scalars, step_scalars
from megatron_llm.utils.optional import require


class WandbCallback(Callback):
    """Logs to a project. UserError at construction when wandb is not installed."""

    name = "wandb"

    def __init__(self, project: str, run_name: str | None = None) -> None:
        self._wandb = require("wandb", extra="wandb", purpose="--wandb-project")
        self._project, self._run_name = project, run_name
        self._run_id: str | None = None
        self._run: Any = None

    def on_train_start(self, info: RunInfo) -> None:
        """Start a run, or continue the one of the checkpoint."""
        config = {**to_dict(info.config), "parameter_count": info.parameter_count, "layout": info.layout}
        self._run = self._wandb.init(
            project=self._project, name=self._run_name, id=self._run_id, resume="allow" if self._run_id else None, config=config
        )
        self._run_id = self._run.id

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Log what is known of the step."""
        self._run.log(step_scalars(metrics), step=metrics.step)

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Log the validation scalars."""
        self._run.log(evaluation_scalars(metrics), step=metrics.step)

    def on_train_end(self, summary: TrainSummary) -> None:
        """Finish the run."""
        self._run.finish(exit_code=0)

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self._run_id} if self._run_id else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run with this id."""
        self._run_id = state["run_id"]
