"""Which callbacks a configuration asks for."""

from megatron_llm.config.schema import RunConfig
from megatron_llm.training.callbacks.base import Callback
from megatron_llm.training.callbacks.console import ConsoleCallback
from megatron_llm.training.callbacks.jsonl import JsonlCallback
from megatron_llm.training.callbacks.plot import PlotCallback
from megatron_llm.training.callbacks.profiler import ProfilerCallback
from megatron_llm.training.callbacks.tensorboard import TensorBoardCallback
from megatron_llm.training.callbacks.wandb import WandbCallback


def build_callbacks(config: RunConfig, rank: int) -> list[Callback]:
    """The callbacks of one rank for a resolved configuration: all of them on rank 0, only the profiler on others.

    The log file comes before the plot, which may read it. UserError when an option's package is not installed.
    """
    log = config.log
    callbacks: list[Callback] = []
    if log.profile_step_start is not None and log.profile_step_end is not None and rank in log.profile_ranks:
        callbacks.append(ProfilerCallback(log.profile_step_start, log.profile_step_end, log.profile_dir, rank))
    if rank != 0:
        return callbacks
    callbacks.append(ConsoleCallback(log.log_interval))
    if log.log_jsonl is not None:
        callbacks.append(JsonlCallback(log.log_jsonl))
    if log.tensorboard_dir is not None:
        callbacks.append(TensorBoardCallback(log.tensorboard_dir))
    if log.wandb_project is not None:
        callbacks.append(WandbCallback(log.wandb_project, log.wandb_exp_name))
    if log.img_log_dir is not None:
        callbacks.append(PlotCallback(log.img_log_dir, log.log_jsonl))
    return callbacks
