"""Host memory for saves in the background: each file as it will be on the disk, so that writing it takes no further copy.

The memory is kept between saves, and its pages are there before the first one, so that a save takes the copy alone. It is
page-locked when the tensors lie on a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.contents import FileContents
from megatron_llm.checkpoint.pieces import PIECE, copy_values, host_memory, in_threads, padded


class Staging:
    """One block of host memory for the files that a rank writes."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._shape: list[Any] = []
        self._files: list[FileContents] = []

    def reserve(self, files: Sequence[FileContents]) -> list[FileContents]:
        """The files with images, headers filled in, and their entries' tensors replaced by uninitialised views of these.

        What an earlier call gave is used again: no write of it may be under way. For the same files it is returned as it is.
        """
        shape = [
            (file.name, [(entry.key, entry.global_shape, entry.start, entry.shape, entry.tensor.dtype) for entry in file.entries])
            for file in files
        ]
        if shape != self._shape:
            self._files, self._shape = [], []  # in this order: an error below leaves nothing that could be taken for whole
            self._files = self._lay_out(files)
            self._shape = shape
        return self._files

    def _lay_out(self, files: Sequence[FileContents]) -> list[FileContents]:
        layouts = [file.layout for file in files]
        total = sum(padded(layout.size) for layout in layouts)
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the smaller one goes before the larger one comes
            self._memory = host_memory(total, pinned=self._pinned)
            self._memory.zero_()  # the system gives a page when it is first written to
        staged, begin = [], 0
        for file, layout in zip(files, layouts, strict=True):
            image = self._memory.narrow(0, begin, padded(layout.size))
            image[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
            entries = []
            for entry, offset in zip(file.entries, layout.offsets, strict=True):
                view = image.narrow(0, offset, entry.tensor.nbytes).view(entry.tensor.dtype).view(entry.shape)
                entries.append(replace(entry, tensor=view))
            staged.append(FileContents(file.name, entries, image))
            begin += padded(layout.size)
        return staged


def copy_entries(sources: Sequence[FileContents], targets: Sequence[FileContents]) -> None:
    """Copy the tensors of each file into those of its counterpart; they are there on return.

    A tensor that is its counterpart is passed over. Several threads copy: one alone does not use all of the memory's
    bandwidth, and beside a training whose own threads wait for each other it would slow one of them down for longer.
    """
    pairs = [
        (entry.tensor.detach(), place.tensor)
        for source, target in zip(sources, targets, strict=True)
        for entry, place in zip(source.entries, target.entries, strict=True)
        if entry.tensor is not place.tensor
    ]
    if any(tensor.is_cuda for tensor, _ in pairs):
        for tensor, place in pairs:
            place.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        return
    slabs = [slab for tensor, place in pairs for slab in _slabs(tensor, place)]
    for _ in in_threads(_copy, slabs):
        pass


def _slabs(tensor: Tensor, place: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A copy in parts of a few MB along the first dimension."""
    count = max(1, tensor.nbytes // PIECE)
    return list(zip(tensor.chunk(count), place.chunk(count), strict=True))


@torch.no_grad()
def _copy(slab: tuple[Tensor, Tensor]) -> None:
    source, target = slab
    copy_values(target, source)
