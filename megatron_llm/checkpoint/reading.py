"""Reading rectangles out of safetensors files at the speed of the disk: only the pieces they lie in, by several threads.

A piece is read into memory of the thread, compared with its digest, and what is wanted of it is copied to its place.
Nothing is read twice and no more than a few pieces are in memory, whatever the layouts of the two sides.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.checkpoint.bin_file import open_tensors
from megatron_llm.checkpoint.entries import overlap, split_flat_range
from megatron_llm.checkpoint.manifest import DamagedCheckpoint
from megatron_llm.checkpoint.pieces import PIECE, PieceMemory, PieceReader, bytes_of, copy_values, in_threads, piece_count
from megatron_llm.checkpoint.tensor_file import FileSeal, dtype_from_code

_OPEN_FILES = 32


@dataclass(frozen=True)
class Wanted:
    """A rectangle, at `start` inside the tensor `name` of a file, and the view of the same shape, any strides, to fill with it.

    `dtype` and `shape` are those that the stored tensor must have.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: tuple[int, ...]
    target: Tensor


@dataclass(frozen=True)
class FileWants:
    """What is wanted of a file, `.bin` or safetensors. With a `seal` what is read is compared with it.

    `direct`: past the page cache, see `PieceReader`.
    """

    path: Path
    wanted: Sequence[Wanted]
    seal: FileSeal | None
    direct: bool


@dataclass(frozen=True)
class _Place:
    """A stored tensor: offset of its first byte, dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Source:
    """An open file: its pieces, each verified when it is read, and where its tensors lie."""

    def __init__(self, wants: FileWants, file: PieceReader) -> None:
        self._file, self._path = file, wants.path
        self._digests = wants.seal.digests if wants.seal is not None else []
        if wants.seal is not None and (file.size != wants.seal.size or len(self._digests) != piece_count(file.size)):
            raise self._damage(f"has {file.size} bytes, the manifest says {wants.seal.size}")
        self.header_size, self.places = self._header()

    def _damage(self, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(self._path.parent, f"{self._path.name} {what}")

    def read(self, start: int, end: int, memory: PieceMemory) -> tuple[int, Tensor]:
        """Bytes that include [start, end), which lie in one piece, and the offset of their first; verified when asked for."""
        if self._digests:
            number = start // PIECE
            start, end = number * PIECE, min((number + 1) * PIECE, self._file.size)
        data = self._file.read(start, end, memory)
        if len(data) != end - start:
            raise self._damage(f"ends after {start + len(data)} bytes")
        if self._digests and hashlib.sha256(bytes_of(data)).hexdigest() != self._digests[number]:
            raise self._damage("does not match its digest: the file was changed or damaged after it was written")
        return start, data

    @property
    def header_pieces(self) -> range:
        """The pieces that have to be verified because the header lies in them."""
        return range(piece_count(self.header_size) if self._digests else 0)

    def _header(self) -> tuple[int, dict[str, _Place]]:
        """Size of the header, and the tensors. It is verified with the other pieces; until then any content must do no harm."""
        memory = PieceMemory()
        size = 8 + int.from_bytes(bytes_of(self._file.read(0, 8, memory)), "little")
        if size > self._file.size:
            raise self._damage("is not a whole safetensors file")
        parts = [bytes(bytes_of(self._file.read(start, min(start + PIECE, size), memory))) for start in range(0, size, PIECE)]
        try:
            header = json.loads(b"".join(parts)[8:])
            return size, {
                name: _Place(size + int(value["data_offsets"][0]), _known_dtype(value["dtype"]), tuple(map(int, value["shape"])))
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damage(f"has no valid header: {error}") from error


@dataclass(frozen=True)
class _Part:
    """A rectangle of a stored tensor that is wanted."""

    place: _Place
    wanted: Wanted

    @property
    def aligned(self) -> bool:
        """Whether no element is cut in two where pieces meet."""
        return self.place.offset % self.place.dtype.itemsize == 0

    def span(self) -> tuple[int, int]:
        """The bytes of the file between its first and its last element, the latter included."""
        first = last = 0
        for size, start, count in zip(self.place.shape, self.wanted.start, self.wanted.target.shape, strict=True):
            first, last = first * size + start, last * size + start + count - 1
        item = self.place.dtype.itemsize
        return self.place.offset + first * item, self.place.offset + (last + 1) * item

    def take(self, start: int, data: Tensor) -> None:
        """Copy what lies in the bytes `data`, which begin at `start` in the file, to the target."""
        item, place, wanted = self.place.dtype.itemsize, self.place, self.wanted
        first = max(0, -(-(start - place.offset) // item))
        last = min(math.prod(place.shape), (start + len(data) - place.offset) // item)
        if first >= last:
            return
        begin = place.offset + first * item - start
        block = data[begin : begin + (last - first) * item]
        values = block.view(place.dtype)  # at a multiple of its size: memory and file differ by whole pages
        for piece in split_flat_range(place.shape, first, last):
            shared = overlap(piece.start, piece.shape, wanted.start, wanted.target.shape)
            if shared is not None:
                at, shape = shared
                source = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, piece.start, shape, strict=True))
                target = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, wanted.start, shape, strict=True))
                copy_values(wanted.target[target], piece.view(values)[source])


def read_files(files: Sequence[FileWants]) -> None:
    """Fill the targets. DamagedCheckpoint when a piece does not match its digest or a file is not what it should be."""
    memory = PieceMemory(pinned=any(wanted.target.is_cuda for file in files for wanted in file.wanted))
    for number in range(0, len(files), _OPEN_FILES):
        plain: list[FileWants] = []
        with ExitStack() as stack:
            jobs = []
            for wants in files[number : number + _OPEN_FILES]:
                if wants.path.suffix == ".bin":
                    plain.append(wants)
                    continue
                source = _Source(wants, stack.enter_context(PieceReader(wants.path, direct=wants.direct)))
                parts = [_part(source, wants.path, wanted) for wanted in wants.wanted]
                plain.append(replace(wants, wanted=[part.wanted for part in parts if not part.aligned]))
                jobs += _jobs(source, parts)
            for _ in in_threads(lambda job: _work(job, memory), jobs):
                pass
        for wants in plain:
            _read_plain(wants)


@torch.no_grad()
def _read_plain(wants: FileWants) -> None:
    """What cannot be read in pieces, after the pieces were verified: by slices of the memory-mapped file."""
    if not wants.wanted:
        return
    with open_tensors(wants.path) as file:
        for wanted in wants.wanted:
            place = tuple(slice(a, a + n) for a, n in zip(wanted.start, wanted.target.shape, strict=True))
            wanted.target.copy_(file.get_slice(wanted.name)[place])


def _part(source: _Source, path: Path, wanted: Wanted) -> _Part:
    place = source.places.get(wanted.name)
    if place is None or (place.dtype, place.shape) != (wanted.dtype, wanted.shape) or place.offset < source.header_size:
        raise DamagedCheckpoint(path.parent, f"{path.name} does not hold {wanted.name} as {wanted.dtype} {list(wanted.shape)}")
    return _Part(place, wanted)


@dataclass(frozen=True)
class _Job:
    """Bytes [start, end), all in one piece, and what is wanted of them."""

    source: _Source
    start: int
    end: int
    parts: list[_Part]


def _jobs(source: _Source, parts: Sequence[_Part]) -> list[_Job]:
    """One job for each piece that is to be read, in the order of the file."""
    found: dict[int, list[tuple[int, int, _Part]]] = {number: [] for number in source.header_pieces}
    for part in parts:
        first, last = part.span()
        for number in range(first // PIECE, -(-last // PIECE)):
            found.setdefault(number, []).append((max(first, number * PIECE), min(last, (number + 1) * PIECE), part))
    return [
        _Job(
            source,
            min((first for first, _, _ in spans), default=number * PIECE),
            max((last for _, last, _ in spans), default=number * PIECE),
            [part for _, _, part in spans],
        )
        for number, spans in sorted(found.items())
    ]


@torch.no_grad()
def _work(job: _Job, memory: PieceMemory) -> None:
    start, data = job.source.read(job.start, job.end, memory)
    for part in filter(lambda part: part.aligned, job.parts):
        part.take(start, data)


def _known_dtype(code: str) -> torch.dtype:
    dtype = dtype_from_code(code)
    if dtype is None:
        raise ValueError(f"unknown type {code!r}")
    return dtype
