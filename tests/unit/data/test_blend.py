"""`--data-path`, `--split`, and datasets drawn from several corpora."""

from pathlib import Path

import numpy as np
import pytest

from megatron_llm.config.schema import DataConfig
from megatron_llm.data.batch import Sample
from megatron_llm.data.blend import Blend, BlendedDataset, corpus_sizes, parse_data_path, parse_split, split_documents
from megatron_llm.data.build import SampleCounts, build_datasets
from megatron_llm.testing.corpora import random_documents, write_corpus
from megatron_llm.utils.errors import UserError


def quiet(_: str) -> None:
    """Say nothing."""


class Numbers:
    """A dataset whose samples hold one number each."""

    def __init__(self, start: int, count: int) -> None:
        self.start, self.count = start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        ids = np.array([self.start + index])
        return Sample(ids, ids, np.ones(1, np.float32), np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("values", "blend"),
    [
        (["a"], Blend(("a",), None)),
        (["a", "b"], Blend(("a", "b"), None)),
        (["a", "b", "c"], Blend(("a", "b", "c"), None)),
        (["2", "a"], Blend(("a",), (1.0,))),
        (["30", "a", "70", "b"], Blend(("a", "b"), (0.3, 0.7))),
        (["30 a 70 b"], Blend(("a", "b"), (0.3, 0.7))),
    ],
)
def test_data_path(values: list[str], blend: Blend) -> None:
    assert parse_data_path(values) == blend


def test_a_prefix_may_be_a_number_or_hold_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("7", "my data"):
        write_corpus(name, random_documents(3))
    assert parse_data_path(["7"]) == Blend(("7",), None)
    assert parse_data_path(["my data"]) == Blend(("my data",), None)
    assert parse_data_path(["0.5", "7", "0.5", "my data"]) == Blend(("7", "my data"), (0.5, 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "--data-path is empty"),
        (["0.3", "a", "b", "c"], "before every prefix, or before none"),
        (["0.3", "a", "0.7"], "before every prefix, or before none"),
        (["0", "a", "1", "b"], "weights must be above 0"),
        (["-1", "a", "2", "b"], "weights must be above 0"),
        (["nan", "a", "2", "b"], "weights must be above 0"),
    ],
)
def test_bad_data_path(values: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_data_path(values)


def test_split() -> None:
    assert parse_split("8,2") == [0.8, 0.2, 0.0]
    assert split_documents("949,50,1", 1000) == [range(0, 949), range(949, 999), range(999, 1000)]
    assert split_documents("100,0,0", 7) == [range(0, 7), range(7, 7), range(7, 7)]
    for documents in range(1, 200):
        ranges = split_documents("0.9, 0.07, 0.03", documents)
        assert [number for documents_of in ranges for number in documents_of] == list(range(documents))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,1,1", "0,0,0", "1,,1"])
def test_bad_split(split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        parse_split(split)


def test_corpora_are_built_for_more_than_their_share() -> None:
    assert corpus_sizes([0.3, 0.7], 1001) == ([301, 701], [303, 705])


def test_blended_samples_come_from_where_the_index_says() -> None:
    index = {"dataset_index": np.array([1, 0, 1], np.int16), "sample_index": np.array([0, 0, 1])}
    blended = BlendedDataset([Numbers(100, 1), Numbers(200, 2)], index)
    assert [int(blended[number].tokens[0]) for number in range(len(blended))] == [200, 100, 201]
    assert blended.place(2) == (1, 1)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            blended[number]
    with pytest.raises(UserError, match="wants 2 samples of corpus number 1, which was built for 1"):
        BlendedDataset([Numbers(100, 1), Numbers(200, 1)], index)


def build(path: list[str], counts: SampleCounts, split: str, said: list[str] | None = None) -> tuple[BlendedDataset | None, ...]:
    datasets = build_datasets(
        DataConfig(data_path=path, split=split), counts, seq_length=8, seed=1, say=quiet if said is None else said.append
    )
    for dataset in datasets:
        assert dataset is None or isinstance(dataset, BlendedDataset)
    return tuple(datasets)  # type: ignore[arg-type]


def test_shares_follow_the_weights(tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small", random_documents(60, seed=1))
    large = write_corpus(tmp_path / "large", random_documents(400, seed=2))
    train, valid, _ = build(["0.25", small, "0.75", large], SampleCounts(4000, 400), "90,10,0")
    assert train is not None and valid is not None and len(train) == 4000
    for dataset in (train, valid):
        taken = np.bincount(dataset.index["dataset_index"]) / len(dataset)
        assert np.allclose(taken, [0.25, 0.75], atol=0.003)


def test_a_corpus_without_validation_data_is_left_out_of_validation(tmp_path: Path) -> None:
    tiny = write_corpus(tmp_path / "tiny", [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    large = write_corpus(tmp_path / "large", random_documents(100))
    said: list[str] = []
    train, valid, _ = build(["0.5", tiny, "0.5", large], SampleCounts(50, 20), "90,10,0", said)
    assert train is not None and valid is not None and len(valid) == 20
    assert len(train.datasets) == 2 and len(valid.datasets) == 1
    assert [line for line in said if line.startswith("no valid data: ") and "tiny" in line]


def test_without_weights_each_corpus_is_used_once(tmp_path: Path) -> None:
    prefixes = [write_corpus(tmp_path / name, random_documents(count)) for name, count in (("a", 30), ("b", 60))]
    train, _, _ = build(prefixes, SampleCounts(None), "100,0,0")
    assert train is not None and len(train) == sum(len(dataset) for dataset in train.datasets)
    drawn = set(zip(train.index["dataset_index"].tolist(), train.index["sample_index"].tolist(), strict=True))
    assert len(drawn) == len(train)
    with pytest.raises(UserError, match=rf"that gives {len(train)} samples, {len(train) + 1} are needed; give weights"):
        build(prefixes, SampleCounts(len(train) + 1), "100,0,0")


def test_too_little_data_names_the_corpus(tmp_path: Path) -> None:
    tiny = write_corpus(tmp_path / "tiny", [[1, 2, 3]])
    large = write_corpus(tmp_path / "large", random_documents(100))
    with pytest.raises(UserError, match=r"tiny, train split \(1 of 1 documents\): 3 tokens, seq_length 8 needs 9"):
        build(["1", tiny, "1", large], SampleCounts(50), "100,0,0")


def test_one_line_a_split_says_what_is_used(tmp_path: Path) -> None:
    prefixes = [write_corpus(tmp_path / name, random_documents(30)) for name in ("a", "b")]
    said: list[str] = []
    build(["1", prefixes[0], "1", prefixes[1]], SampleCounts(50), "100,0,0", said)
    assert "index builder: " in said[0]
    assert len([line for line in said if "train split (30 of 30 documents)" in line and "epoch(s)" in line]) == 2
