"""Indexed datasets: the bytes Megatron writes, reading them back, and what is said about files that are not whole."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_llm.data.indexed import HEADER_BYTES, IndexedDataset, token_dtype
from megatron_llm.data.indexed_writer import IndexedWriter, Marks, publish, write_indexed_dataset
from megatron_llm.data.sidecar import Sidecar, write_sidecar
from megatron_llm.utils.errors import UserError

Document = tuple[NDArray[np.int64], list[int]]


def _documents(vocab_size: int, count: int = 300, seed: int = 0) -> list[Document]:
    """Documents of one to four sequences, some of them empty of ids."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        lengths = random.integers(0, 40, random.integers(1, 5)).tolist()
        documents.append((random.integers(0, vocab_size, sum(lengths)), lengths))
    return documents


def _write(prefix: Path, documents: list[Document], vocab_size: int) -> None:
    writer = IndexedWriter(prefix, vocab_size)
    for ids, lengths in documents:
        writer.add_document(ids, lengths)
    writer.finish()


@pytest.mark.parametrize("vocab_size", [97, 65499, 65500, 151643])
@pytest.mark.filterwarnings("ignore")
def test_bytes_equal_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is a test-only dependency")
    import torch

    documents = _documents(vocab_size)
    _write(tmp_path / "ours", documents, vocab_size)
    dtype = megatron.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == np.dtype(dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids, lengths in documents:
        builder.add_document(torch.from_numpy(ids), lengths)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert len(theirs) == len(ours)
    assert all(np.array_equal(theirs[i], ours[i]) for i in range(len(ours)))


def test_reading_back(tmp_path: Path) -> None:
    documents = _documents(97)
    _write(tmp_path / "a", documents, 97)
    dataset = IndexedDataset(tmp_path / "a")
    sequences = [part for ids, lengths in documents for part in np.split(ids, np.cumsum(lengths)[:-1])]
    assert len(dataset) == len(sequences) and dataset.document_count == len(documents)
    assert dataset.token_count == sum(len(ids) for ids, _ in documents)
    assert dataset.sequence_lengths.dtype == np.int32 and dataset.document_indices.dtype == np.int64
    for index, sequence in enumerate(sequences):
        assert np.array_equal(dataset.get(index), sequence)
    long = int(np.argmax(dataset.sequence_lengths))
    assert np.array_equal(dataset.get(long, 3, 5), sequences[long][3:8])
    assert np.array_equal(dataset.get(long, 3), sequences[long][3:])
    assert dataset.get(long).dtype == np.uint16
    assert dataset.sidecar is None
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes: loaders send datasets to their workers
    assert np.array_equal(copy[long], dataset[long])
    with pytest.raises(ValueError, match="which has"):
        dataset.get(long, 3, int(dataset.sequence_lengths[long]))
    assert IndexedDataset(f"{tmp_path / 'a'}.bin").prefix == str(tmp_path / "a")


def test_one_call_writes_a_dataset_and_leaves_nothing_else(tmp_path: Path) -> None:
    marks = write_indexed_dataset(tmp_path / "new" / "a", [[1, 2, 3], np.array([4]), []], vocab_size=5)
    assert marks == Marks(tokens=4, sequences=3, documents=3)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.bin", "a.idx"]
    assert [sequence.tolist() for sequence in map(IndexedDataset(tmp_path / "new" / "a").get, range(3))] == [[1, 2, 3], [4], []]


def test_a_dataset_without_documents_can_be_opened(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "a", [], vocab_size=5)
    dataset = IndexedDataset(tmp_path / "a")
    assert len(dataset) == dataset.token_count == dataset.document_count == 0


@pytest.mark.parametrize("bad", [-1, 97, 70000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(UserError, match=rf"id {bad} is outside the vocabulary of 97 ids"):
        write_indexed_dataset(tmp_path / "a", [[0, 96], [1, bad]], vocab_size=97)
    assert list(tmp_path.iterdir()) == []


def test_resuming_at_marks_gives_the_same_bytes(tmp_path: Path) -> None:
    documents = _documents(70000)
    _write(tmp_path / "straight", documents, 70000)
    writer = IndexedWriter(tmp_path / "resumed", 70000)
    for ids, lengths in documents[:100]:
        writer.add_document(ids, lengths)
    marks = writer.flush()
    for ids, lengths in documents[200:250]:  # written behind the marks, lost in the crash
        writer.add_document(ids, lengths)
    writer.close()
    writer = IndexedWriter(tmp_path / "resumed", 70000, resume_at=marks)
    for ids, lengths in documents[100:]:
        writer.add_document(ids, lengths)
    writer.finish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"straight.{suffix}").read_bytes() == (tmp_path / f"resumed.{suffix}").read_bytes()


def test_resuming_files_that_are_too_short_is_refused(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", 97)
    writer.add_document([1, 2, 3])
    writer.close()
    with pytest.raises(UserError, match=r"a\.bin has 6 bytes, fewer than the 20 noted"):
        IndexedWriter(tmp_path / "a", 97, resume_at=Marks(tokens=10, sequences=1, documents=1))


def test_publishing_replaces_all_files_and_can_be_repeated(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "old", [[1]], vocab_size=97)
    (tmp_path / "old.meta.json").write_text("{}")
    write_indexed_dataset(tmp_path / "new", [[2, 3]], vocab_size=97)
    (tmp_path / "new.bin").replace(tmp_path / "old.bin")  # a first call that was killed here
    (tmp_path / "old.idx").unlink()
    (tmp_path / "old.meta.json").unlink()
    publish(tmp_path / "new", tmp_path / "old")
    assert IndexedDataset(tmp_path / "old").get(0).tolist() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.bin", "old.idx"]


def _change(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def _cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-bin": (lambda p: Path(f"{p}.bin").unlink(), r"a\.bin does not exist: .* needs both \.bin and \.idx"),
    "no-idx": (lambda p: Path(f"{p}.idx").unlink(), r"a\.idx does not exist"),
    "short-bin": (lambda p: _cut(Path(f"{p}.bin"), 1), r"a\.bin has 7 bytes, but the index beside it describes 8 bytes in 3 sequences"),
    "short-idx": (
        lambda p: _cut(Path(f"{p}.idx"), 5),
        r"a\.idx has 97 bytes, but its header announces 3 sequences and 4 document indices.* 102",
    ),
    "short-header": (lambda p: Path(f"{p}.idx").write_bytes(b"MMIDIDX"), r"a\.idx has 7 bytes, fewer than the 34 of a header"),
    "magic": (lambda p: _change(Path(f"{p}.idx"), 0, b"XX"), r"is not an index of this format: .* found b'XXIDIDX"),
    "version": (lambda p: _change(Path(f"{p}.idx"), 9, struct.pack("<Q", 2)), r"expected .* version 1, .* found .*, 2, 8"),
    "dtype": (lambda p: _change(Path(f"{p}.idx"), 17, b"\x63"), r"dtype code 1 to 8; found .*, 1, 99"),
    "documents": (lambda p: _change(Path(f"{p}.idx"), 94, struct.pack("<q", 7)), r"should go from 0 to 3, found 0 to 7"),
    "no-read": (lambda p: Path(f"{p}.meta.json").write_text("{"), r"a\.meta\.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_datasets_are_one_sentence_with_numbers(tmp_path: Path, damage: str) -> None:
    write_indexed_dataset(tmp_path / "a", [[1, 2], [3], [4]], vocab_size=97)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "a")


def test_a_garbled_pointer_is_noticed_when_read(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "a", [[1, 2], [3], [4]], vocab_size=97)
    _change(tmp_path / "a.idx", HEADER_BYTES + 12, struct.pack("<q", 1 << 40))
    with pytest.raises(UserError, match="sequence 0 would lie at id"):
        IndexedDataset(tmp_path / "a").get(0)


def test_a_forgotten_ending_is_suggested(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "a_text_document", [[1]], vocab_size=97)
    with pytest.raises(UserError, match="did you mean '.*a_text_document'"):
        IndexedDataset(tmp_path / "a")


def test_a_sidecar_of_another_run_is_refused(tmp_path: Path) -> None:
    write_indexed_dataset(tmp_path / "a", [[1, 2], [3]], vocab_size=97)
    good = Sidecar("uint16", 97, "ByteTokenizer", "sha256:0", 96, False, documents=2, sequences=2, tokens=3)
    write_sidecar(tmp_path / "a", good)
    sidecar = IndexedDataset(tmp_path / "a").sidecar
    assert sidecar is not None and sidecar["vocab_size"] == 97
    write_indexed_dataset(tmp_path / "b", [[1, 2], [3], [4]], vocab_size=97)
    write_sidecar(tmp_path / "b", good)
    with pytest.raises(UserError, match=r"b\.meta\.json says sequences 2, but \.bin/\.idx have 3"):
        IndexedDataset(tmp_path / "b")
