"""A folder as transformers writes and reads it: weight files, their index, and the small files beside them.

Weights are safetensors or, in older folders, `pytorch_model.bin`; the latter are read as tensors only, so that nothing
in them can run. Every way in which a folder can be broken is one sentence.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.bin_file import list_bin
from megatron_llm.checkpoint.tensor_file import TensorSpec
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CONTRACT = "megatron_llm.json"
_HEADER_LIMIT = 100_000_000  # the safetensors format's own limit
_TOKENIZER_SIGNS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SHOWN = 5


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file name, dtype as safetensors spells it (`BF16`), shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def plan_shards(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Split tensors, in order, over files of at most `limit` bytes; a tensor larger than that has a file of its own."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.size
    return shards


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers names them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_json(shards: Mapping[str, Sequence[TensorSpec]]) -> dict[str, Any]:
    """The content of the index of several files."""
    total = sum(spec.size for specs in shards.values() for spec in specs)
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def is_model_file(name: str) -> bool:
    """Whether a name is that of weights as transformers names them (`model.safetensors`, `model-00001-of-00002.safetensors`)."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name) is not None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone; UserError when it is not one or is cut off."""
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if not 2 <= length <= min(_HEADER_LIMIT, size):
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        if end != size:
            raise ValueError(f"it has {size} bytes where its header says {end}")
        return {name: StoredTensor(path.name, str(tensor["dtype"]), _shape(tensor["shape"])) for name, tensor in tensors.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}; fetch or convert it again") from error


def _shape(values: Iterable[Any]) -> tuple[int, ...]:
    shape = tuple(int(value) for value in values)
    if any(size < 0 for size in shape):
        raise ValueError(f"a tensor has shape {list(shape)}")
    return shape


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a model of transformers: a configuration and weights."""
    return (path / CONFIG).is_file() and any(
        any(path.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin", INDEX, BIN_INDEX)
    )


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder by the name it has in its file, safetensors before `.bin` when it has both.

    UserError when a file is missing or broken, or when the index and the files disagree.
    """
    for index, pattern, read in ((INDEX, "model*.safetensors", read_header), (BIN_INDEX, "pytorch_model*.bin", _bin_tensors)):
        if (path / index).is_file():
            return _indexed(path, _weight_map(path / index), read)
        files = sorted(path.glob(pattern)) or (sorted(path.glob("*.safetensors")) if read is read_header else [])
        if files:
            return _united(files, read)
    raise UserError(f"{path} holds no weights: neither {SINGLE} nor {INDEX} nor {BIN_SINGLE} is there")


def _united(files: Sequence[Path], read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read(file).items():
            if name in found:
                raise UserError(f"{name} lies both in {found[name].file} and in {file.name} of {file.parent}: remove one of the files")
            found[name] = tensor
    return found


def _indexed(path: Path, mapped: dict[str, str], read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    names = sorted(set(mapped.values()))
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent[:_SHOWN])}, which its index names: fetch the folder again, whole")
    found = _united([path / name for name in names], read)
    wrong = sorted(key for key in mapped.keys() | found.keys() if key not in found or mapped.get(key) != found[key].file)
    if wrong:
        raise UserError(f"the index of {path} does not agree with the files beside it about {', '.join(wrong[:_SHOWN])}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(file, str) and Path(file).name == file for file in mapped.values()):
        raise UserError(f"{index} has no usable weight_map: it must map each tensor to a file beside it")
    return mapped


def _bin_tensors(path: Path) -> dict[str, StoredTensor]:
    return {name: StoredTensor(path.name, dtype, shape) for name, (dtype, shape) in list_bin(path).items()}


def read_hf_config(path: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`; UserError when it cannot be read."""
    return read_json(path / CONFIG)


def read_contract(path: Path) -> dict[str, Any]:
    """What `megatron_llm.json` of a folder says, {} without one."""
    return read_json(path / CONTRACT) if (path / CONTRACT).is_file() else {}


def stored_dtype(path: Path) -> str:
    """The types of a folder's weights as safetensors spells them, `BF16` or `BF16, F32`."""
    return ", ".join(sorted({tensor.dtype for tensor in list_tensors(path).values()}))


def tokenizer_files(source: Path) -> list[Path]:
    """The files of a tokenizer given as a file or a folder: those of the folder that are not a model's."""
    if not source.is_dir():
        return [source]
    return [path for path in sorted(source.iterdir()) if path.is_file() and not _belongs_to_model(path.name)]


def _belongs_to_model(name: str) -> bool:
    own = (CONFIG, GENERATION_CONFIG, CONTRACT, "manifest.json", "manifest.sha256", "conversion_report.json")
    return name in own or name.endswith((".safetensors", ".bin", ".pt", ".index.json", ".py"))


def tokenizer_folder(path: Path, inner: str = "tokenizer") -> Path | None:
    """Where the tokenizer of a checkpoint or Hugging Face folder lies: its folder `inner` or the folder itself; None without one."""
    for folder in (path / inner, path):
        if any((folder / name).is_file() for name in _TOKENIZER_SIGNS):
            return folder
    return None


def elements(tensors: Iterable[StoredTensor]) -> int:
    """Number of elements of tensors together."""
    return sum(math.prod(tensor.shape) for tensor in tensors)
