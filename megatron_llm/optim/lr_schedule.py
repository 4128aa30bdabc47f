"""The learning rate as a pure function of the step.

Nothing is stored and nothing to restore on resume. `step` counts the optimizer steps taken before, so the first step of
a run uses `learning_rate(config, 0, ...)`. With a warm-up this is 0 and grows linearly to the peak, as in Megatron,
whose formulas these are.

Decay shapes: linear; cosine (Loshchilov and Hutter 2017, "SGDR"); inverse square root (Vaswani et al. 2017, "Attention
Is All You Need"); WSD, that is warm-up, a stable phase and a short final decay (Hu et al. 2024, "MiniCPM").
"""

import math

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.utils.errors import UserError


def learning_rate(config: OptimizerConfig, step: int, train_iters: int) -> float:
    """The learning rate of the step that follows `step` others, in a run of `train_iters` steps."""
    total = decay_iters(config, train_iters)
    warmup = warmup_iters(config, train_iters)
    if warmup > 0 and step <= warmup:
        return config.lr * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if step > total:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / max(step, 1)))
    return config.min_lr + (config.lr - config.min_lr) * _remaining(config, step, warmup, total)


def decay_iters(config: OptimizerConfig, train_iters: int) -> int:
    """The step at which the decay ends."""
    return train_iters if config.lr_decay_iters is None else config.lr_decay_iters


def warmup_iters(config: OptimizerConfig, train_iters: int) -> float:
    """Length of the warm-up in steps: given as such, or as a fraction of the decay (then not rounded)."""
    if config.lr_warmup_fraction is None:
        return config.lr_warmup_iters
    return config.lr_warmup_fraction * decay_iters(config, train_iters)


def _remaining(config: OptimizerConfig, step: int, warmup: float, total: int) -> float:
    """The part of the way from the minimum to the peak that is left: 1 at the end of the warm-up, 0 at `total`."""
    if config.lr_decay_style == "WSD":
        length = max(1, total // 10) if config.lr_wsd_decay_iters is None else config.lr_wsd_decay_iters
        start = total - length
        return 1.0 if step <= start else _shape(config.lr_wsd_decay_style, (step - start) / length)
    # The decay counts from the end of the warm-up. total == warmup leaves no step to decay over.
    return _shape(config.lr_decay_style, (step - warmup) / (total - warmup) if total > warmup else 1.0)


def _shape(style: str, done: float) -> float:
    """A curve from 1 at `done` = 0 to 0 at `done` = 1."""
    if style == "linear":
        return 1.0 - done
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**done - 1.0
    raise UserError(f"unknown learning-rate decay style {style!r}: lr_decay_style and lr_wsd_decay_style list the known ones")
