"""Writing indexed datasets (format: see indexed.py) as a stream: memory does not grow with the number of documents.

Ids, sequence lengths and document indices are appended to three files in a work folder; the index is assembled from
them in pieces at the end. The state after a `flush` is three file sizes (`Marks`), so a writer can be reopened at any
flushed point after a crash and go on from there.
"""

import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_llm.data.indexed import DTYPE_CODES, MAGIC, VERSION, bin_path, idx_path, token_dtype
from megatron_llm.data.sidecar import sidecar_path
from megatron_llm.utils.atomic import fsync_dir, make_folder, write_error
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.writeback import WriteBehind

_CODES = {name: code for code, name in DTYPE_CODES.items()}
_PIECE = 1 << 16


@dataclass(frozen=True)
class Marks:
    """How much a writer has written: ids, sequences, documents."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Appends documents to `<prefix>.bin` and two side files; `finish` turns those into `<prefix>.idx`.

    `vocab_size` decides the dtype and is the bound ids are checked against. With `resume_at`, files of an earlier writer
    are cut back to those marks and appended to; otherwise they are started anew. Failures of the disk are UserErrors.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, resume_at: Marks | None = None) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.marks = resume_at or Marks()
        make_folder(Path(self.prefix).parent)
        self._lengths_path = Path(f"{self.prefix}.lengths")
        self._documents_path = Path(f"{self.prefix}.documents")
        self._tokens = self._open(bin_path(self.prefix), self.marks.tokens * self.dtype.itemsize)
        self._lengths = self._open(self._lengths_path, self.marks.sequences * 4)
        self._documents = self._open(self._documents_path, self.marks.documents * 8)
        self._behind = WriteBehind(self._tokens, self.marks.tokens * self.dtype.itemsize)

    def _open(self, path: Path, size: int) -> IO[bytes]:
        try:
            stream = open(path, "r+b" if size else "wb")  # noqa: SIM115 - close() closes it
            stream.seek(0, os.SEEK_END)
            if stream.tell() < size:
                raise UserError(f"{path} has {stream.tell()} bytes, fewer than the {size} noted: delete its folder and start again")
            stream.truncate(size)
            stream.seek(size)
        except OSError as error:
            raise write_error(path, error) from error
        return stream

    def add_document(self, ids: ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append one document of `ids`; `lengths` cuts it into sequences (default: one)."""
        array = np.asarray(ids)
        self.add(array, np.asarray([array.size] if lengths is None else lengths), np.asarray([1 if lengths is None else len(lengths)]))

    def add(self, ids: NDArray[Any], lengths: NDArray[Any], sequences: NDArray[Any]) -> None:
        """Append many documents at once.

        `ids` are those of all documents end to end, `lengths` the number of ids of each sequence, `sequences` the number
        of sequences of each document. An id outside the vocabulary is a UserError.
        """
        if int(lengths.sum()) != ids.size or int(sequences.sum()) != lengths.size:
            raise ValueError(
                f"{ids.size} ids, sequences of {lengths.sum()} in all; {lengths.size} sequences, documents of {sequences.sum()} in all"
            )
        least = 0 if ids.size == 0 or ids.dtype.kind == "u" else int(ids.min())
        if least < 0 or (ids.size and int(ids.max()) >= self.vocab_size):
            bad = least if least < 0 else int(ids.max())
            raise UserError(f"id {bad} is outside the vocabulary of {self.vocab_size} ids that {self.prefix} is written for")
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise UserError(f"a sequence of {int(lengths.max())} ids is longer than the format allows (2^31 - 1): split the document")
        ends = self.marks.sequences + np.cumsum(sequences, dtype=np.int64)
        try:
            # Arrays are written from where they lie: large ones pass the stream's buffer by.
            self._tokens.write(np.ascontiguousarray(ids, self.dtype).data)
            self._lengths.write(np.ascontiguousarray(lengths, np.int32).data)
            self._documents.write(ends.data)
        except OSError as error:
            raise write_error(self.prefix, error) from error
        self.marks = Marks(self.marks.tokens + ids.size, self.marks.sequences + lengths.size, self.marks.documents + sequences.size)
        self._behind.added(self.marks.tokens * self.dtype.itemsize)

    def flush(self) -> Marks:
        """Force everything added so far to the disk; returns the marks to resume at."""
        try:
            for stream in (self._tokens, self._lengths, self._documents):
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise write_error(self.prefix, error) from error
        return self.marks

    def close(self) -> None:
        """Close the files, which stay as they are, to be resumed."""
        for stream in (self._tokens, self._lengths, self._documents):
            stream.close()

    def finish(self) -> None:
        """Write `<prefix>.idx` and force it to the disk. The writer is closed; its side files are the caller's to remove."""
        try:
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
            self.close()  # the side files need not outlast a crash any more
            with open(idx_path(self.prefix), "wb") as stream:
                self._write_index(stream)
                stream.flush()
                os.fsync(stream.fileno())
            fsync_dir(Path(self.prefix).parent)
        except OSError as error:
            raise write_error(idx_path(self.prefix), error) from error

    def _write_index(self, stream: IO[bytes]) -> None:
        header = struct.pack("<QBQQ", VERSION, _CODES[self.dtype.name], self.marks.sequences, self.marks.documents + 1)
        stream.write(MAGIC + header)
        with open(self._lengths_path, "rb") as lengths:
            while piece := lengths.read(4 * _PIECE):
                stream.write(piece)
            lengths.seek(0)
            offset = 0
            while piece := lengths.read(4 * _PIECE):
                ends = np.cumsum(np.frombuffer(piece, np.int32), dtype=np.int64) * self.dtype.itemsize + offset
                stream.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
                offset = int(ends[-1])
        stream.write(np.zeros(1, np.int64).tobytes())
        with open(self._documents_path, "rb") as documents:
            while piece := documents.read(8 * _PIECE):
                stream.write(piece)


def publish(source: str | Path, prefix: str | Path) -> None:
    """Move the finished dataset `source` to `prefix` (same file system), replacing what is there.

    The index goes first on the way out and last on the way in, so that a crash in between leaves a dataset that cannot
    be opened rather than an index over other ids. Files already moved by an earlier, killed call are passed over.
    """
    make_folder(Path(prefix).parent)
    try:
        if bin_path(source).exists():
            idx_path(prefix).unlink(missing_ok=True)
            sidecar_path(prefix).unlink(missing_ok=True)
        for suffix in (".bin", ".meta.json", ".idx"):
            if os.path.exists(f"{source}{suffix}"):
                os.replace(f"{source}{suffix}", f"{prefix}{suffix}")
        fsync_dir(Path(prefix).parent)
    except OSError as error:
        raise write_error(prefix, error) from error


def write_indexed_dataset(prefix: str | Path, documents: Iterable[ArrayLike], vocab_size: int) -> Marks:
    """Write documents of ids (each one sequence) to `<prefix>.bin/.idx` in one go; returns the counts."""
    parent = make_folder(Path(prefix).parent)
    with tempfile.TemporaryDirectory(prefix=f".{Path(prefix).name}.", dir=parent) as folder:
        writer = IndexedWriter(Path(folder) / "data", vocab_size)
        try:
            for document in documents:
                writer.add_document(document)
            writer.finish()
        finally:
            writer.close()
        publish(Path(folder) / "data", prefix)
    return writer.marks
