"""The training loop: step, evaluate, save, leave. Everything optional is a callback.

The loop is the same on every rank, and whether to evaluate, save or leave is decided by the step number or by all ranks
together, so that no rank waits alone for the others.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_llm.config.schema import RunConfig
from megatron_llm.data.batch import Batch
from megatron_llm.optim.lr_schedule import learning_rate
from megatron_llm.parallel.comm import all_reduce
from megatron_llm.parallel.failure import PhaseTracker
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.training.callbacks.base import CallbackList, EvalMetrics, RunInfo, StepMetrics, TrainSummary
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.sanity import require_agreement
from megatron_llm.training.signals import ExitMonitor
from megatron_llm.training.snapshots import Progress, Snapshots


class Trainer:
    """Runs a training to its last step or until it is asked to leave.

    `train_batches` starts at `progress.consumed_samples`; `validation_batches` gives the same global batches each time
    it is called, None without a validation split. `callbacks` are this rank's.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: NativeEngine,
        snapshots: Snapshots,
        progress: Progress,
        *,
        train_batches: Iterator[list[Batch]],
        validation_batches: Callable[[], Iterable[Sequence[Batch]]] | None,
        callbacks: CallbackList,
        exit_monitor: ExitMonitor,
        phase: PhaseTracker,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        self.config, self.engine, self.snapshots, self.progress = config, engine, snapshots, progress
        self.train_batches, self.validation_batches = train_batches, validation_batches
        self.callbacks, self.exit_monitor, self.phase = callbacks, exit_monitor, phase
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._saved_step = progress.step if progress.step else -1
        self._validated: tuple[int, float] | None = None
        self._unannounced: tuple[int, Path] | None = None

    @property
    def groups(self) -> ParallelGroups:
        """The engine's groups."""
        return self.engine.groups

    def run(self, info: RunInfo) -> TrainSummary:
        """Train from where `progress` stands; the summary says why the run ended."""
        began, tokens = time.monotonic(), 0
        self.callbacks.on_train_start(info)
        reason = "all steps are done"
        while self.progress.step < self.config.train.train_iters:
            tokens += self._step()
            leaving = self._leaving()
            last = self.progress.step == self.config.train.train_iters
            if self._due(self.config.train.eval_interval) or (last and self.config.train.eval_interval):
                self._evaluate()
            if self.snapshots.saves and (self._due(self.config.checkpoint.save_interval) or last or leaving):
                self._save()
            if leaving and not last:
                reason = leaving
                break
        self.phase.enter("finishing the last checkpoint", step=self.progress.step)
        self.snapshots.wait()
        self._announce(None)
        summary = TrainSummary(
            step=self.progress.step,
            finished=self.progress.step >= self.config.train.train_iters,
            reason=reason,
            seconds=time.monotonic() - began,
            tokens=tokens,
        )
        self.callbacks.on_train_end(summary)
        return summary

    def _step(self) -> int:
        """One optimizer step; the tokens of its global batch."""
        config, progress = self.config, self.progress
        assert config.train.global_batch_size is not None, "the configuration must be resolved"
        began = time.perf_counter()
        self.phase.enter("reading data", step=progress.step + 1)
        batches = next(self.train_batches)
        data_wait = time.perf_counter() - began
        self.phase.enter("training")
        lr = learning_rate(config.optimizer, progress.step, config.train.train_iters)
        outcome = self.engine.train_step(batches, step=progress.step, first_sample=progress.consumed_samples, lr=lr)
        progress.step += 1
        progress.consumed_samples += config.train.global_batch_size
        if config.train.sanity_checks:
            require_agreement(self.engine.chunks, self.groups, progress.step)
        seconds = time.perf_counter() - began
        tokens = config.train.global_batch_size * config.train.seq_length
        rate = tokens / seconds
        metrics = StepMetrics(
            step=progress.step,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            loss_scale=outcome.loss_scale,
            skipped=outcome.skipped,
            tokens=tokens,
            seconds=seconds,
            data_wait=data_wait,
            consumed_samples=progress.consumed_samples,
            tokens_per_second=rate,
            mfu=rate * self._flops_per_token / self._peak_flops if self._peak_flops else None,
        )
        self.callbacks.on_step_end(metrics)
        return tokens

    def _evaluate(self) -> None:
        if self.validation_batches is None:
            return
        self.phase.enter("evaluating", step=self.progress.step)
        loss = self.engine.evaluate(self.validation_batches())
        if loss is None:
            return
        self._validated = (self.progress.step, loss)
        best = self.progress.best_validation_loss
        self.progress.best_validation_loss = loss if best is None else min(best, loss)
        self.callbacks.on_evaluation(EvalMetrics(step=self.progress.step, loss=loss, perplexity=math.exp(min(loss, 700.0))))

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        self.phase.enter("saving", step=self.progress.step)
        validated = self._validated[1] if self._validated and self._validated[0] == self.progress.step else None
        path = self.snapshots.save(self.progress, self.callbacks.state_dict(), validated)
        self._saved_step = self.progress.step
        # In the background only the save before this one is known to be on the disk.
        self._announce((self.progress.step, path))
        if not self.config.checkpoint.async_save:
            self._announce(None)

    def _announce(self, saved: tuple[int, Path] | None) -> None:
        """Tell the callbacks of the save before, and keep this one to be told of when it is complete."""
        if self._unannounced is not None:
            self.callbacks.on_checkpoint(self._unannounced[0], str(self._unannounced[1]))
        self._unannounced = saved

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _leaving(self) -> str | None:
        """Why to leave after this step, the same on every rank: one rank that was asked takes all with it."""
        reason = self.exit_monitor.should_exit(self.progress.step)
        asked = torch.tensor(int(reason is not None), device=self.groups.device)
        if not all_reduce(asked, self.groups.world, op="max").item():
            return None
        return reason or "another rank was asked to leave"
