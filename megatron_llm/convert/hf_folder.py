"""A folder as transformers writes and reads it: safetensors files, their index, and the small JSON files beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.tensor_file import TensorSpec
from megatron_llm.utils.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_HEADER_LIMIT = 100_000_000  # the safetensors format's own limit


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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone; UserError when it is not one."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, path.stat().st_size):
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        return {
            name: StoredTensor(path.name, str(tensor["dtype"]), tuple(tensor["shape"]))
            for name, tensor in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a model of transformers: a configuration and safetensors files."""
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder by key. UserError when the index and the files disagree."""
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    found: dict[str, StoredTensor] = {}
    for file in files:
        found.update(read_header(file))
    if (path / INDEX).is_file():
        mapped = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        actual = {key: tensor.file for key, tensor in found.items()}
        wrong = sorted(key for key in mapped.keys() | actual.keys() if mapped.get(key) != actual.get(key))
        if wrong:
            raise UserError(f"{path / INDEX} does not agree with the files beside it about {', '.join(wrong[:5])}")
    return found
