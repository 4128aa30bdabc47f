"""Reading a checkpoint into any layout: each wanted rectangle is put together from the chunks it overlaps.

Only the pieces in which the overlaps lie are read, see `reading`. A Hugging Face folder is read like a checkpoint whose
tensors are each one whole chunk, see `hf_manifest`. Keys, shapes and dtypes are
compared before the first byte is copied, and all differences are shown at once, on every rank.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.bin_file import open_tensors
from megatron_llm.checkpoint.entries import Entry, overlap
from megatron_llm.checkpoint.exchange import agree, attempt, gather_json
from megatron_llm.checkpoint.hf_manifest import is_foreign, open_manifest
from megatron_llm.checkpoint.manifest import OPTIMIZER, DamagedCheckpoint, DamagedContents, Manifest, TensorRecord, is_buffer, read_manifest
from megatron_llm.checkpoint.reading import FileWants, Wanted, read_files
from megatron_llm.checkpoint.tensor_file import dtype_from_name, dtype_name
from megatron_llm.parallel.groups import ParallelGroups, single_process_groups
from megatron_llm.utils.errors import UserError

_OPEN_FILES = 64
_SHOWN = 10


class CheckpointReader:
    """Random access to the tensors of one checkpoint or Hugging Face folder, by key and global coordinates.

    A context manager. UserError (DamagedCheckpoint for a checkpoint of ours) when it is broken.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest: Manifest = open_manifest(self.path)
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)

    def read(self, key: str) -> Tensor:
        """The whole global tensor of a key, on the CPU, in the dtype it was saved in."""
        record = self.manifest.tensors[key]
        tensor = torch.empty(record.shape, dtype=dtype_from_name(record.dtype))
        self.copy_into(key, (0,) * len(record.shape), tensor)
        return tensor

    @torch.no_grad()
    def copy_into(self, key: str, start: Sequence[int], target: Tensor) -> None:
        """Fill `target`, a view of any device, strides and dtype, with the rectangle of its shape that begins at `start`."""
        copied = 0
        for chunk in self.manifest.tensors[key].chunks:
            shared = overlap(start, target.shape, chunk.start, chunk.shape)
            if shared is None:
                continue
            at, shape = shared
            inside = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, chunk.start, shape, strict=True))
            place = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, start, shape, strict=True))
            target[place].copy_(self._file(chunk.file).get_slice(chunk.name)[inside])
            copied += math.prod(shape)
        if copied != target.numel():
            raise DamagedCheckpoint(self.path, f"{key} has {copied} of the {target.numel()} elements asked for")

    def _file(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].__exit__(None, None, None)
            self._open[name] = open_tensors(self.path / name).__enter__()
        return self._open[name]


def load_state(path: Path | str) -> dict[str, Any]:
    """The `state` a checkpoint was saved with; DamagedCheckpoint when its manifest is not whole."""
    return dict(read_manifest(Path(path)).state)


def load_entries(
    path: Path | str,
    entries: Iterable[Entry],
    groups: ParallelGroups | None = None,
    *,
    cast: bool = False,
    complete: Sequence[str] = (),
    finite: bool = False,
    verify: bool = False,
) -> None:
    """Fill the entries' tensors, in place, from a checkpoint saved under any layout. Collective over `groups.world`.

    UserError on every rank, before anything is copied, when any rank wants a key that the checkpoint lacks or has in
    another shape or dtype. `cast=True` converts dtypes instead. `complete` names prefixes of keys ("" is all) of which
    the ranks together must load every element that the checkpoint has, so that nothing saved is silently left behind.
    `finite` refuses weights with NaN or infinity, by name, after they were read. `verify` compares what is read with its
    digests: DamagedContents on every rank, the entries then hold anything.
    """
    path = Path(path)
    groups = groups or single_process_groups()
    entries = [entry for entry in entries if entry.tensor.numel()]
    manifest, error = attempt(lambda: open_manifest(path))
    agree(error, f"opening {path}", groups)
    assert manifest is not None
    problems = [problem for entry in entries if (problem := _mismatch(entry, manifest, cast))]
    gathered = gather_json([problems, sorted({entry.key for entry in entries}) if complete else []], groups)
    _raise_problems(path, gathered, manifest, complete)
    _, error = attempt(lambda: _read(path, manifest, entries, verify=verify, alone=groups.world.size == 1))
    damages = gather_json(error.reason if isinstance(error, DamagedCheckpoint) else None, groups)
    damage = next((reason for reason in damages if reason is not None), None)
    if damage is not None:
        raise DamagedContents(path, damage)
    agree(error, f"reading {path}", groups)
    if finite:
        bad = gather_json(sorted({entry.key for entry in entries if not _finite(entry)}), groups)
        names = sorted({key for keys in bad for key in keys})
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise UserError(f"{path} holds NaN or infinite values in {', '.join(names[:_SHOWN])}{more}: these weights cannot be trained on")


def _read(path: Path, manifest: Manifest, entries: Sequence[Entry], *, verify: bool, alone: bool) -> None:
    """Fill this rank's entries. What other ranks of a machine read as well, the weights, goes through the page cache."""
    wanted: dict[str, list[Wanted]] = {}
    shared: set[str] = set()
    for entry in entries:
        found = list(_overlaps(manifest.tensors[entry.key], entry.start, entry.tensor))
        if sum(want.target.numel() for _, want in found) != entry.tensor.numel():
            raise DamagedCheckpoint(path, f"{entry.key} does not have all of the elements asked for")
        for file, want in found:
            wanted.setdefault(file, []).append(want)
            if not alone and not entry.key.startswith(OPTIMIZER):
                shared.add(file)
    seals = manifest.files if verify and not is_foreign(path) else {}
    files = [FileWants(path / file, wants, seals.get(file), direct=file not in shared) for file, wants in sorted(wanted.items())]
    try:
        read_files(files)
    except OSError as error:
        raise DamagedCheckpoint(path, f"{Path(error.filename or '').name or 'a file'} cannot be read: {error.strerror or error}") from error


def _overlaps(record: TensorRecord, start: Sequence[int], target: Tensor) -> Iterator[tuple[str, Wanted]]:
    """The parts of a target, by file, that lie in each chunk of a tensor."""
    for chunk in record.chunks:
        shared = overlap(start, target.shape, chunk.start, chunk.shape)
        if shared is not None:
            at, shape = shared
            inside = tuple(a - b for a, b in zip(at, chunk.start, strict=True))
            place = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, start, shape, strict=True))
            yield chunk.file, Wanted(chunk.name, dtype_from_name(record.dtype), chunk.shape, inside, target[place])


def _finite(entry: Entry) -> bool:
    """Whether a loaded weight is finite; what else an optimizer keeps is not looked at."""
    if entry.key.startswith(OPTIMIZER) and not entry.key.startswith(f"{OPTIMIZER}main."):
        return True
    return not entry.tensor.is_floating_point() or all(bool(torch.isfinite(extreme)) for extreme in entry.tensor.aminmax())


def _mismatch(entry: Entry, manifest: Manifest, cast: bool) -> str | None:
    record = manifest.tensors.get(entry.key)
    if record is None:
        return f"{entry.key} is not in the checkpoint"
    if record.shape != entry.global_shape:
        return f"{entry.key} has shape {list(record.shape)} in the checkpoint, {list(entry.global_shape)} here"
    if not cast and record.dtype != dtype_name(entry.tensor.dtype):
        return f"{entry.key} is {record.dtype} in the checkpoint, {dtype_name(entry.tensor.dtype)} here"
    return None


def _raise_problems(path: Path, gathered: Sequence[Any], manifest: Manifest, complete: Sequence[str]) -> None:
    """One UserError, the same on every rank, that lists what does not fit."""
    problems: Mapping[str, None] = dict.fromkeys(problem for problems, _ in gathered for problem in problems)
    wanted = {key for _, keys in gathered for key in keys}
    unused = [key for key in manifest.tensors if _left_behind(key, wanted, complete)]
    lines = [*problems, *(f"{key} is in the checkpoint but has no place in this model" for key in unused)]
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(f"{path} does not fit this model: {'; '.join(lines[:_SHOWN])}{more}")


def _left_behind(key: str, wanted: set[str], complete: Sequence[str]) -> bool:
    return key not in wanted and not is_buffer(key) and any(key.startswith(prefix) for prefix in complete)
