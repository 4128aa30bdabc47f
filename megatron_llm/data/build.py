"""From flags to datasets: opens the corpora, checks them against the run, builds or finds their indices.

`build_datasets` is what training calls on every rank; `tools/build_index.py` calls it ahead of time. Both give the same
cache entries, because everything an entry depends on is in its description.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_llm.config.schema import DataConfig
from megatron_llm.data.batch import Dataset
from megatron_llm.data.blend import SPLITS, Blend, BlendedDataset, corpus_sizes, normalized, parse_data_path, split_documents
from megatron_llm.data.gpt_dataset import GPTDataset, SampleOptions
from megatron_llm.data.index_backend import IndexBackend, load_backend
from megatron_llm.data.index_cache import Arrays, IndexCache, MappedArrays, file_digest
from megatron_llm.data.indexed import IndexedDataset, idx_path
from megatron_llm.data.mock import MockDataset
from megatron_llm.data.sample_index import EpochPlan, build_sample_index, plan_epochs
from megatron_llm.data.sidecar import check_sidecar
from megatron_llm.utils.errors import UserError

INDEX_FORMAT = 1  # part of every description: raise it when the same description would give other arrays
NAMED_CORPORA = 6


class DatasetSplits(NamedTuple):
    """The three datasets; None where no samples were asked for or the split has no data."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


class SampleCounts(NamedTuple):
    """How many samples each split is to give: 0 does not build it, None takes what one epoch gives."""

    train: int | None
    valid: int | None = 0
    test: int | None = 0


def sample_counts(train_iters: int, global_batch_size: int, eval_iters: int) -> SampleCounts:
    """What a run consumes: each evaluation reads the same first `eval_iters` batches of the validation split."""
    return SampleCounts(train_iters * global_batch_size, eval_iters * global_batch_size, 0)


def build_datasets(
    config: DataConfig,
    counts: SampleCounts,
    *,
    seq_length: int,
    seed: int,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    eod_id: int | None = None,
    say: Callable[[str], None] = print,
    cache_timeout: float = 3600.0,
    larger_vocabulary: bool = False,
) -> DatasetSplits:
    """The train, validation and test datasets of a run; the same on every rank that passes the same arguments.

    `vocab_size` is the model's, `tokenizer_fingerprint` and `eod_id` the run's tokenizer's: what is given is checked
    against each corpus. `say` takes one line for whoever watches (pass a function that does nothing on other ranks).
    `larger_vocabulary` takes data of a tokenizer with more ids than the model, whose ids are then looked at one by one.
    UserError: missing or mismatching data, too little of it for training. Too little for validation or test is said,
    and that dataset is None.
    """
    if config.mock_data:
        if vocab_size is None:
            raise UserError("--mock-data has no tokenizer to take the vocabulary from: give --vocab-size")
        return DatasetSplits(
            *(
                MockDataset(vocab_size=vocab_size, seq_length=seq_length, samples=count, seed=seed, stream=stream) if count else None
                for stream, count in enumerate(counts)
            )
        )
    blend = parse_data_path(config.data_path)
    backend = load_backend()
    say(backend.describe())
    checks = {"tokenizer_fingerprint": tokenizer_fingerprint, "eod_id": eod_id}
    corpora = [_open_corpus(prefix, config, vocab_size, checks, larger_vocabulary) for prefix in blend.prefixes]
    _check_agreement(corpora)
    builder = _Builder(config, blend, corpora, seq_length, seed, backend, say, cache_timeout)
    return DatasetSplits(*(builder.split(number, count) for number, count in enumerate(counts)))


def sample_order(dataset: Dataset) -> str | None:
    """A name for the order of a dataset's samples: datasets of equal names give equal samples. None for mock data.

    It is made of the names of the index cache's entries, which depend on all that the order depends on.
    """
    if isinstance(dataset, GPTDataset) and isinstance(dataset.index, MappedArrays):
        return dataset.index.folder.name
    if isinstance(dataset, BlendedDataset) and isinstance(dataset.index, MappedArrays):
        return "+".join([dataset.index.folder.name, *(sample_order(part) or "" for part in dataset.datasets)])
    return None


@dataclass(frozen=True)
class _Corpus:
    prefix: str
    source: IndexedDataset
    documents: list[range]
    options: SampleOptions
    digest: dict[str, Any]
    cache_folder: Path

    def describe(self, split: int) -> str:
        return f"{self.prefix}, {SPLITS[split]} split ({len(self.documents[split])} of {len(self.source)} documents)"


def _open_corpus(prefix: str, config: DataConfig, vocab_size: int | None, checks: dict[str, Any], larger: bool) -> _Corpus:
    source = IndexedDataset(prefix)
    sidecar = source.sidecar
    check_sidecar(source.prefix, sidecar, **checks)
    beyond = sidecar is not None and vocab_size is not None and sidecar["vocab_size"] > vocab_size
    if sidecar is not None and beyond and not larger:
        raise UserError(
            f"{source.prefix} was made with a vocabulary of {sidecar['vocab_size']} ids, the model has {vocab_size}:"
            f" set --vocab-size {sidecar['vocab_size']} or preprocess with the model's tokenizer"
        )
    eod_id = checks["eod_id"] if sidecar is None else sidecar["eod_id"]
    wanted = {name: getattr(config, name) for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")}
    if any(wanted.values()):
        flags = ", ".join("--" + name.replace("_", "-") for name, value in wanted.items() if value)
        if eod_id is None:
            raise UserError(f"{flags}: the end-of-document id of {source.prefix} is unknown; preprocess with a tokenizer that has one")
        if sidecar is not None and not sidecar["append_eod"]:
            raise UserError(f"{flags}: {source.prefix} has no end-of-document tokens; preprocess it with --append-eod")
    return _Corpus(
        prefix=source.prefix,
        source=source,
        documents=split_documents(config.split, len(source)),
        # Where the sidecar vouches for the ids, they need not be looked at one by one.
        options=SampleOptions(eod_id=eod_id, vocab_size=vocab_size if sidecar is None or beyond else None, **wanted),
        digest=file_digest(idx_path(source.prefix)),
        cache_folder=Path(config.data_cache_path) if config.data_cache_path else Path(source.prefix).parent / "cache",
    )


def _check_agreement(corpora: Sequence[_Corpus]) -> None:
    stamped = [corpus for corpus in corpora if corpus.source.sidecar is not None]
    for corpus in stamped[1:]:
        first = stamped[0].source.sidecar or {}
        names = ("vocab_size", "tokenizer_fingerprint", "eod_id")
        check_sidecar(corpus.prefix, corpus.source.sidecar, **{name: first[name] for name in names})


@dataclass(frozen=True)
class _Builder:
    """Builds one split after the other from opened corpora."""

    config: DataConfig
    blend: Blend
    corpora: list[_Corpus]
    seq_length: int
    seed: int
    backend: IndexBackend
    say: Callable[[str], None]
    cache_timeout: float

    def split(self, split: int, count: int | None) -> Dataset | None:
        """The dataset of one split, or None when it is not asked for or has no data (which is said)."""
        if count == 0:
            return None
        usable = [number for number in range(len(self.corpora)) if self._usable(split, number)]
        if not usable:
            return None
        if self.blend.weights is None and len(self.corpora) == 1:
            return self._corpus_samples(split, 0, count)
        if self.blend.weights is not None:
            if count is None:
                raise ValueError("a blend with weights needs a number of samples")
            return self._weighted(split, usable, normalized([self.blend.weights[number] for number in usable]), count)
        return self._by_size(split, usable, count)

    def _usable(self, split: int, number: int) -> bool:
        """Whether the corpus has a sequence for this split; training cannot do without, the other splits can."""
        corpus = self.corpora[number]
        try:
            self._plan(split, corpus, None)
        except UserError as error:
            if split == 0:
                raise
            self.say(f"no {SPLITS[split]} data: {error}")
            return False
        return True

    def _plan(self, split: int, corpus: _Corpus, count: int | None) -> EpochPlan:
        documents = corpus.documents[split]
        if not documents:
            raise UserError(
                f"{corpus.describe(split)}: --split {self.config.split} leaves it empty: add documents or give it a larger share"
            )
        tokens = int(corpus.source.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
        try:
            return plan_epochs(tokens, self.seq_length, count, extra=int(corpus.options.extra_token))
        except UserError as error:
            raise UserError(f"{corpus.describe(split)}: {error}") from None

    def _corpus_samples(self, split: int, number: int, count: int | None) -> GPTDataset:
        corpus = self.corpora[number]
        documents = corpus.documents[split]
        plan = self._plan(split, corpus, count)
        described = {
            "format": INDEX_FORMAT,
            "idx": corpus.digest,
            "documents": [documents.start, documents.stop],
            "seed": self.seed,
            **vars(plan),
        }
        index = self._cached(
            corpus,
            f"{Path(corpus.prefix).name}-{SPLITS[split]}",
            described,
            lambda: build_sample_index(corpus.source.sequence_lengths, documents, plan, seed=self.seed, backend=self.backend),
        )
        if len(self.corpora) <= NAMED_CORPORA:
            self.say(f"{corpus.describe(split)}: {plan.tokens_per_epoch} tokens, {plan.epochs} epoch(s), {plan.samples} samples")
        return GPTDataset(corpus.source, index, self.seq_length, corpus.options, self.backend)

    def _weighted(self, split: int, usable: list[int], weights: list[float], count: int) -> BlendedDataset:
        targets, built_for = corpus_sizes(weights, count)
        datasets = [self._corpus_samples(split, number, size) for number, size in zip(usable, built_for, strict=True)]
        return self._blended(split, datasets, normalized(weights), sum(targets))

    def _by_size(self, split: int, usable: list[int], count: int | None) -> BlendedDataset:
        datasets = [self._corpus_samples(split, number, None) for number in usable]
        sizes = [len(dataset) for dataset in datasets]
        if count is None:
            described = {"format": INDEX_FORMAT, "sizes": sizes}
            array = np.asarray(sizes, np.int64)
            return BlendedDataset(datasets, self._blend_index(split, described, lambda: self.backend.exhaustive_blend_index(array)))
        if split == 0 and count > sum(sizes):
            raise UserError(
                f"corpora without weights are used once: that gives {sum(sizes)} samples, {count} are needed;"
                " give weights (--data-path 0.3 PREFIX 0.7 PREFIX), train less, or add data"
            )
        return self._blended(split, datasets, normalized(sizes), min(count, sum(sizes)))

    def _blended(self, split: int, datasets: list[GPTDataset], weights: list[float], size: int) -> BlendedDataset:
        described = {"format": INDEX_FORMAT, "weights": [weight.hex() for weight in weights], "size": size}
        array = np.asarray(weights, np.float64)
        return BlendedDataset(datasets, self._blend_index(split, described, lambda: self.backend.blend_index(array, size)))

    def _blend_index(self, split: int, described: dict[str, Any], build: Callable[[], tuple[Any, Any]]) -> MappedArrays:
        return self._cached(
            self.corpora[0],
            f"blend-{SPLITS[split]}",
            described,
            lambda: zip(("dataset_index", "sample_index"), build(), strict=True),
        )

    def _cached(self, corpus: _Corpus, label: str, described: dict[str, Any], build: Callable[[], Arrays]) -> MappedArrays:
        return IndexCache(corpus.cache_folder, self.cache_timeout, self.say).get(label, described, build)
