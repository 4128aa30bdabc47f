"""Runs and steps that the callback tests share."""

from dataclasses import replace
from typing import Any

from megatron_llm.config.fields import updated
from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import RunConfig
from megatron_llm.training.callbacks.base import RunInfo, StepMetrics

CONFIG = resolve(updated(RunConfig(), mock_data=True, vocab_size=97, train_iters=10, lr_warmup_iters=2, num_query_groups=2), 2)
INFO = RunInfo(CONFIG, 0, 10, 2, 1_234_567, "TP 1 x PP 1 x DP 2 on 2 ranks (cpu, gloo)", ((1, 0.0), (3, 3e-4)), ("numpy index builder",))


def info(start_step: int = 0) -> RunInfo:
    """The run, resumed after `start_step` steps."""
    return replace(INFO, start_step=start_step)


def metrics(step: int, **changes: Any) -> StepMetrics:
    """The metrics of one step."""
    usual = StepMetrics(
        step=step,
        loss=5.0 - step / 10,
        lr=1e-3 * step,
        grad_norm=1.25,
        loss_scale=None,
        skipped=False,
        tokens=1000,
        seconds=0.5,
        data_wait=0.002,
        consumed_samples=8 * step,
        tokens_per_second=2000.0,
        mfu=0.25,
    )
    return replace(usual, **changes)
