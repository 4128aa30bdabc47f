"""What each rank writes to which file: the tensors in the order of the file, their names in it, and where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.hf_folder import shard_names
from megatron_llm.checkpoint.manifest import OPTIMIZER_FOLDER
from megatron_llm.checkpoint.tensor_file import FileLayout, TensorSpec, dtype_name, file_layout

METADATA = {"format": "pt"}  # in the header of each file: what transformers asks of a file of weights


@dataclass(frozen=True)
class FileContents:
    """A tensor file that a rank writes: its name in the checkpoint's folder, and what is in it, in that order.

    `image`: the file as it will be, in page-aligned host memory; the entries' tensors are then views of it.
    """

    name: str
    entries: Sequence[Entry]
    image: Tensor | None = None

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors as the file names them."""
        return [TensorSpec(_name_in_file(entry), entry.tensor.dtype, entry.shape) for entry in self.entries]

    @property
    def layout(self) -> FileLayout:
        """Where each of them lies in the file."""
        return file_layout(self.specs, METADATA)

    def enter(self, tensors: dict[str, dict[str, Any]]) -> None:
        """Add the chunks of this file to `tensors`, the record of the rank; ValueError for a key given in two ways."""
        for entry, spec in zip(self.entries, self.specs, strict=True):
            kind = {"dtype": dtype_name(entry.tensor.dtype), "shape": list(entry.global_shape)}
            record = tensors.setdefault(entry.key, {**kind, "chunks": []})
            if record | kind != record:
                raise ValueError(f"{entry.key} is given as {kind} and as {record['dtype']} {record['shape']}")
            record["chunks"].append([self.name, spec.name, list(entry.start), list(entry.shape)])


def sharded_files(rank: int, entries: Sequence[Entry]) -> list[FileContents]:
    """The one file of a rank in the sharded form: all that it owns."""
    return _files({f"rank_{rank:05d}.safetensors": entries})


def hf_files(rank: int, weights: Sequence[Entry], number: int | None, count: int, rest: Sequence[Entry]) -> list[FileContents]:
    """The files of a rank in the Hugging Face form: whole weights as file `number` of `count`, the optimizer aside."""
    weight_files = {} if number is None else {shard_names(count)[number]: weights}
    return _files({**weight_files, f"{OPTIMIZER_FOLDER}/rank_{rank:05d}.safetensors": rest})


def adapter_files(rank: int, entries: Sequence[Entry]) -> list[FileContents]:
    """The one file of a rank whose weights rank 0 then joins to one file: all that it owns, aside."""
    return _files({f"{OPTIMIZER_FOLDER}/rank_{rank:05d}.safetensors": entries})


def _files(contents: dict[str, Sequence[Entry]]) -> list[FileContents]:
    """The files that have anything in them, with what the rank owns."""
    files = []
    for name, entries in contents.items():
        owned = [entry for entry in entries if entry.owned and entry.tensor.numel()]
        if owned:
            # Widest dtypes first, so that every tensor lies at a multiple of its element size.
            files.append(FileContents(name, sorted(owned, key=lambda entry: -entry.tensor.dtype.itemsize)))
    return files


def _name_in_file(entry: Entry) -> str:
    """The key itself for a whole tensor, so that the file reads like any safetensors file; otherwise key and start."""
    return entry.key if entry.shape == entry.global_shape else f"{entry.key}@{','.join(map(str, entry.start))}"
