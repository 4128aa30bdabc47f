"""Large results of a process reach another through memory that both see, instead of through a pipe.

A pipe takes two copies, pickling and a system call for every 64 KB, about as much work as parsing the text was. Here
the arrays of a result are copied once, into a slot, and what goes through the pipe is a few hundred bytes.
"""

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

_ALIGN = 64


@dataclass(frozen=True)
class Packed:
    """A result on its way: the pickle of everything but its arrays, and where in the slot each array lies (offset, bytes)."""

    head: bytes
    places: tuple[tuple[int, int], ...]


class SharedSlots:
    """`count` pieces of memory of `size` bytes, which take room only where they are used.

    Picklable as an argument of a process that multiprocessing starts, which then sees them, as do those forked from it.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._file = os.memfd_create("slots")
        os.ftruncate(self._file, count * size)
        self._memory = mmap.mmap(self._file, count * size)

    def __getstate__(self) -> tuple[int, int, Any]:
        return self.count, self.size, reduction.DupFd(self._file)

    def __setstate__(self, state: tuple[int, int, Any]) -> None:
        self.count, self.size, passed = state
        self._file = passed.detach()
        self._memory = mmap.mmap(self._file, self.count * self.size)

    def close(self) -> None:
        """Give the file back; the memory goes with the last who uses it."""
        os.close(self._file)

    def _slot(self, number: int) -> memoryview:
        return memoryview(self._memory)[number * self.size : (number + 1) * self.size]

    def pack(self, result: object, slot: int | None) -> "Packed | object":
        """The result with its arrays put into a slot; the result itself where there is no slot, or not enough room in it."""
        if slot is None:
            return result
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        starts = _starts([array.nbytes for array in arrays])
        if starts[-1] > self.size:
            return result
        room = self._slot(slot)
        for start, array in zip(starts, arrays, strict=False):
            room[start : start + array.nbytes] = array
        return Packed(head, tuple((start, array.nbytes) for start, array in zip(starts, arrays, strict=False)))

    def unpack(self, packed: Packed, slot: int) -> Any:
        """The result; its arrays are views of the slot, read-only, and hold until the slot is used again."""
        room = self._slot(slot).toreadonly()
        buffers = [room[start : start + size] for start, size in packed.places]
        return pickle.loads(packed.head, buffers=buffers)  # noqa: S301 - made by a process that this one started


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes begin when laid one behind the other, aligned, and where the last one ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGN) * _ALIGN)
    return starts
