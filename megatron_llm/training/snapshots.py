"""What of a run goes into a checkpoint and how it comes back: weights, optimizer, position, callbacks, configuration.

There is no random state among it: weights are drawn by name, dropout by (seed, step, sample), and samples by their
number, so `step` and `consumed_samples` say it all, under any layout.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.find import choose_checkpoint
from megatron_llm.checkpoint.load import load_entries
from megatron_llm.checkpoint.manifest import Manifest, read_manifest
from megatron_llm.checkpoint.model_state import across_precisions, model_entries, optimizer_entries
from megatron_llm.config.schema import CheckpointConfig, RunConfig
from megatron_llm.config.serialize import from_dict, to_dict
from megatron_llm.optim.lr_schedule import learning_rate
from megatron_llm.training.engine import NativeEngine
from megatron_llm.utils.errors import UserError


@dataclass
class Progress:
    """Where a run is. `step` optimizer steps are done and `consumed_samples` samples were used for them.

    `data_order` names the order of the samples (`Inputs.order`); `saved` is the configuration of the checkpoint that was
    restored, None in a fresh run.
    """

    step: int = 0
    consumed_samples: int = 0
    best_validation_loss: float | None = None
    data_order: str | None = None
    saved: dict[str, Any] | None = None


class Snapshots:
    """Saves and restores one run. Every method is collective over the world."""

    def __init__(
        self,
        config: RunConfig,
        engine: NativeEngine,
        *,
        tokenizer: Path | None,
        tokenizer_fingerprint: str | None,
        report: Callable[[str], None],
    ) -> None:
        self._config, self._engine, self._report = config, engine, report
        self._tokenizer, self._fingerprint = tokenizer, tokenizer_fingerprint
        self._checkpointer = _make_checkpointer(config.checkpoint, engine, report)

    @property
    def saves(self) -> bool:
        """Whether a folder to save to was given."""
        return self._checkpointer is not None

    def save(self, progress: Progress, callbacks: Mapping[str, Any], validation_loss: float | None) -> Path:
        """Save the run as it is; returns the checkpoint's folder (still being written when saving in the background)."""
        assert self._checkpointer is not None, "ask `saves` first"
        state = {
            "config": to_dict(self._config),
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "best_validation_loss": progress.best_validation_loss,
            "data_order": progress.data_order,
            "optimizer": self._engine.optimizer.state_dict(),
            "callbacks": dict(callbacks),
            "tokenizer_fingerprint": self._fingerprint,
        }
        return self._checkpointer.save(progress.step, self._entries(), state, validation_loss, self._tokenizer)

    def wait(self) -> None:
        """Wait until the last save is on the disk."""
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def restore(self) -> tuple[Progress, dict[str, Any]]:
        """Load what `--load` or `--auto-resume` ask for; the position and the callbacks' states, fresh ones otherwise."""
        path = self._find()
        if path is None:
            return Progress(), {}
        manifest = read_manifest(path)
        self._check(path, manifest)
        with_optimizer = self._config.checkpoint.load_optim and not self._config.checkpoint.finetune
        entries = self._entries() if with_optimizer else self._weights()
        complete = ("",) if with_optimizer and not self._changes_precision(manifest) else ()
        load_entries(path, across_precisions(entries, manifest), self._engine.groups, cast=True, complete=complete)
        if with_optimizer:
            self._engine.optimizer.load_state_dict(manifest.state["optimizer"])
            self._engine.optimizer.after_load()
        else:
            self._engine.optimizer.read_parameters()
        if self._config.checkpoint.finetune:
            return Progress(), {}
        state = manifest.state
        progress = Progress(state["step"], state["consumed_samples"], state["best_validation_loss"], state["data_order"], state["config"])
        return progress, dict(state["callbacks"])

    def changes(self, progress: Progress, data_order: str | None) -> list[str]:
        """What goes on differently after a resume, one sentence each: the learning rate, the order of the samples."""
        if progress.saved is None:
            return []
        found = []
        before = from_dict(progress.saved, "the configuration of the checkpoint")
        lrs = [learning_rate(config.optimizer, progress.step, config.train.train_iters) for config in (before, self._config)]
        if not math.isclose(*lrs, rel_tol=1e-9):
            found.append(
                f"the learning rate of step {progress.step + 1} was to be {lrs[0]:.3g} and is now {lrs[1]:.3g}: "
                f"keep --lr-decay-iters {before.optimizer.lr_decay_iters} and the other lr flags to go on along the old curve"
            )
        if data_order != progress.data_order:
            found.append(
                f"the samples are in another order than when the checkpoint was saved (other data, split or seed, or a --train-iters that "
                f"takes another number of epochs): some of the first {progress.consumed_samples} may be seen again"
            )
        return found

    def _find(self) -> Path | None:
        options, groups = self._config.checkpoint, self._engine.groups
        if options.auto_resume and options.save is not None:
            found = choose_checkpoint(options.save, groups, self._report)
            if found is not None:
                return found
        if options.load is None:
            return None
        found = choose_checkpoint(options.load, groups, self._report)
        if found is None:
            raise UserError(f"no checkpoint in {options.load}: give --load a checkpoint or a folder of checkpoints, or leave it out")
        return found

    def _check(self, path: Path, manifest: Manifest) -> None:
        """Refuse a checkpoint of another family, vocabulary or tokenizer, with both values."""
        model = self._config.model
        for what, theirs, ours in (
            ("model family", manifest.family, model.model),
            ("vocabulary size", manifest.vocab_size, model.vocab_size),
            ("tokenizer", manifest.tokenizer_fingerprint, self._fingerprint),
        ):
            if theirs is not None and ours is not None and theirs != ours:
                raise UserError(f"{path} has {what} {theirs}, this run {ours}: use the data and flags that the checkpoint was made with")
        if manifest.state["consumed_samples"] and not self._config.checkpoint.finetune:
            saved = manifest.state["config"]["train"]["seq_length"]
            if saved != self._config.train.seq_length:
                raise UserError(
                    f"{path} stands at sample {manifest.state['consumed_samples']} of sequences of {saved} tokens, this run cuts sequences "
                    f"of {self._config.train.seq_length}: keep --seq-length {saved}, or start the data afresh with --finetune"
                )

    def _changes_precision(self, manifest: Manifest) -> bool:
        train = manifest.state["config"]["train"]
        return (train["bf16"] or train["fp16"]) != (self._config.train.bf16 or self._config.train.fp16)

    def _weights(self) -> list[Entry]:
        engine = self._engine
        return model_entries(engine.chunks, engine.family, engine.groups.dp)

    def _entries(self) -> list[Entry]:
        engine = self._engine
        state = optimizer_entries(engine.optimizer.segments(), engine.family, engine.groups.dp, sharded=engine.grad_sync.shard)
        return self._weights() + state


def _make_checkpointer(config: CheckpointConfig, engine: NativeEngine, report: Callable[[str], None]) -> Checkpointer | None:
    if config.save is None:
        return None
    return Checkpointer(
        config.save,
        engine.groups,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
        async_save=config.async_save,
        report=report,
    )
