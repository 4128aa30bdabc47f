"""Samples: their content, document ends, too little data, checks against the run."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.config.schema import DataConfig
from megatron_llm.data.batch import Dataset
from megatron_llm.data.build import DatasetSplits, SampleCounts, build_datasets, sample_counts
from megatron_llm.data.gpt_dataset import GPTDataset, SampleOptions
from megatron_llm.data.index_backend import VARIABLE, load_backend
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.sample_index import build_sample_index, plan_epochs
from megatron_llm.testing.corpora import EOD_ID, VOCAB_SIZE, random_documents, write_corpus
from megatron_llm.utils.errors import UserError

SHARED = Path(__file__).parents[3].parent / "shared"


def quiet(_: str) -> None:
    """Say nothing."""


def build(
    prefix: str, train: int | None = None, valid: int | None = 0, seq_length: int = 8, say: Any = quiet, **options: Any
) -> DatasetSplits:
    checks = {name: options.pop(name) for name in ("vocab_size", "tokenizer_fingerprint", "eod_id") if name in options}
    config = DataConfig(data_path=[prefix], **{"split": "100,0,0", **options})
    return build_datasets(config, SampleCounts(train, valid, 0), seq_length=seq_length, seed=1, say=say, **checks)


def samples_of(dataset: Dataset | None) -> list[list[int]]:
    """Tokens and last label of every sample, in order."""
    assert dataset is not None
    samples = [dataset[number] for number in range(len(dataset))]
    return [[*sample.tokens.tolist(), int(sample.labels[-1])] for sample in samples]


def test_an_epoch_holds_every_token_once_and_labels_are_the_next_tokens(tmp_path: Path) -> None:
    documents = random_documents(60, seed=4)
    dataset = build(write_corpus(tmp_path / "c", documents)).train
    assert isinstance(dataset, GPTDataset)
    order = dataset.index["document_index"].tolist()
    stream = [token for document in order for token in documents[document]]
    assert sorted(order) == list(range(60))
    expected = [stream[start : start + 9] for start in range(0, len(stream) - 8, 8)]
    assert sorted(samples_of(dataset)) == sorted(expected)
    assert samples_of(dataset) != expected, "samples are not shuffled"
    for number in range(len(dataset)):
        sample = dataset[number]
        assert sample.labels[:-1].tolist() == sample.tokens[1:].tolist()
        assert sample.loss_mask.tolist() == [1.0] * 8 and sample.position_ids.tolist() == list(range(8)) and sample.document_ids is None
        found = [token for document, offset, count in dataset.pieces(number) for token in documents[document][offset : offset + count]]
        assert found == dataset.text(number).tolist()


def test_document_ends_restart_positions_and_part_attention_as_asked(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[5, 6, EOD_ID, 7, EOD_ID, EOD_ID, 8, 9, 4]])
    plain = build(prefix).train
    assert plain is not None and plain[0].tokens.tolist() == [5, 6, EOD_ID, 7, EOD_ID, EOD_ID, 8, 9]
    positions, attention, loss = (
        build(prefix, **{name: True}).train for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    )
    assert positions is not None and attention is not None and loss is not None
    assert positions[0].position_ids.tolist() == [0, 1, 2, 0, 1, 0, 0, 1] and positions[0].document_ids is None
    assert attention[0].document_ids is not None and attention[0].document_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert attention[0].position_ids.tolist() == list(range(8))
    assert loss[0].loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 1, 1]


def test_a_sample_that_ends_at_a_document_end_has_no_position_after_it(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[5, 6, 7, 5, 6, 7, 5, EOD_ID, 9]])
    dataset = build(prefix, reset_position_ids=True, reset_attention_mask=True).train
    assert dataset is not None and dataset[0].position_ids.tolist() == list(range(8))
    assert dataset[0].document_ids is not None and dataset[0].document_ids.tolist() == [0] * 8


def test_samples_share_nothing_that_one_of_them_could_change(tmp_path: Path) -> None:
    dataset = build(write_corpus(tmp_path / "c", random_documents(30))).train
    assert dataset is not None
    with pytest.raises(ValueError, match="read-only"):
        dataset[0].loss_mask[0] = 0.0


def test_a_dataset_survives_pickling_without_its_arrays(tmp_path: Path) -> None:
    dataset = build(write_corpus(tmp_path / "c", random_documents(2000))).train
    assert dataset is not None
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 5000
    assert samples_of(pickle.loads(pickled)) == samples_of(dataset)  # noqa: S301


def test_a_number_outside_is_an_index_error(tmp_path: Path) -> None:
    dataset = build(write_corpus(tmp_path / "c", random_documents(30))).train
    assert dataset is not None
    for number in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[number]


def test_too_little_data_for_training_is_a_sentence_with_the_counts(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[3] * 9 + [EOD_ID], [4] * 8 + [EOD_ID]])
    with pytest.raises(UserError, match=r"train split \(2 of 2 documents\): 19 tokens, seq_length 1024 needs 1025: use --seq-length <= 18"):
        build(prefix, 10, seq_length=1024)
    with pytest.raises(UserError, match="--split 0,1,0 leaves it empty"):
        build(prefix, 10, split="0,1,0")
    assert len(samples_of(build(prefix, seq_length=18).train)) == 1


def test_the_two_line_sample_trains_and_its_missing_validation_is_said(tmp_path: Path) -> None:
    lines = ["The quick brown fox", "jumps over the lazy dog"]
    prefix = write_corpus(tmp_path / "c", [[ord(letter) % 96 + 1 for letter in line] + [EOD_ID] for line in lines])
    said: list[str] = []
    datasets = build(prefix, 200, 20, split="949,50,1", say=said.append)
    assert datasets.train is not None and datasets.valid is None
    assert len(datasets.train) >= 200
    assert len(samples_of(datasets.train)) == len(datasets.train)
    assert any("no valid data" in line and "leaves it empty" in line for line in said)


def test_the_shared_two_line_sample_trains_and_validates(tmp_path: Path) -> None:
    path = SHARED / "data" / "pretrain" / "easyllm_two_lines.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    prefix = write_corpus(tmp_path / "c", [[ord(letter) % 96 + 1 for letter in text] + [EOD_ID] for text in texts])
    datasets = build(prefix, 800, 16, split="949,50,1")
    assert len(samples_of(datasets.train)) >= 800
    assert len(samples_of(datasets.valid)) >= 16


def test_a_validation_split_below_one_sequence_is_said_and_none(tmp_path: Path) -> None:
    said: list[str] = []
    prefix = write_corpus(tmp_path / "c", [[3] * 100, [4, 5, 6]])
    datasets = build(prefix, 5, 5, split="1,1,0", say=said.append)
    assert datasets.train is not None and datasets.valid is None
    assert any("valid split (1 of 2 documents): 3 tokens, seq_length 8 needs 9" in line for line in said)


def test_a_vocabulary_larger_than_the_models_is_refused_with_both_values(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(30))
    with pytest.raises(UserError, match=r"vocabulary of 97 ids, the model has 64"):
        build(prefix, vocab_size=64)
    assert build(prefix, vocab_size=128).train is not None


def test_without_sidecar_each_id_is_looked_at(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3, 4, 96, 5, 6, 7, 8]], sidecar=False)
    dataset = build(prefix, vocab_size=96).train
    assert dataset is not None
    with pytest.raises(UserError, match=r"token id 96 \(in sample 0\), the model's vocabulary has 96"):
        dataset[0]
    assert samples_of(build(prefix, vocab_size=VOCAB_SIZE).train) == [[1, 2, 3, 4, 96, 5, 6, 7, 8]]


def test_another_tokenizer_is_refused_with_both_values(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(30), fingerprint="aaaa")
    with pytest.raises(UserError, match="tokenizer fingerprint aaaa in the dataset, bbbb in this run"):
        build(prefix, tokenizer_fingerprint="bbbb")
    assert build(prefix, tokenizer_fingerprint="aaaa").train is not None


def test_corpora_of_two_tokenizers_are_not_blended(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a", random_documents(30), fingerprint="aaaa")
    second = write_corpus(tmp_path / "b", random_documents(30), fingerprint="bbbb")
    config = DataConfig(data_path=["1", first, "2", second], split="100,0,0")
    with pytest.raises(UserError, match=r"fingerprint bbbb in the dataset, aaaa"):
        build_datasets(config, SampleCounts(10), seq_length=8, seed=1, say=quiet)


def test_resets_need_document_ends_in_the_data(tmp_path: Path) -> None:
    unmarked = write_corpus(tmp_path / "a", random_documents(30), append_eod=False)
    with pytest.raises(UserError, match=r"--reset-attention-mask: .* has no end-of-document tokens; preprocess it with --append-eod"):
        build(unmarked, reset_attention_mask=True)
    unknown = write_corpus(tmp_path / "b", random_documents(30), sidecar=False)
    with pytest.raises(UserError, match="end-of-document id of .* is unknown"):
        build(unknown, eod_mask_loss=True)
    assert build(unknown, eod_mask_loss=True, eod_id=EOD_ID).train is not None
    with pytest.raises(ValueError, match="need eod_id"):
        SampleOptions(reset_position_ids=True)


def test_numpy_fallback_gives_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(200))
    native = samples_of(build(prefix, 900, data_cache_path=str(tmp_path / "native")).train)
    monkeypatch.setenv(VARIABLE, "numpy")
    assert samples_of(build(prefix, 900, data_cache_path=str(tmp_path / "numpy")).train) == native


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("extra", [True, False])
def test_the_native_reader_gathers_what_numpy_gathers(tmp_path: Path, dtype: type[np.generic], extra: bool) -> None:
    backend = load_backend()
    if backend.name == "numpy":
        pytest.skip(backend.describe())
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCAB_SIZE, length) for length in random.integers(0, 23, 90)]
    source = IndexedDataset(write_corpus(tmp_path / "c", [document.tolist() for document in documents], sidecar=False))
    source.tokens, source.dtype = source.tokens.astype(dtype), np.dtype(dtype)
    source.sequence_pointers = source.sequence_pointers // 2 * source.dtype.itemsize
    plan = plan_epochs(source.token_count, 13, 190, extra=int(extra), drop_last_partial=False)
    index = dict(build_sample_index(source.sequence_lengths, range(len(source)), plan, seed=2, backend=backend))
    plain, native = (GPTDataset(source, index, 13, SampleOptions(extra_token=extra), reader) for reader in (None, backend))
    assert native._read is not None and plain._read is None
    for number in range(len(plain)):
        found = native._read(number)
        assert found is not None and found.dtype == np.int64 and found.tolist() == plain.text(number).tolist()
    assert native._read(-1) is None and native._read(len(plain)) is None


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("document_index", 1, 90),
        ("document_index", 1, -1),
        ("sample_index", (1, 0), 10**6),
        ("sample_index", (1, 1), -3),
        ("shuffle_index", 0, 10**6),
    ],
)
def test_the_native_reader_reads_nothing_outside_the_corpus(tmp_path: Path, name: str, place: Any, value: int) -> None:
    backend = load_backend()
    if backend.name == "numpy":
        pytest.skip(backend.describe())
    source = IndexedDataset(write_corpus(tmp_path / "c", random_documents(90)))
    plan = plan_epochs(source.token_count, 13, None)
    index = dict(build_sample_index(source.sequence_lengths, range(len(source)), plan, seed=2, backend=backend))
    index[name][place] = value
    read = GPTDataset(source, index, 13, None, backend)._read
    assert read is not None
    damaged = [number for number in range(plan.samples) if read(number) is None]
    assert 1 <= len(damaged) <= 5, "a document is cut into at most five samples"


def test_mock_data_is_the_same_everywhere_and_differs_between_splits() -> None:
    def mock(seed: int) -> DatasetSplits:
        config = DataConfig(mock_data=True)
        return build_datasets(config, SampleCounts(20, 20, 0), seq_length=8, seed=seed, vocab_size=VOCAB_SIZE, say=quiet)

    first, again, other = mock(1), mock(1), mock(2)
    assert samples_of(first.train) == samples_of(again.train)
    assert samples_of(first.train) != samples_of(first.valid) and samples_of(first.train) != samples_of(other.train)
    assert first.test is None and first.train is not None
    assert max(max(sample) for sample in samples_of(first.train)) < VOCAB_SIZE
    assert first.train[3].labels[:-1].tolist() == first.train[3].tokens[1:].tolist()
    with pytest.raises(UserError, match="--vocab-size"):
        build_datasets(DataConfig(mock_data=True), SampleCounts(20), seq_length=8, seed=1)


def test_sample_counts_are_what_a_run_consumes() -> None:
    assert sample_counts(100, 16, 5) == SampleCounts(1600, 80, 0)


def test_uint16_ids_above_32767_stay_positive(tmp_path: Path) -> None:
    from megatron_llm.data.indexed_writer import write_indexed_dataset

    write_indexed_dataset(tmp_path / "c", [[65000, 1, 2, 3, 4, 5, 6, 7, 40000]], 65499)
    dataset = build(str(tmp_path / "c")).train
    assert dataset is not None and dataset[0].tokens[0] == 65000 and dataset[0].tokens.dtype == np.int64
