"""Readable lines for the person at the terminal: what runs, how it goes, when it will be done.

The header shows the learning rate at the places where its schedule turns, so that a wrong schedule is seen before the
first step and not after a day.
"""

import time
from collections.abc import Callable

from megatron_llm.config.layout_rules import micro_batches
from megatron_llm.training.callbacks.base import Callback, EvalMetrics, RunInfo, StepMetrics, TrainSummary
from megatron_llm.utils.progress import amount, duration


def print_line(text: str) -> None:
    """Write one line to stdout at once, also through a pipe."""
    print(text, flush=True)


def header(info: RunInfo) -> list[str]:
    """Lines that describe the run: model, layout, batch, learning rate, notes."""
    config, model, train = info.config, info.config.model, info.config.train
    precision = "bf16" if train.bf16 else "fp16" if train.fp16 else "fp32"
    heads = f"{model.num_attention_heads} heads"
    if model.num_query_groups != model.num_attention_heads:
        heads += f" ({model.num_query_groups} key/value)"
    count, batch = micro_batches(config, info.world_size) or 1, train.global_batch_size or 0
    tokens = batch * train.seq_length
    rest = info.train_iters - info.start_step
    lines = [
        f"model    {model.model}, {amount(info.parameter_count)} parameters in {precision}: {model.num_layers} layers, hidden "
        f"{model.hidden_size}, {heads}, MLP {model.ffn_hidden_size}, vocabulary {model.vocab_size}",
        f"layout   {info.layout}",
        f"batch    {batch} sequences x {train.seq_length} tokens = {amount(tokens)} tokens a step: micro-batch "
        f"{train.micro_batch_size} x DP {batch // (train.micro_batch_size * count)} x {count} accumulated",
        f"steps    {f'{info.start_step + 1} to {info.train_iters}' if info.start_step else info.train_iters}, "
        f"{amount(rest * tokens)} tokens",
    ]
    if info.lr_points:
        points = ", ".join(f"{lr:.3g} at step {step}" for step, lr in info.lr_points)
        lines.append(f"lr       {points} ({config.optimizer.lr_decay_style})")
    return lines + [f"note     {note}" for note in info.notes]


class ConsoleCallback(Callback):
    """Prints the header, a line every `log_interval` steps, evaluations, checkpoints and the end.

    Speeds are those of the steps since the last line; the time left counts evaluations and checkpoints too.
    """

    name = "console"

    def __init__(self, log_interval: int, write: Callable[[str], None] = print_line, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._write, self._clock = log_interval, write, clock
        self._last = 0
        self._since: list[StepMetrics] = []
        self._first: tuple[int, float] | None = None  # step and time of the first completed step, which warms everything up

    def on_train_start(self, info: RunInfo) -> None:
        """Print the header."""
        self._last = info.train_iters
        for line in header(info):
            self._write(line)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Print the first step, every `log_interval`-th and the last."""
        now = self._clock()
        first = self._first is None
        if self._first is None:
            self._first = (metrics.step, now)
        self._since.append(metrics)
        if first or metrics.step % self._interval == 0 or metrics.step == self._last:
            self._write(step_line(self._since, self._last, self._seconds_left(metrics.step, now)))
            self._since = []

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """Print validation loss and perplexity."""
        self._write(f"evaluation after step {metrics.step}: loss {number(metrics.loss)}, perplexity {number(metrics.perplexity)}")

    def on_checkpoint(self, step: int, path: str) -> None:
        """Print where it lies."""
        self._write(f"checkpoint of step {step} saved: {path}")

    def on_train_end(self, summary: TrainSummary) -> None:
        """Print how the run ended."""
        end = "training finished" if summary.finished else f"leaving early ({summary.reason})"
        rate = amount(summary.tokens / summary.seconds) if summary.seconds > 0 else "-"
        self._write(f"{end} at step {summary.step}: {amount(summary.tokens)} tokens in {duration(summary.seconds)}, {rate} tokens/s")

    def _seconds_left(self, step: int, now: float) -> float | None:
        if self._first is None or step <= self._first[0]:
            return None
        return (self._last - step) * (now - self._first[1]) / (step - self._first[0])


def step_line(steps: list[StepMetrics], last_step: int, seconds_left: float | None) -> str:
    """One line on the last of `steps`, with mean speeds over all of them. A value that is not known is a dash."""
    latest = steps[-1]
    seconds = sum(metrics.seconds for metrics in steps)
    parts = [
        f"step {latest.step:>{len(str(last_step))}}/{last_step}",
        f"loss {number(latest.loss):>6}",
        f"lr {latest.lr:.2e}",
        f"grad norm {number(latest.grad_norm)}",
        f"{amount(sum(metrics.tokens for metrics in steps) / seconds) if seconds > 0 else '-'} tokens/s",
    ]
    known = [metrics for metrics in steps if metrics.mfu is not None]
    if known and seconds > 0:
        share = sum((metrics.mfu or 0.0) * metrics.seconds for metrics in known) / sum(metrics.seconds for metrics in known)
        parts.append(f"MFU {100 * share:.1f} %")
    parts.append(f"{_step_time(seconds / len(steps))}/step")
    parts.append(f"data wait {_step_time(sum(metrics.data_wait for metrics in steps) / len(steps))}")
    if latest.loss_scale is not None:
        parts.append(f"loss scale {latest.loss_scale:g}")
    skipped = sum(metrics.skipped for metrics in steps)
    if skipped:
        parts.append(f"{skipped} skipped (overflow)")
    if seconds_left is not None:
        parts.append(f"ETA {duration(seconds_left)}")
    return " | ".join(parts)


def number(value: float | None) -> str:
    """Four significant digits, or a dash when not known."""
    return "-" if value is None else f"{value:#.4g}"


def _step_time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
