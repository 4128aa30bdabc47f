"""What of a run goes into a checkpoint and how it comes back: weights, optimizer, position, callbacks, configuration.

There is no random state among it: weights are drawn by name, dropout by (seed, step, sample), and samples by their
number, so `step` and `consumed_samples` say it all, under any layout.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.contract import (
    Contract,
    contract_of_checkpoint,
    contract_of_hf_folder,
    enforce,
    folder_tokenizers,
    mismatches,
    rope_settings,
)
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.exchange import agree, attempt
from megatron_llm.checkpoint.find import load_newest
from megatron_llm.checkpoint.hf_documents import model_documents, token_ids
from megatron_llm.checkpoint.hf_manifest import is_foreign, open_manifest
from megatron_llm.checkpoint.load import load_entries
from megatron_llm.checkpoint.manifest import OPTIMIZER, Manifest
from megatron_llm.checkpoint.model_state import MAIN, across_precisions, model_entries, optimizer_entries
from megatron_llm.checkpoint.tensor_file import dtype_name
from megatron_llm.config.schema import RunConfig
from megatron_llm.config.serialize import from_dict, to_dict
from megatron_llm.lora.parallel import ADAPTER_CONFIG, PREFIX, peft_config
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
        contract: Contract | None = None,
    ) -> None:
        self._config, self._engine, self._report = config, engine, report
        self._tokenizer, self._fingerprint = tokenizer, tokenizer_fingerprint
        self._contract = contract or Contract(
            dtype=dtype_name(engine.dtype),
            vocab_size=config.model.vocab_size,
            tokenizers={"": tokenizer_fingerprint} if tokenizer_fingerprint is not None else {},
            rope=rope_settings(config.model),
        )
        self._checkpointer = _make_checkpointer(config, engine, report)
        self._stamp, self._documents = self._contract, dict[str, Any]()
        if self._checkpointer is not None:
            written, error = attempt(self._describe) if engine.groups.world.rank == 0 else (None, None)
            agree(error, "describing the model for its checkpoints", engine.groups)
            self._stamp, self._documents = written or (self._stamp, self._documents)
            self._checkpointer.reserve(self._entries() + self._buffers())
            engine.before_update = self._checkpointer.settle

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
        return self._checkpointer.save(
            progress.step,
            self._entries() + self._buffers(),
            state,
            validation_loss,
            self._tokenizer,
            documents=self._documents,
            contract=self._stamp.to_json(),
        )

    def wait(self) -> None:
        """Wait until the last save is on the disk."""
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def restore(self) -> tuple[Progress, dict[str, Any]]:
        """Load what `--load` or `--auto-resume` ask for; the position and the callbacks' states, fresh ones otherwise.

        A Hugging Face folder, and a checkpoint that holds no optimizer state, give weights only: the run begins at step 0.
        A run that trains adapters takes its frozen weights from `--load`, and goes on only from its own checkpoints.
        """
        if self._adapts:
            self._load_frozen()
        options, groups = self._config.checkpoint, self._engine.groups
        if options.auto_resume and options.save is not None:
            resumed = load_newest(options.save, groups, lambda path: self._restore(path, own=True), self._report)
            if resumed is not None:
                return resumed
        if options.load is None or self._adapts:
            return Progress(), {}
        begun = load_newest(options.load, groups, lambda path: self._restore(path, own=False), self._report, foreign=True)
        if begun is None:
            raise UserError(
                f"no checkpoint in {options.load}: give --load a checkpoint, a folder of checkpoints or a Hugging Face folder, "
                "or leave it out"
            )
        return begun

    def _restore(self, path: Path, *, own: bool) -> tuple[Progress, dict[str, Any]]:
        """Load a checkpoint or Hugging Face folder; `own`: this run saved it."""
        manifest, options = open_manifest(path), self._config.checkpoint
        trained = any(key.startswith(OPTIMIZER) for key in manifest.tensors)
        # --finetune and --no-load-optim are about --load: a run that goes on from its own checkpoint has started already.
        began = own and options.load is not None
        resumes = trained and (began or not options.finetune)
        self._check(path, manifest, resumes=resumes)
        if not trained and not is_foreign(path):
            self._report(f"note     {path} holds weights only: optimizer, data and step start fresh")
        with_optimizer = resumes and (began or options.load_optim)
        self._load(path, manifest, with_optimizer=with_optimizer)
        if not resumes:
            return Progress(), {}
        state = manifest.state
        progress = Progress(state["step"], state["consumed_samples"], state["best_validation_loss"], state["data_order"], state["config"])
        return progress, dict(state["callbacks"])

    @property
    def _adapts(self) -> bool:
        """Whether only adapters are trained."""
        return self._config.lora.lora_rank is not None

    def _load_frozen(self) -> None:
        """The weights that the adapters stand beside, from `--load`, in whatever form they are."""
        load, groups = self._config.checkpoint.load, self._engine.groups
        assert load is not None, "a rule asks for --load when adapters are trained"

        def load_from(path: Path) -> Path:
            manifest = open_manifest(path)
            self._check(path, manifest, resumes=False)
            frozen = [entry for entry in self._all_weights() if not entry.key.startswith(PREFIX)]
            complete = ("",) if is_foreign(path) else ()
            load_entries(path, across_precisions(frozen, manifest), groups, cast=True, complete=complete, finite=True, verify=True)
            return path

        if load_newest(load, groups, load_from, self._report, foreign=True) is None:
            raise UserError(f"no checkpoint in {load}: adapters need the weights that they stand beside, give their folder with --load")

    def _load(self, path: Path, manifest: Manifest, *, with_optimizer: bool) -> None:
        """Weights and main copies, each from the most precise copy there is; moments too when resuming."""
        self.wait()  # a save under way may still copy what is overwritten here
        entries = self._entries()
        if not with_optimizer:
            entries = [entry for entry in entries if not entry.key.startswith(OPTIMIZER) or entry.key.startswith(MAIN)]
        complete = ("",) if (with_optimizer and not self._changes_precision(manifest)) or is_foreign(path) else ()
        adapted = across_precisions(entries, manifest)
        load_entries(path, adapted, self._engine.groups, cast=True, complete=complete, finite=True, verify=True)
        if with_optimizer:
            self._engine.optimizer.load_state_dict(manifest.state["optimizer"])
        self._engine.optimizer.after_load()

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

    def _check(self, path: Path, manifest: Manifest, *, resumes: bool) -> None:
        """Refuse weights of another family, vocabulary, tokenizer or position scaling, with both values."""
        model, options = self._config.model, self._config.checkpoint
        if manifest.family is not None and manifest.family != model.model:
            raise UserError(
                f"{path} has model family {manifest.family}, this run {model.model}: "
                "use the data and flags that the checkpoint was made with"
            )
        theirs = contract_of_hf_folder(path) if is_foreign(path) else contract_of_checkpoint(manifest)
        # Weights are taken into fp32 main copies exactly; only the state of a training goes with one 16-bit type.
        theirs = theirs if resumes else replace(theirs, dtype=None)
        enforce(path, mismatches(theirs, self._contract), options.allow_mismatch, self._report)
        if resumes and manifest.state["config"].get("lora", {}) != to_dict(self._config)["lora"]:
            raise UserError(
                f"{path} was saved by a run with adapters {manifest.state['config'].get('lora')}, this run has "
                f"{to_dict(self._config)['lora']}: keep the lora settings, or save to another folder"
            )
        if resumes and manifest.state["consumed_samples"]:
            saved = manifest.state["config"]["train"]["seq_length"]
            if saved != self._config.train.seq_length:
                raise UserError(
                    f"{path} stands at sample {manifest.state['consumed_samples']} of sequences of {saved} tokens, this run cuts sequences "
                    f"of {self._config.train.seq_length}: keep --seq-length {saved}, or start the data afresh with --finetune"
                )

    def _describe(self) -> tuple[Contract, dict[str, Any]]:
        """Rank 0: the contract with the fingerprints of the tokenizer as it is saved, and the folder's JSON files."""
        saved = folder_tokenizers(self._tokenizer) if self._tokenizer is not None else {}
        stamp = replace(self._contract, tokenizers={**saved, **self._contract.tokenizers})
        model, options = self._config.model, self._config.checkpoint
        if self._adapts:
            assert options.load is not None, "a rule asks for --load when adapters are trained"
            return stamp, {ADAPTER_CONFIG: peft_config(self._config.lora, self._engine.family, str(Path(options.load).absolute()))}
        if options.checkpoint_format != "hf":
            return stamp, {}
        return stamp, model_documents(model, dtype_name(self._engine.dtype), token_ids(self._tokenizer, model), stamp)

    def _buffers(self) -> list[Entry]:
        """Tensors that are no weights but that the published loader expects beside them, in the Hugging Face form."""
        engine = self._engine
        groups = engine.groups
        if self._config.checkpoint.checkpoint_format != "hf" or self._adapts or groups.tp.rank or not groups.is_first_stage:
            return []
        buffers = engine.family.buffers(self._config.model)
        return [
            Entry(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor.to(groups.device), owned=groups.dp.rank == 0)
            for key, tensor in buffers.items()
        ]

    def _changes_precision(self, manifest: Manifest) -> bool:
        train = manifest.state["config"]["train"]
        return (train["bf16"] or train["fp16"]) != (self._config.train.bf16 or self._config.train.fp16)

    def _weights(self) -> list[Entry]:
        """What a checkpoint of this run holds: all weights, or the adapters alone."""
        return [entry for entry in self._all_weights() if not self._adapts or entry.key.startswith(PREFIX)]

    def _all_weights(self) -> list[Entry]:
        engine = self._engine
        return model_entries(engine.chunks, engine.family, engine.groups.dp)

    def _entries(self) -> list[Entry]:
        engine = self._engine
        state = optimizer_entries(engine.optimizer.segments(), engine.family, engine.groups.dp, sharded=engine.grad_sync.shard)
        return self._weights() + state


def _make_checkpointer(config: RunConfig, engine: NativeEngine, report: Callable[[str], None]) -> Checkpointer | None:
    options = config.checkpoint
    if options.save is None:
        return None
    form: Literal["hf", "sharded", "adapter"] = "hf" if options.checkpoint_format == "hf" else "sharded"
    return Checkpointer(
        options.save,
        engine.groups,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        keep_best=options.keep_best,
        async_save=options.async_save,
        form=form if config.lora.lora_rank is None else "adapter",
        report=report,
    )
