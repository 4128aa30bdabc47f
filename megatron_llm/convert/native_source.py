"""A checkpoint of ours, in either form and saved under any layout, as a source of weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.checkpoint.find import quick_check
from megatron_llm.checkpoint.hf_folder import CONFIG
from megatron_llm.checkpoint.manifest import MANIFEST, OPTIMIZER, TOKENIZER, DamagedCheckpoint, Manifest
from megatron_llm.checkpoint.model_state import MAIN
from megatron_llm.checkpoint.tensor_file import FileSeal, dtype_from_name
from megatron_llm.checkpoint.whole_model import read_model_config
from megatron_llm.config.schema import ModelConfig
from megatron_llm.convert.hf_source import check_weights
from megatron_llm.convert.raw_tensors import TensorFile
from megatron_llm.convert.seals import SealCheck
from megatron_llm.convert.source import TensorInfo
from megatron_llm.utils.json_files import read_json


class NativeSource:
    """A `WeightSource` over one checkpoint folder.

    `target` is the type the weights will be converted to, if known: a weight that was saved in another type is read from
    its fp32 main copy where there is one. `hf_config` is the config.json of a checkpoint in the Hugging Face form, else None.
    UserError (DamagedCheckpoint) for a folder that is not whole.
    """

    format = "native"

    def __init__(self, path: Path, target: torch.dtype | None = None) -> None:
        self.path = path
        self.manifest: Manifest = quick_check(path)
        self.config: ModelConfig = read_model_config(path)
        self.step: int | None = self.manifest.step
        self.layout: Mapping[str, int] = dict(self.manifest.layout)
        self.tokenizer: Path | None = _tokenizer(path)
        self.hf_config = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
        self._records = {key: self._source(key, target) for key in self.manifest.weights}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(dtype_from_name(self.manifest.tensors[name].dtype), self.manifest.tensors[name].shape)
            for key, name in self._records.items()
        }
        self._files: dict[str, TensorFile] = {}
        check_weights(self)

    def _source(self, key: str, target: torch.dtype | None) -> str:
        changes = target is not None and self.manifest.tensors[key].dtype != str(target).removeprefix("torch.")
        return MAIN + key if changes and MAIN + key in self.manifest.tensors else key

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU, in its saved type, put together from its chunks."""
        shape = self.tensors[key].shape
        return self._read(key, 0, shape[0] if shape else 0)

    def read_rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor."""
        return self._read(key, first, last)

    def _read(self, key: str, first: int, last: int) -> Tensor:
        record = self.manifest.tensors[self._records[key]]
        tensor: Tensor | None = None
        for chunk in record.chunks:
            low, high = max(first, chunk.start[0]), min(last, chunk.start[0] + chunk.shape[0])
            if low >= high:
                continue
            file = self._file(chunk.file)
            if file.tensors.get(chunk.name) != TensorInfo(dtype_from_name(record.dtype), chunk.shape):
                raise DamagedCheckpoint(self.path, f"{chunk.file} does not hold {chunk.name} as {MANIFEST} says")
            if (low, high) == (first, last) and chunk.shape[1:] == record.shape[1:]:
                return file.read_rows(chunk.name, low - chunk.start[0], high - chunk.start[0])
            if tensor is None:
                tensor = torch.empty(last - first, *record.shape[1:], dtype=dtype_from_name(record.dtype))
            place = (slice(low - first, high - first), *(slice(a, a + n) for a, n in zip(chunk.start[1:], chunk.shape[1:], strict=True)))
            tensor[place] = file.read_rows(chunk.name, low - chunk.start[0], high - chunk.start[0])
        return torch.empty(0, *record.shape[1:], dtype=dtype_from_name(record.dtype)) if tensor is None else tensor

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.path / name)
        return self._files[name]

    def seal_check(self) -> SealCheck:
        """Digests of the files that a conversion reads; files with optimizer state alone are not among them."""
        used = {chunk.file for name in self._records.values() for chunk in self.manifest.tensors[name].chunks}
        optimizer = {chunk.file for key, record in self.manifest.tensors.items() if key.startswith(OPTIMIZER) for chunk in record.chunks}
        seals: dict[str, FileSeal] = {name: seal for name, seal in self.manifest.files.items() if name in used or name not in optimizer}
        return SealCheck(self.path, seals, MANIFEST)

    def close(self) -> None:
        """Nothing is held open between reads."""


def _tokenizer(path: Path) -> Path | None:
    if (path / TOKENIZER).is_dir():
        return path / TOKENIZER
    return path if (path / "tokenizer.json").is_file() else None
