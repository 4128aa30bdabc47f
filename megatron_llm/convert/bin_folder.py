"""The tensors of a Hugging Face folder in the older format: `pytorch_model.bin`, or numbered files with an index.

The files are pickles; they are read by the weights-only loader of `convert.pickles`, mapped, one file at a time.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.convert.pickles import PickleFile
from megatron_llm.convert.raw_tensors import file_by_key
from megatron_llm.convert.source import TensorInfo
from megatron_llm.utils.errors import UserError

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


def has_bin_weights(path: Path) -> bool:
    """Whether a folder holds weights in this format: the one file, the index, or numbered files."""
    return any((path / name).is_file() for name in (BIN_SINGLE, BIN_INDEX)) or any(path.glob("pytorch_model-*-of-*.bin"))


class BinFolder:
    """The `.bin` files of a Hugging Face folder as one.

    `tensors` gives type and shape by the key in the file, `files` the names of the files. UserError when a file is
    missing, damaged or holds anything but tensors, and when the index and the files disagree. One file is open at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = file_by_key(path, BIN_INDEX)
        self.files = sorted(set(mapped.values())) if mapped is not None else _unindexed(path)
        self._file_of: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._pickles = {name: PickleFile(path / name) for name in self.files}
        self._open: PickleFile | None = None
        for name in self.files:
            for key, info in _infos(path / name).items():
                if key in self._infos:
                    raise UserError(f"{key} is both in {self._file_of[key]} and in {name} of {path}: remove the file that is left over")
                self._infos[key], self._file_of[key] = info, name
        if mapped is not None:
            wrong = sorted(key for key in mapped.keys() | self._file_of.keys() if mapped.get(key) != self._file_of.get(key))
            if wrong:
                raise UserError(f"{path / BIN_INDEX} does not agree with the files beside it about {', '.join(wrong[:5])}")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Type and shape of every tensor, by its key in the files."""
        return self._infos

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU, contiguous, in its saved type. UserError when its file does not match its checksums."""
        return self._file(key).copy(lambda content: content[key])

    def read_rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor."""
        return self._file(key).copy(lambda content: content[key][first:last])

    def close(self) -> None:
        """Let go of the file that is open."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _file(self, key: str) -> PickleFile:
        wanted = self._pickles[self._file_of[key]]
        if self._open is not wanted:
            self.close()
            self._open = wanted
        return wanted


def _infos(path: Path) -> dict[str, TensorInfo]:
    content = PickleFile(path).content()
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    found = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise UserError(f"{path} holds {key!r}, which is not a plain tensor with a name: save the weights alone")
        found[key] = TensorInfo(value.dtype, tuple(value.shape))
    return found


def _unindexed(path: Path) -> list[str]:
    if (path / BIN_SINGLE).is_file():
        return [BIN_SINGLE]
    names = sorted(file.name for file in path.glob("pytorch_model-*-of-*.bin"))
    if not names:
        raise UserError(f"{path} has no {BIN_SINGLE}")
    count = names[0].removesuffix(".bin").rpartition("-of-")[2]
    if not count.isdigit() or int(count) != len(names):
        raise UserError(f"{path} has {len(names)} of {count} files of weights and no {BIN_INDEX}: download or copy the missing ones")
    return names
