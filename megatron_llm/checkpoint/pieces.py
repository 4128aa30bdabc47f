"""Files in pieces of 4 MiB: written and read by several threads past the page cache, each piece with its own SHA-256.

A disk is fast when it has several large requests at a time, and a page cache only costs processor time for bytes that
nobody will read soon. So pieces go from page-aligned memory to the disk directly (`O_DIRECT`; where a file system does
not have it, through the cache). A digest for each piece instead of one for the file lets threads hash side by side, and
lets a reader verify what it reads without reading the rest. Hashing, reading and writing all release the interpreter.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import BoundedSemaphore, local
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECE = 4 * 1024 * 1024
ALIGNMENT = 4096  # of memory, offsets and lengths, for every disk in use
THREADS = 4  # enough requests under way for a fast disk, few enough not to crowd a training out of its processors
_UNDER_WAY = 4 * THREADS
_DIRECT = getattr(os, "O_DIRECT", 0)
_NO_DIRECT = (errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP)  # of this file system, or of this memory
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def padded(size: int) -> int:
    """`size` rounded up to the alignment of direct input and output."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def host_memory(size: int, *, pinned: bool = False) -> Tensor:
    """`size` bytes of host memory at the beginning of a page; `pinned` for transfers from a GPU.

    Pages are as large as the system gives: a first write into small ones costs more than the copy.
    """
    if pinned:
        block = torch.empty(size + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
        return block.narrow(0, -block.data_ptr() % ALIGNMENT, size)
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:size]


def bytes_of(memory: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor of uint8, without a copy."""
    return memory.numpy().data


def copy_values(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, on this thread alone where it is a plain copy of rows in host memory.

    Torch would share it among a team of threads, which wait for each other: with several callers, or where other work keeps
    the processors busy, that takes much longer.
    """
    alike = source.dtype == target.dtype and source.device.type == target.device.type == "cpu"
    if alike and source.shape == target.shape and source.stride()[-1:] == target.stride()[-1:] == (1,):
        number = _SAME_SIZE[source.dtype.itemsize]  # numpy has no bfloat16
        np.copyto(target.detach().view(number).numpy(), source.detach().view(number).numpy())
    else:
        target.copy_(source)


def piece_count(size: int) -> int:
    """How many pieces a file of `size` bytes has; an empty file has one, so that it has a digest."""
    return max(1, -(-size // PIECE))


class PieceUnderWay:
    """A piece that threads write and hash."""

    def __init__(self, written: Future[None], hashed: Future[None]) -> None:
        self._parts = written, hashed

    def result(self) -> None:
        """Wait until its memory is free again; the OSError of its write."""
        for part in self._parts:
            part.result()


class PieceWriter:
    """A file of known size under way: `put` its pieces in any order, then `close`. OSErrors come out of either.

    As a context manager it ends its threads and closes the file on errors too; the partial file is the caller's to remove.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._file = _open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, direct=True)
        self._digests = [hashlib.sha256().hexdigest()] * piece_count(size)
        self._under_way: list[Future[None]] = []
        self._room = BoundedSemaphore(_UNDER_WAY)
        # The disk need not wait for a digest, so hashing has threads of its own and takes place while requests are under way.
        self._writers = ThreadPoolExecutor(min(THREADS, piece_count(size)), thread_name_prefix="pieces")
        self._hashers = ThreadPoolExecutor(min(THREADS, piece_count(size)), thread_name_prefix="digests")
        try:
            _allocate(self._file, size)
        except OSError:
            self._end()
            raise

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def put(self, number: int, data: memoryview) -> "PieceUnderWay":
        """Write and hash a piece on threads; `data`, of its length padded, must stay as it is until both are done.

        Waits while many pieces are under way: a process that is told to stop ends soon, and a full disk is noticed.
        """
        self._room.acquire()
        waiting = []
        try:
            for future in self._under_way:
                if future.done():
                    future.result()
                else:
                    waiting.append(future)
            written = self._writers.submit(self._write_piece, number, data)
        except BaseException:
            self._room.release()
            raise
        written.add_done_callback(lambda _: self._room.release())
        hashed = self._hashers.submit(self._hash_piece, number, data)
        self._under_way = [*waiting, written, hashed]
        return PieceUnderWay(written, hashed)

    def close(self) -> list[str]:
        """Wait for all pieces, flush to the disk itself, close; returns the SHA-256 (hex) of each piece in order."""
        done, _ = wait(self._under_way, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        os.ftruncate(self._file, self._size)  # the last piece was written with its padding
        os.fsync(self._file)
        self._end()
        return self._digests

    def _hash_piece(self, number: int, data: memoryview) -> None:
        self._digests[number] = hashlib.sha256(data[: min(PIECE, self._size - number * PIECE)]).hexdigest()

    def _write_piece(self, number: int, data: memoryview) -> None:
        start = number * PIECE
        while data:
            count = _with_fallback(self._file, lambda: os.pwrite(self._file, data, start))  # noqa: B023 - called at once
            data, start = data[count:], start + count

    def _end(self) -> None:
        self._writers.shutdown(cancel_futures=True)
        self._hashers.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class PieceMemory(local):
    """Page-aligned memory for one piece, another one for each thread that asks."""

    def __init__(self, *, pinned: bool = False) -> None:
        self.block = host_memory(PIECE + ALIGNMENT, pinned=pinned)


class PieceReader:
    """Reads parts of one file. `direct`: past the page cache, for what no other process on this machine reads too."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        self._file = _open(path, os.O_RDONLY, direct=direct)
        self.size = os.fstat(self._file).st_size

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    def read(self, start: int, end: int, memory: PieceMemory) -> Tensor:
        """The bytes [start, end), at most a piece, in `memory`; fewer where the file is shorter."""
        first = start // ALIGNMENT * ALIGNMENT
        block: Tensor = memory.block[: padded(end - first)]
        filled, view = 0, bytes_of(block)
        while filled < end - first:
            at = filled
            count = _with_fallback(self._file, lambda: os.preadv(self._file, [view[at:]], first + at))  # noqa: B023 - called at once
            filled += count
            if not count or first + filled >= self.size:
                break
        return block[start - first : max(start - first, min(filled, end - first))]


def read_digests(path: Path) -> tuple[int, list[str]]:
    """Size of a file and the SHA-256 (hex) of each of its pieces, read by several threads."""
    memory = PieceMemory()
    with PieceReader(path, direct=False) as file:

        def digest(number: int) -> str:
            return hashlib.sha256(bytes_of(file.read(number * PIECE, (number + 1) * PIECE, memory))).hexdigest()

        return file.size, list(in_threads(digest, range(piece_count(file.size))))


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each item, in order, by several threads when there are several items; the first error ends it."""
    if len(items) < 2:
        yield from map(work, items)
        return
    threads = ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="pieces")
    try:
        yield from threads.map(work, items)
    finally:
        threads.shutdown(cancel_futures=True)


def _open(path: Path, flags: int, *, direct: bool) -> int:
    if direct and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
    return os.open(path, flags, 0o666)


def _with_fallback(file: int, call: Callable[[], int]) -> int:
    """`call`, and once more through the page cache when the file system or the memory does not do without it."""
    try:
        return call()
    except OSError as error:
        if error.errno not in _NO_DIRECT or not _DIRECT:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)
        return call()


def _allocate(file: int, size: int) -> None:
    """Reserve the space of a file, so that threads need not wait for each other to extend it. OSError when the disk is full.

    Not when there seems to be too little space: all that is left, which others may be about to use, would be taken at a
    stroke. Then the writes find out. The system call itself, not `posix_fallocate`: where it is not available the C library
    would write every block.
    """
    if not size or not sys.platform.startswith("linux"):
        return
    disk = os.fstatvfs(file)
    if size > disk.f_bavail * disk.f_frsize:
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            os.ftruncate(file, 0)
            raise OSError(code, os.strerror(code))
