"""Reading safetensors files without mapping them: the memory of a conversion is that of the tensors in its hands.

A mapped file counts towards the memory of the process page by page as it is read, so that streaming a file of 100 GB through a
mapping looks like (and, under a limit, is) 100 GB. Here every read goes into a tensor of its own. Headers are checked in
full when a file is opened: a file that was cut, or whose header was damaged, is found before anything is converted.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.hf_folder import INDEX, SINGLE
from megatron_llm.convert.source import TensorInfo
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_HEADER_LIMIT = 100_000_000  # the safetensors format's own limit


@dataclass(frozen=True)
class _Slot:
    """A tensor's type, shape and first byte in the file."""

    info: TensorInfo
    offset: int


class TensorFile:
    """One safetensors file: its header, and its tensors read whole or by rows. UserError for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._slots = _read_slots(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        return {name: slot.info for name, slot in self._slots.items()}

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        slot = self._slots[name]
        return self._bytes(slot.offset, math.prod(slot.info.shape) * slot.info.dtype.itemsize).view(slot.info.dtype).view(slot.info.shape)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of the tensor."""
        slot = self._slots[name]
        width = math.prod(slot.info.shape[1:]) * slot.info.dtype.itemsize
        data = self._bytes(slot.offset + first * width, (last - first) * width)
        return data.view(slot.info.dtype).view(last - first, *slot.info.shape[1:])

    def _bytes(self, offset: int, size: int) -> Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                while done < size:
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                    if count == 0:
                        raise UserError(f"{self.path} ends in the middle of a tensor: it was cut while being read")
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return data


def _read_slots(path: Path) -> dict[str, _Slot]:
    """The header's tensors; ValueError, TypeError, KeyError or AttributeError when it does not describe this very file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError("its header has an impossible length")
        header: dict[str, Any] = json.loads(file.read(length))
    slots, spans = {}, []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        shape, (begin, end) = tuple(tensor["shape"]), tensor["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has an impossible shape or place")
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the unknown type {tensor['dtype']!r}")
        info = TensorInfo(_DTYPES[tensor["dtype"]], shape)
        if end - begin != math.prod(shape) * info.dtype.itemsize:
            raise ValueError(f"{name} has {end - begin} bytes, its shape {list(shape)} needs {math.prod(shape) * info.dtype.itemsize}")
        slots[name] = _Slot(info, 8 + length + begin)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("its tensors overlap or leave gaps")
        position = end
    if 8 + length + position != size:
        raise ValueError(f"it has {size} bytes, its header describes {8 + length + position}")
    return slots


class TensorFolder:
    """The safetensors files of a Hugging Face folder as one: the files its index names, or all there are without one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, TensorFile] = {}
        mapped = file_by_key(path, INDEX)
        names = sorted(set(mapped.values())) if mapped is not None else _unindexed(path)
        for name in names:
            file = TensorFile(path / name)
            for key in file.tensors:
                if key in self._files:
                    raise UserError(
                        f"{key} is both in {self._files[key].path.name} and in {name} of {path}: remove the file that is left over"
                    )
                self._files[key] = file
        if mapped is not None:
            actual = {key: file.path.name for key, file in self._files.items()}
            wrong = sorted(key for key in mapped.keys() | actual.keys() if mapped.get(key) != actual.get(key))
            if wrong:
                raise UserError(f"{path / INDEX} does not agree with the files beside it about {', '.join(wrong[:5])}")
        self.tensors: Mapping[str, TensorInfo] = {key: file.tensors[key] for key, file in self._files.items()}

    @property
    def files(self) -> list[str]:
        """Names of the files with weights."""
        return sorted({file.path.name for file in self._files.values()})

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU, in its saved type."""
        return self._files[key].read(key)

    def read_rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor."""
        return self._files[key].read_rows(key, first, last)

    def close(self) -> None:
        """Nothing is held open between reads."""


def file_by_key(path: Path, index: str) -> dict[str, str] | None:
    """What an index of weight files says, all of which must be there; None without that index."""
    if not (path / index).is_file():
        return None
    mapped = read_json(path / index).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(name, str) and Path(name).name == name for name in mapped.values()):
        raise UserError(f"{path / index} has no weight_map from keys to names of files beside it")
    missing = sorted(name for name in set(mapped.values()) if not (path / name).is_file())
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing[:5])}, which {index} names: download or copy the missing files")
    return mapped


def _unindexed(path: Path) -> list[str]:
    if (path / SINGLE).is_file():
        return [SINGLE]
    names = sorted(file.name for file in path.glob("*.safetensors"))
    numbered = [name for name in names if "-of-" in name]
    count = int(numbered[0].rpartition("-of-")[2].split(".")[0] or 0) if numbered and _numbered(numbered[0]) else len(names)
    if count != len(names):
        raise UserError(f"{path} has {len(names)} of {count} files of weights and no {INDEX}: download or copy the missing ones")
    return names


def _numbered(name: str) -> bool:
    return name.rpartition("-of-")[2].split(".")[0].isdigit()
