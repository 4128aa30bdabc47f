"""Tensors of a folder, read one at a time or by rows, so that memory is that of the tensors in hand.

Files are read, not mapped: pages of a mapped file count towards the memory of the process as they are touched, and a merge
of a model of 100 GB would look like (and, under a limit, be) 100 GB. Older `.bin` files can only be mapped.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.checkpoint.bin_file import BinFile
from megatron_llm.checkpoint.hf_folder import StoredTensor
from megatron_llm.checkpoint.tensor_file import TensorSpec, dtype_from_code
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class _Slot:
    """File and first byte of a tensor."""

    path: Path
    offset: int


class StoredTensors:
    """The tensors that `listed` (of `checkpoint.hf_folder`) names in the files of a folder.

    `specs` gives type and shape of each by name, `files` the names of the files. UserError for a type that weights cannot
    have (packed or quantised ones).
    """

    def __init__(self, folder: Path, listed: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.files: Sequence[str] = sorted({tensor.file for tensor in listed.values()})
        self.specs: dict[str, TensorSpec] = {}
        self._listed = listed
        for name, tensor in listed.items():
            dtype = dtype_from_code(tensor.dtype)
            if dtype is None:
                raise UserError(
                    f"{name} in {folder / tensor.file} is of type {tensor.dtype}: quantised weights cannot be merged, give the full ones"
                )
            self.specs[name] = TensorSpec(name, dtype, tensor.shape)
        self._slots: dict[str, _Slot] = {}
        for file in self.files:
            if file.endswith(".safetensors"):
                self._slots |= _slots(folder / file)
        self._bin: tuple[str, BinFile] | None = None

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU, in its saved type."""
        shape = self.specs[name].shape
        return self.read_rows(name, 0, shape[0]) if shape else self._span(name, 0, 1).view(())

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor."""
        shape = self.specs[name].shape
        width = math.prod(shape[1:])
        return self._span(name, first * width, last * width).view(last - first, *shape[1:])

    def _span(self, name: str, first: int, last: int) -> Tensor:
        """Elements [first, last) of the flattened tensor."""
        dtype = self.specs[name].dtype
        slot = self._slots.get(name)
        if slot is None:
            return self._mapped(name).reshape(-1)[first:last].clone()
        data = torch.empty((last - first) * dtype.itemsize, dtype=torch.uint8)
        _fill(slot.path, data.numpy().data, slot.offset + first * dtype.itemsize)
        return data.view(dtype)

    def _mapped(self, name: str) -> Tensor:
        file = self._listed[name].file
        if self._bin is None or self._bin[0] != file:
            self._bin = (file, BinFile(self.folder / file))
        return self._bin[1].get_slice(name)


def _slots(path: Path) -> dict[str, _Slot]:
    """Places in a file whose header `read_header` has found good."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: _Slot(path, 8 + length + tensor["data_offsets"][0]) for name, tensor in header.items() if name != "__metadata__"}


def _fill(path: Path, view: memoryview, offset: int) -> None:
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise UserError(f"{path} ends in the middle of a tensor: it was cut while it was read")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
