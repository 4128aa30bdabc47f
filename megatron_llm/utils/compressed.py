"""Reading plain, .gz and .zst files alike, with the position in the file on disk so that progress can be shown.

A truncated or garbled compressed file is a UserError that names the file: silently short data would be worse.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require

COMPRESSED_SUFFIXES = (".gz", ".zst")
_FEED = 64 * 1024


def plain_suffix(path: str | Path) -> str:
    """The suffix that tells the format, compression aside: `.jsonl` for `a.jsonl.gz`; lower case, with the dot."""
    name = str(path).lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


def is_compressed(path: str | Path) -> bool:
    """Whether the name ends in a suffix that this module decompresses."""
    return str(path).lower().endswith(COMPRESSED_SUFFIXES)


class SourceFile:
    """An input file open for reading decompressed bytes. Use as a context manager.

    `read(size)` gives up to `size` bytes, b"" at the end; `readline()` and iteration give lines. `position` is how many
    bytes of the file on disk have been consumed and `size` how many there are. Errors in the file are UserErrors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._raw: IO[bytes] = open(self.path, "rb")  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.size = os.fstat(self._raw.fileno()).st_size
        self._plain = False
        self._open()

    def _open(self) -> None:
        lowered = self.path.lower()
        if lowered.endswith(".gz"):
            self._stream: io.BufferedReader = io.BufferedReader(gzip.GzipFile(fileobj=self._raw, mode="rb"), _FEED)
        elif lowered.endswith(".zst"):
            self._stream = io.BufferedReader(_ZstdReader(self._raw), _FEED)
        else:
            self._plain = True
            self._stream = io.BufferedReader(self._raw, _FEED)  # type: ignore[arg-type]

    @property
    def position(self) -> int:
        """Bytes of the file on disk consumed so far (up to a buffer ahead of what has been handed out when compressed)."""
        return self._stream.tell() if self._plain else self._raw.tell()

    def read(self, size: int) -> bytes:
        """Up to `size` decompressed bytes; fewer only at the end of the file."""
        return self._guard(lambda: self._stream.read(size))

    def readline(self) -> bytes:
        """The next line with its line end; b"" at the end of the file."""
        return self._guard(self._stream.readline)

    def skip(self, count: int) -> None:
        """Move `count` decompressed bytes ahead: a seek in plain files, reading otherwise."""
        if self._plain:
            self._stream.seek(count, os.SEEK_CUR)
            return
        while count > 0:
            passed = len(self.read(min(count, 1 << 20)))
            if passed == 0:
                raise UserError(f"{self.path} is shorter than when it was first read: start again without the earlier partial output")
            count -= passed

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._raw.close()

    def _guard(self, action: Callable[[], bytes]) -> bytes:
        try:
            return action()
        except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
            raise UserError(f"{self._where()} is truncated or not what its name says: {error}") from error
        except OSError as error:
            raise UserError(f"{self._where()} cannot be read: {error.strerror or error}") from error

    def _where(self) -> str:
        return f"{self.path} (near byte {self._raw.tell()} of {self.size})"

    def __iter__(self) -> "SourceFile":
        return self

    def __next__(self) -> bytes:
        line = self.readline()
        if not line:
            raise StopIteration
        return line

    def __enter__(self) -> "SourceFile":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a plain, .gz or .zst UTF-8 text file, without line ends; a byte order mark is dropped."""
    with SourceFile(path) as source:
        for number, line in enumerate(source, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
            yield text.rstrip("\r\n")


class _ZstdError(Exception):
    """A zstd stream that is garbled or ends inside a frame."""


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a file of one or more zstd frames. Unlike the library's reader it notices a truncated last frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._zstandard = require("zstandard", purpose="reading .zst files")
        self._raw = raw
        self._frame: Any = None
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._raw.read(_FEED // 4)
            self._rest = b""
            if not block:
                if self._frame is not None:
                    raise _ZstdError("the file ends inside a zstd frame")
                return 0
            self._ready = memoryview(self._decompress(block))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            data: bytes = self._frame.decompress(block)
        except self._zstandard.ZstdError as error:
            raise _ZstdError(str(error)) from error
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return data
