"""Reading indexed datasets: `<prefix>.bin` holds all ids end to end, `<prefix>.idx` says where each sequence lies.

The format is Megatron's `MMIDIDX` version 1, so files made by Megatron tools are read and the other way round. All
integers are little-endian:

    9 bytes   b"MMIDIDX\\0\\0"
    8 bytes   version, 1
    1 byte    dtype code of the ids in .bin (see DTYPE_CODES)
    8 bytes   number of sequences, S
    8 bytes   number of document indices, D (documents + 1)
    4 S bytes sequence lengths in ids, int32
    8 S bytes byte offsets of the sequences in .bin, int64
    8 D bytes document indices, int64: document d is the sequences [indices[d], indices[d + 1])

Both files are memory-mapped: opening is instant and processes on one machine share the pages.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.sidecar import read_sidecar
from megatron_llm.utils.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_CODES: dict[int, str] = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype ids of a vocabulary are stored in: uint16 below 65,500 ids, int32 otherwise (Megatron's rule)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """A memory-mapped indexed dataset. `prefix` is the path without `.bin` or `.idx` (either ending is accepted and dropped).

    Attributes: `sequence_lengths` int32 [S], `sequence_pointers` int64 [S] (bytes), `document_indices` int64 [D],
    `tokens` [T] (the ids of all sequences, end to end), `dtype` of the ids, `sidecar` (the values of `<prefix>.meta.json`,
    or None). All arrays are read-only views of the files. Missing, truncated or garbled files are a UserError with the
    numbers. Instances can be pickled (they reopen).
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = _without_suffix(str(prefix))
        self._open_index()
        self._open_tokens()
        self.sidecar = read_sidecar(self.prefix)
        self._check_sidecar()

    def _open_index(self) -> None:
        path = idx_path(self.prefix)
        size = _size(path, self.prefix)
        if size < HEADER_BYTES:
            raise UserError(f"{path} has {size} bytes, fewer than the {HEADER_BYTES} of a header: it is truncated; make it again")
        with open(path, "rb") as stream:
            header = stream.read(HEADER_BYTES)
        version, code, sequences, documents = struct.unpack("<QBQQ", header[len(MAGIC) :])
        if not header.startswith(MAGIC) or version != VERSION or code not in DTYPE_CODES:
            raise UserError(
                f"{path} is not an index of this format: expected magic {MAGIC!r}, version {VERSION}, dtype code 1 to 8;"
                f" found {header[: len(MAGIC)]!r}, {version}, {code}"
            )
        expected = HEADER_BYTES + 12 * sequences + 8 * documents
        if size != expected:
            raise UserError(
                f"{path} has {size} bytes, but its header announces {sequences} sequences and {documents} document indices,"
                f" which take {expected}: it is truncated or garbled; make it again"
            )
        self.dtype = np.dtype(DTYPE_CODES[code])
        index = np.memmap(path, dtype=np.uint8, mode="r")
        pointers_at = HEADER_BYTES + 4 * sequences
        documents_at = pointers_at + 8 * sequences
        self.sequence_lengths: NDArray[np.int32] = np.frombuffer(index, np.int32, sequences, HEADER_BYTES)
        self.sequence_pointers: NDArray[np.int64] = np.frombuffer(index, np.int64, sequences, pointers_at)
        self.document_indices: NDArray[np.int64] = np.frombuffer(index, np.int64, documents, documents_at)
        if documents == 0 or self.document_indices[0] != 0 or self.document_indices[-1] != sequences:
            found = "none" if documents == 0 else f"{self.document_indices[0]} to {self.document_indices[-1]}"
            raise UserError(f"{path} is garbled: its document indices should go from 0 to {sequences}, found {found}; make it again")

    def _open_tokens(self) -> None:
        path = bin_path(self.prefix)
        size = _size(path, self.prefix)
        last = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize if len(self) else 0
        if size != last:
            raise UserError(
                f"{path} has {size} bytes, but the index beside it describes {last} bytes in {len(self)} sequences:"
                " one of the two is truncated or they are of different runs; make them again"
            )
        self.tokens: NDArray[Any] = np.asarray(np.memmap(path, self.dtype, "r")) if size else np.empty(0, self.dtype)

    def _check_sidecar(self) -> None:
        if self.sidecar is None:
            return
        for name, value in (("dtype", self.dtype.name), ("sequences", len(self)), ("tokens", self.token_count)):
            if self.sidecar[name] != value:
                raise UserError(
                    f"{self.prefix}.meta.json says {name} {self.sidecar[name]}, but .bin/.idx have {value}:"
                    " the files are of different runs; preprocess again"
                )

    @property
    def token_count(self) -> int:
        """Ids in all sequences."""
        return int(self.tokens.size)

    @property
    def document_count(self) -> int:
        """Documents in the dataset."""
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """The ids of sequence `index` from `offset` on, `length` of them (default: the rest); a view of the file in `dtype`."""
        whole = int(self.sequence_lengths[index])
        length = whole - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > whole:
            raise ValueError(f"ids [{offset}, {offset + length}) of sequence {index}, which has {whole}")
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        ids = self.tokens[start : start + length]
        if start < 0 or len(ids) != length:
            raise UserError(
                f"{idx_path(self.prefix)} is garbled: sequence {index} would lie at id {start}, of {self.token_count}; make it again"
            )
        return ids

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.get(index)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)


def _without_suffix(prefix: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            return prefix.removesuffix(suffix)
    return prefix


def _size(path: Path, prefix: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the dataset {prefix!r} needs both .bin and .idx{_hint(prefix)}") from None


def _hint(prefix: str) -> str:
    """Names of the datasets that share the start of the name: most often the `_text_document` ending was left out."""
    parent = Path(prefix).parent
    found = sorted(p.name[: -len(".idx")] for p in parent.glob(Path(prefix).name + "*.idx")) if parent.is_dir() else []
    others = [name for name in found if name != Path(prefix).name]
    return f"; did you mean {str(parent / others[0])!r}?" if others else ""
