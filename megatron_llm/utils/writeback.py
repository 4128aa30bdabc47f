"""Having the system write a file to the disk while its writer goes on, so that little is left for the fsync at the end."""

import ctypes
from typing import IO

_PIECE = 16 << 20  # bytes
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, do not wait


class WriteBehind:
    """Asks, each time so many bytes have been added to a file, that they be written. A hint: where it cannot be given nothing happens."""

    def __init__(self, stream: IO[bytes], start: int = 0) -> None:
        self._stream, self._asked = stream, start
        self._call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # glibc's

    def added(self, end: int) -> None:
        """The file has `end` bytes now, all of them handed to the system but those in the stream's buffer."""
        if self._call is None or end - self._asked < _PIECE:
            return
        self._call(self._stream.fileno(), ctypes.c_int64(self._asked), ctypes.c_int64(end - self._asked), _WRITE)
        self._asked = end
