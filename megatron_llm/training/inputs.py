"""The data of a run: whose tokenizer it is, the datasets, this rank's batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.contract import Contract, rope_settings
from megatron_llm.checkpoint.find import is_checkpoint
from megatron_llm.checkpoint.hf_folder import is_hf_folder, tokenizer_folder
from megatron_llm.config.schema import DataConfig, RunConfig
from megatron_llm.data.batch import Batch, Dataset
from megatron_llm.data.blend import parse_data_path
from megatron_llm.data.build import build_datasets, sample_counts, sample_order
from megatron_llm.data.chat_template import begin_id, chat_template_hash, tokenizer_settings_folder
from megatron_llm.data.loader import BatchLoader, evaluation_batches
from megatron_llm.data.sidecar import read_sidecar
from megatron_llm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class Identity:
    """What the ids of a run mean: the true vocabulary, the tokenizer (when it was given) and its fingerprint.

    `stamped` is the sidecar of the data, {} without one.
    """

    vocab_size: int
    tokenizer: Tokenizer | None
    fingerprint: str | None
    stamped: dict[str, Any] = field(default_factory=dict)

    def contract(self, config: RunConfig, dtype: str) -> Contract:
        """What the run's data, tokenizer and model are, to compare with the weights it loads; `dtype` is its parameters'."""
        tokenizer, stamped = self.tokenizer, self.stamped
        folder = tokenizer_settings_folder(tokenizer) if tokenizer is not None else None
        kind = tokenizer.kind if tokenizer is not None else stamped.get("tokenizer_type", "")
        end = tokenizer.eod_id if tokenizer is not None else stamped.get("eod_id")
        ends = [end] if end is not None else []
        return Contract(
            dtype=dtype,
            vocab_size=self.vocab_size,
            tokenizers={kind: self.fingerprint} if self.fingerprint is not None else {},
            eod=ends,
            bos=begin_id(tokenizer) if tokenizer is not None and folder is not None else stamped.get("bos_id"),
            eos=ends,
            chat_template=chat_template_hash(folder) if folder is not None else stamped.get("chat_template"),
            rope=rope_settings(config.model),
        )


def identify(config: RunConfig) -> Identity:
    """Vocabulary and tokenizer, from `--vocab-size`, `--tokenizer-model`, the datasets' sidecars and the folder loaded from.

    UserError when nothing tells the vocabulary, or when the tokenizer has more entries than the model is to have.
    """
    data = config.data
    sidecars = [] if data.mock_data else [read_sidecar(prefix) for prefix in parse_data_path(data.data_path).prefixes]
    stamped = next((sidecar for sidecar in sidecars if sidecar is not None), None)
    tokenizer = _tokenizer(data, stamped) or _loaded_tokenizer(config, stamped)
    known = tokenizer.vocab_size if tokenizer is not None else (stamped["vocab_size"] if stamped is not None else None)
    vocab_size = config.model.vocab_size if config.model.vocab_size is not None else known
    if vocab_size is None:
        raise UserError(
            "the vocabulary size is unknown: the dataset has no .meta.json sidecar, so give --tokenizer-type and --tokenizer-model, "
            "or --vocab-size"
        )
    if known is not None and known > vocab_size and "vocab" not in config.checkpoint.allow_mismatch:
        raise UserError(
            f"the model's vocabulary (--vocab-size) is {vocab_size} and the tokenizer has {known} entries: give at least {known}, leave it "
            f"out, or go on knowingly with --allow-mismatch vocab when the data has no id from {vocab_size} on"
        )
    fingerprint = tokenizer.fingerprint if tokenizer is not None else (stamped["tokenizer_fingerprint"] if stamped is not None else None)
    return Identity(vocab_size, tokenizer, fingerprint, stamped or {})


def _tokenizer(data: DataConfig, stamped: dict[str, Any] | None) -> Tokenizer | None:
    """The tokenizer of the flags, else the one the dataset was made with, if it is still where it was and the same."""
    if data.tokenizer_model is not None or data.tokenizer_type in ("ByteTokenizer", "GPT2BPETokenizer"):
        kind = data.tokenizer_type
        if kind is None:
            kind = "SentencePieceTokenizer" if str(data.tokenizer_model).endswith(".model") else "HuggingFaceTokenizer"
        return build_tokenizer(kind, data.tokenizer_model, data.vocab_file, data.merge_file)
    if stamped is None:
        return None
    model = stamped["tokenizer_model"]
    if stamped["tokenizer_type"] != "ByteTokenizer" and (model is None or not Path(model).exists()):
        return None
    found = build_tokenizer(stamped["tokenizer_type"], model)
    return found if found.fingerprint == stamped["tokenizer_fingerprint"] else None


def _loaded_tokenizer(config: RunConfig, stamped: dict[str, Any] | None) -> Tokenizer | None:
    """The tokenizer in the folder that `--load` names, unless the data was made with another one."""
    path = Path(config.checkpoint.load) if config.checkpoint.load is not None else None
    if path is None or not path.is_dir() or not (is_checkpoint(path) or is_hf_folder(path)):
        return None
    folder = tokenizer_folder(path)
    if folder is None:
        return None
    kinds = {"tokenizer.json": "HuggingFaceTokenizer", "tokenizer.model": "SentencePieceTokenizer", "merges.txt": "GPT2BPETokenizer"}
    found = [build_tokenizer(kind, folder) for name, kind in kinds.items() if (folder / name).is_file()]
    same = [tokenizer for tokenizer in found if stamped is None or tokenizer.fingerprint == stamped["tokenizer_fingerprint"]]
    return same[0] if same else None


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The configuration with its model's vocabulary filled in."""
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


class Inputs:
    """Datasets of a resolved configuration and the batches of this rank's replica."""

    def __init__(self, config: RunConfig, identity: Identity, groups: ParallelGroups, say: Callable[[str], None]) -> None:
        train = config.train
        assert train.global_batch_size is not None, "the configuration must be resolved"
        self._global_batch_size = train.global_batch_size
        self._config, self._groups = config, groups
        counts = sample_counts(train.train_iters, train.global_batch_size, train.eval_iters if train.eval_interval else 0)
        tokenizer, allowed = identity.tokenizer, config.checkpoint.allow_mismatch
        splits = build_datasets(
            config.data,
            counts,
            seq_length=train.seq_length,
            seed=train.seed,
            vocab_size=identity.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer is not None and "tokenizer" not in allowed else None,
            eod_id=tokenizer.eod_id if tokenizer is not None and "eod" not in allowed else None,
            say=say,
            cache_timeout=config.parallel.distributed_timeout_seconds,
            larger_vocabulary="vocab" in allowed,
        )
        assert splits.train is not None, "training data that is missing is an error of build_datasets"
        if identity.stamped and tokenizer is not None:
            for name, key, ours in (("tokenizer", "tokenizer_fingerprint", tokenizer.fingerprint), ("eod", "eod_id", tokenizer.eod_id)):
                if name in allowed and identity.stamped[key] != ours:
                    say(f"note     the data has {key} {identity.stamped[key]}, this run {ours}: allowed by --allow-mismatch {name}")
        self.train: Dataset = splits.train
        self.validation: Dataset | None = splits.valid

    @property
    def order(self) -> str | None:
        """A name for the order of the training samples: equal names, equal sample i. None where there is only one order."""
        return sample_order(self.train)

    def train_batches(self, consumed_samples: int) -> BatchLoader:
        """This rank's micro-batches of the global batch that begins at sample `consumed_samples`, and of all after it."""
        return BatchLoader(
            self.train,
            micro_batch_size=self._config.train.micro_batch_size,
            global_batch_size=self._global_batch_size,
            dp_rank=self._groups.dp.rank,
            dp_size=self._groups.dp.size,
            consumed_samples=consumed_samples,
            num_workers=self._config.data.num_workers,
            pin_memory=self._groups.device.type == "cuda",
        )

    def validation_batches(self) -> Callable[[], Iterator[list[Batch]]] | None:
        """A function that gives the same validation batches at each call; None without a validation split."""
        dataset = self.validation
        if dataset is None:
            return None
        return lambda: evaluation_batches(
            dataset,
            micro_batch_size=self._config.train.micro_batch_size,
            global_batch_size=self._global_batch_size,
            dp_rank=self._groups.dp.rank,
            dp_size=self._groups.dp.size,
            batches=self._config.train.eval_iters,
        )


def save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> Path | None:
    """The tokenizer's files in `folder`, for checkpoints to copy; None without a tokenizer."""
    if tokenizer is None:
        return None
    tokenizer.save_pretrained(folder)
    return folder
