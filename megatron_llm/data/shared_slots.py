"""Large results of a process reach another through memory that both see, instead of through a pipe.

A pipe takes two copies, pickling and a system call for every 64 KB, about as much work as parsing the text was. Here
the arrays of a result are copied once, into a slot, and what goes through the pipe is a few hundred bytes.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

_ALIGN = 64


@dataclass(frozen=True)
class Packed:
    """A result on its way: the pickle of everything but its arrays, and where in the slot each array lies (offset, bytes)."""

    head: bytes
    places: tuple[tuple[int, int], ...]


class SharedSlots:
    """`count` pieces of memory of `size` bytes. Picklable as an argument of a process of the same context, which then sees them."""

    def __init__(self, context: BaseContext, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._memory: Any = context.RawArray("B", count * size)

    def _slot(self, number: int) -> memoryview:
        return memoryview(self._memory).cast("B")[number * self.size : (number + 1) * self.size]

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
