"""Writing safetensors files tensor by tensor, hashed on the way out.

The safetensors library writes a file from tensors that are all in memory. Saving and exporting want less: the header
first (shapes are known before any tensor is read), then one tensor at a time, with the digests computed from the bytes
that go to the file, so that a file need not be read again to be sealed.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_llm.checkpoint.pieces import (
    PIECE,
    PieceUnderWay,
    PieceWriter,
    bytes_of,
    copy_values,
    host_memory,
    padded,
    piece_count,
    read_digests,
)

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}
_BUFFERS = 5  # pieces in memory at a time: those that threads write and hash, and the next ones


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, ...: the name a manifest uses."""
    if dtype not in _CODES:
        raise ValueError(f"tensors of {dtype} cannot be stored in a checkpoint")
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of a manifest's name; ValueError for a name that is none."""
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def safetensors_code(dtype: torch.dtype) -> str:
    """`F32`, `BF16`, ...: how safetensors spells a dtype; other dtypes by torch's name."""
    return _CODES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_from_code(code: str) -> torch.dtype | None:
    """The dtype that safetensors spells `code`; None for one that weights here cannot have (FP8 and packed types)."""
    return next((dtype for dtype, known in _CODES.items() if known == code), None)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileSeal:
    """Size in bytes of a file, and the SHA-256 (hex) of each 4 MiB of it in order, separated by spaces.

    So for a file of up to 4 MiB `sha256` is what `sha256sum` prints.
    """

    size: int
    sha256: str

    @property
    def digests(self) -> list[str]:
        """The SHA-256 of each piece."""
        return self.sha256.split(" ")


def seal_file(path: Path) -> FileSeal:
    """Read a file, with several threads, and return its size and digests."""
    size, digests = read_digests(path)
    return FileSeal(size, " ".join(digests))


def seal_bytes(data: bytes) -> FileSeal:
    """The seal of a file that holds `data`."""
    digests = (hashlib.sha256(data[number * PIECE : (number + 1) * PIECE]).hexdigest() for number in range(piece_count(len(data))))
    return FileSeal(len(data), " ".join(digests))


@dataclass(frozen=True)
class FileLayout:
    """Where things lie in a safetensors file: its header, the offset of each tensor's first byte, the size of the file."""

    header: bytes
    offsets: tuple[int, ...]
    size: int


def file_layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """The layout of a file that holds tensors in this order; ValueError when two have one name."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, offset = [], 0
    for spec in specs:
        if spec.name in header:
            raise ValueError(f"two tensors of one file are named {spec.name}")
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.size]}
        places.append(offset)
        offset += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    begin = len(text) + 8
    return FileLayout(len(text).to_bytes(8, "little") + text, tuple(begin + place for place in places), begin + offset)


def write_image(path: Path, image: Tensor, size: int) -> FileSeal:
    """Write a whole file of `size` bytes out of page-aligned host memory, `image`, which is as long as `size` padded."""
    with PieceWriter(path, size) as file:
        data = bytes_of(image)
        for number in range(piece_count(size)):
            file.put(number, data[number * PIECE : (number + 1) * PIECE])
        return FileSeal(size, " ".join(file.close()))


class TensorFileWriter:
    """One safetensors file under way: give the specs, then write each tensor in their order, then `close`.

    Tensors are copied, wherever they are, into `buffers` pieces of host memory, which threads hash and write meanwhile:
    fewer of them take less memory, and keep the disk less busy.
    As a context manager it closes the file descriptor on errors too; the partial file is the caller's to remove.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, *, buffers: int = _BUFFERS
    ) -> None:
        layout = file_layout(specs, metadata)
        self._waiting = list(reversed(specs))
        self._total, self._size = layout.size, 0
        piece = min(PIECE, padded(layout.size))
        buffers = min(buffers, piece_count(layout.size))
        memory = host_memory(piece * buffers)
        self._buffers = [memory[piece * number : piece * (number + 1)] for number in range(buffers)]
        self._written: list[PieceUnderWay | None] = [None] * buffers
        self._file = PieceWriter(path, layout.size)
        try:
            self._put(torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))
        except OSError:
            self._file.__exit__(None, None, None)
            raise

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, of any device and strides; ValueError when it is not the one announced."""
        spec = self._waiting.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
            raise ValueError(f"expected tensor {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel():
            self._put(tensor.detach().contiguous().view(-1).view(torch.uint8))

    def write_rows(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the next tensor, given in blocks of its rows in their order; ValueError when together they are another."""
        spec, rows = self._waiting.pop(), 0
        for block in blocks:
            if (name, block.dtype, tuple(block.shape[1:])) != (spec.name, spec.dtype, spec.shape[1:]):
                raise ValueError(f"expected rows of tensor {spec}, got {name} {block.dtype} {tuple(block.shape)}")
            rows += len(block)
            if rows <= spec.shape[0] and block.numel():
                self._put(block.detach().contiguous().view(-1).view(torch.uint8))
        if name != spec.name or spec.shape[:1] != (rows,):
            raise ValueError(f"expected tensor {spec}, got {name} of {rows} rows")

    def close(self) -> FileSeal:
        """Flush to the disk itself, close, and return the size and digests of what was written."""
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} announced tensors were not written, first {self._waiting[-1].name}")
        return FileSeal(self._size, " ".join(self._file.close()))

    def _put(self, data: Tensor) -> None:
        """Append bytes, which lie in a flat tensor of uint8."""
        taken = 0
        while taken < len(data):
            number, filled = divmod(self._size, PIECE)
            turn = number % len(self._buffers)
            before = self._written[turn]
            if not filled and before is not None:
                before.result()  # the piece that was in this memory is on its way no longer
            count = min(len(data) - taken, PIECE - filled)
            copy_values(self._buffers[turn][filled : filled + count], data[taken : taken + count])
            taken, self._size = taken + count, self._size + count
            if filled + count == PIECE or self._size == self._total:
                written = padded(filled + count)
                self._written[turn] = self._file.put(number, bytes_of(self._buffers[turn][:written]))
