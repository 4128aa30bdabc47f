"""Every sample of our datasets equals megatron-core's, in the same order.

megatron-core is a test-only dependency (requirements/test-no-deps.txt); its data code runs without a GPU.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_llm.config.schema import DataConfig
from megatron_llm.data.batch import Dataset
from megatron_llm.data.build import SampleCounts, build_datasets
from megatron_llm.data.gpt_dataset import GPTDataset, SampleOptions
from megatron_llm.data.index_backend import load_backend
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.sample_index import build_sample_index, plan_epochs
from megatron_llm.testing.corpora import EOD_ID, VOCAB_SIZE, random_documents, write_corpus


@pytest.fixture(scope="module")
def core() -> SimpleNamespace:
    """The parts of megatron-core that are compared with. Without them nothing is proven, so their absence is a failure."""
    try:
        names = ("gpt_dataset", "blended_megatron_dataset_builder", "indexed_dataset", "helpers", "utils")
        parts = {name: importlib.import_module(f"megatron.core.datasets.{name}") for name in names}
    except ImportError as error:
        pytest.fail(f"megatron-core cannot be imported ({error}): pip install --no-deps -r requirements/test-no-deps.txt")
    return SimpleNamespace(**parts)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three corpora of different sizes."""
    folder = tmp_path_factory.mktemp("corpora")
    sizes = ((160, 40), (90, 25), (40, 120))
    return [
        write_corpus(folder / f"corpus{number}", random_documents(count, longest=longest, seed=number))
        for number, (count, longest) in enumerate(sizes)
    ]


class _Tokenizer:
    """What megatron-core's datasets ask of a tokenizer; it has no padding token, like the data."""

    vocab_size = VOCAB_SIZE
    eod = EOD_ID
    unique_identifiers = {"class": "test"}  # noqa: RUF012


def reference(core: SimpleNamespace, blend: Any, split: str, counts: Sequence[int | None], **config: Any) -> list[Any]:
    """megatron-core's train, validation and test datasets."""
    values = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False} | config
    builder = core.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder(
        core.gpt_dataset.GPTDataset,
        list(counts),
        lambda: True,
        core.gpt_dataset.GPTDatasetConfig(blend=blend, split=split, tokenizer=_Tokenizer(), **values),
    )
    datasets: list[Any] = builder.build()
    return datasets


def assert_equal(ours: Dataset | None, theirs: Any, *, masked: bool = False) -> None:
    """Equal length, and every field of every sample equal; `masked`: attention allowed between the same pairs."""
    assert ours is not None
    assert len(ours) == len(theirs)
    for number in range(len(theirs)):
        mine, other = ours[number], theirs[number]
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert getattr(mine, name).tolist() == other[name].tolist(), f"{name} of sample {number}"
        if masked:
            assert mine.document_ids is not None
            allowed = np.tril(mine.document_ids[:, None] == mine.document_ids[None, :])
            assert np.array_equal(allowed, ~other["attention_mask"][0].numpy()), f"attention of sample {number}"


def ours_for(data_path: list[str], counts: SampleCounts, cache: Path, *, seq_length: int, seed: int, split: str, **options: Any) -> Any:
    config = DataConfig(data_path=data_path, split=split, data_cache_path=str(cache), **options)
    return build_datasets(config, counts, seq_length=seq_length, seed=seed, say=lambda _: None)


@pytest.mark.parametrize(
    ("share", "epochs", "separate"),
    [(0.4, 1, False), (1.95, 2, False), (2.3, 3, True)],
    ids=["one-epoch", "two-epochs", "third-epoch-separate"],
)
@pytest.mark.parametrize("seq_length", [16, 37])
@pytest.mark.parametrize("seed", [1, 1234, 99999])
def test_one_corpus(
    core: SimpleNamespace, prefixes: list[str], tmp_path: Path, seed: int, seq_length: int, share: float, epochs: int, separate: bool
) -> None:
    tokens = int(IndexedDataset(prefixes[0]).sequence_lengths[:128].sum())  # the first 80 % of 160 documents
    counts = SampleCounts(int(share * tokens / seq_length), 40, 3)
    plan = plan_epochs(tokens, seq_length, counts.train)
    assert (plan.epochs, plan.separate_last_epoch) == (epochs, separate)
    theirs = reference(core, ([prefixes[0]], None), "80,15,5", counts, random_seed=seed, sequence_length=seq_length)
    ours = ours_for([prefixes[0]], counts, tmp_path, seq_length=seq_length, seed=seed, split="80,15,5")
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal(mine, other)


@pytest.mark.parametrize("weights", [[0.3, 0.7], [30.0, 70.0], [1.0, 1.0], [0.123, 4.56]])
def test_weighted_blend_of_two(core: SimpleNamespace, prefixes: list[str], tmp_path: Path, weights: list[float]) -> None:
    counts = SampleCounts(300, 30, 0)
    theirs = reference(core, (prefixes[:2], weights), "90,10,0", counts, random_seed=7, sequence_length=24)
    path = [f"{weights[0]}", prefixes[0], f"{weights[1]}", prefixes[1]]
    ours = ours_for(path, counts, tmp_path, seq_length=24, seed=7, split="90,10,0")
    assert_equal(ours.train, theirs[0])
    assert_equal(ours.valid, theirs[1])


def test_weighted_blend_of_three_and_of_one(core: SimpleNamespace, prefixes: list[str], tmp_path: Path) -> None:
    for chosen, weights in ((prefixes, [5.0, 2.0, 1.0]), (prefixes[:1], [0.5])):
        theirs = reference(core, (chosen, weights), "100,0,0", (211, 0, 0), random_seed=3, sequence_length=16)
        path = [part for weight, prefix in zip(weights, chosen, strict=True) for part in (str(weight), prefix)]
        ours = ours_for(path, SampleCounts(211), tmp_path, seq_length=16, seed=3, split="100,0,0")
        assert_equal(ours.train, theirs[0])


@pytest.mark.parametrize("count", [60, None], ids=["part", "exhaustive"])
def test_blend_by_size(core: SimpleNamespace, prefixes: list[str], tmp_path: Path, count: int | None) -> None:
    theirs = reference(core, (prefixes, None), "90,10", (count, 0, None), random_seed=5, sequence_length=16)
    ours = ours_for(prefixes, SampleCounts(count), tmp_path, seq_length=16, seed=5, split="90,10")
    assert_equal(ours.train, theirs[0])


@pytest.mark.parametrize("samples", [None, 250], ids=["one-epoch", "two-epochs"])
def test_document_ends(core: SimpleNamespace, prefixes: list[str], tmp_path: Path, samples: int | None) -> None:
    options = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    theirs = reference(core, ([prefixes[0]], None), "100,0,0", (samples, 0, 0), random_seed=1, sequence_length=32, **options)
    ours = ours_for([prefixes[0]], SampleCounts(samples), tmp_path, seq_length=32, seed=1, split="100,0,0", **options)
    assert_equal(ours.train, theirs[0], masked=True)


@pytest.mark.parametrize("extra", [True, False], ids=["extra-token", "no-extra-token"])
@pytest.mark.parametrize("drop", [True, False], ids=["drop-partial", "keep-partial"])
def test_partial_last_sample(core: SimpleNamespace, prefixes: list[str], tmp_path: Path, drop: bool, extra: bool) -> None:
    # megatron-core's cache does not tell these two options apart, so each case has a cache of its own.
    settings = {"drop_last_partial_validation_sequence": drop, "add_extra_token_to_sequence": extra, "path_to_cache": str(tmp_path)}
    for seq_length in (13, 16, 29):
        theirs = reference(core, ([prefixes[1]], None), "0,100,0", (0, None, 0), random_seed=2, sequence_length=seq_length, **settings)[1]
        # Its cached loss mask keeps the zeros of the first sample that was read; what it would compute afresh is the measure.
        theirs.masks_and_position_ids_are_cacheable = False
        source = IndexedDataset(prefixes[1])
        plan = plan_epochs(source.token_count, seq_length, None, extra=int(extra), drop_last_partial=drop)
        index = dict(build_sample_index(source.sequence_lengths, range(len(source)), plan, seed=2, backend=load_backend()))
        assert_equal(GPTDataset(source, index, seq_length, SampleOptions(extra_token=extra)), theirs)


def test_index_of_a_large_corpus(core: SimpleNamespace) -> None:
    """The arrays themselves, for more documents than the numpy builder takes in one piece."""
    random = np.random.default_rng(0)
    lengths = random.integers(0, 300, 200_000).astype(np.int32)
    documents = random.permutation(200_000).astype(np.int32)
    tokens = int(lengths.sum())
    theirs = core.helpers.build_sample_idx(lengths, documents, 512, 1, tokens)
    ours = load_backend().sample_index(lengths, documents, 512, (tokens - 1) // 512, 1)
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
