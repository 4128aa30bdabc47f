"""Host memory for saves in the background: each file as it will be on the disk, so that writing it takes no further copy.

The memory is kept between saves, and its pages are there before the first one, so that a save keeps the training waiting
for the copy alone. It is page-locked when the tensors lie on a GPU.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_llm.checkpoint.contents import FileContents
from megatron_llm.checkpoint.pieces import PIECE, host_memory, in_threads, padded


class Staging:
    """One block of host memory for the files that a rank writes."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, files: Sequence[FileContents]) -> list[FileContents]:
        """The files with images, headers filled in, and their entries' tensors replaced by uninitialised views of these.

        What an earlier call gave is used again: no write of it may be under way.
        """
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


def copy_entries(sources: Sequence[FileContents], targets: Sequence[FileContents], skip: Collection[str] = ()) -> None:
    """Copy the tensors of each file into those of its counterpart, except the keys in `skip`; they are there on return.

    Several threads copy: the training waits meanwhile, and one alone does not use all of the memory's bandwidth.
    """
    pairs = [
        (entry.tensor.detach(), place.tensor)
        for source, target in zip(sources, targets, strict=True)
        for entry, place in zip(source.entries, target.entries, strict=True)
        if entry.key not in skip
    ]
    if any(tensor.is_cuda for tensor, _ in pairs):
        for tensor, place in pairs:
            place.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        return
    slabs = [slab for tensor, place in pairs for slab in zip(_slabs(tensor), _slabs(place), strict=True)]
    for _ in in_threads(_copy, slabs):
        pass


def _slabs(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in parts of a few MB along its first dimension."""
    return tensor.chunk(max(1, tensor.nbytes // PIECE), dim=0)


@torch.no_grad()
def _copy(slab: tuple[Tensor, Tensor]) -> None:
    source, target = slab
    target.copy_(source)
