"""The two halves of a save: each rank writes its files, then rank 0 seals the folder and renames it.

The ranks meet through the folder, not through collectives, so both halves also run on background threads:

    rank 0   makes step_N.tmp, before anybody writes                          (`prepare`)
    rank r   writes its tensors, then rank_r.json with their digests          (`write_rank`)
    rank 0   waits for every rank_r.json, checks that each tensor is covered exactly once, copies the tokenizer and
             writes the small files, the manifest, flushes the folder, renames it to step_N, then moves `latest`  (`commit`)

In the sharded form a rank writes one file, rank_r.safetensors. In the Hugging Face form it writes whole weights to a
file named as transformers names them, and what it holds of the optimizer to optimizer/rank_r.safetensors.

Every file of the checkpoint is flushed to the disk before the folder has its name. A crash at any instant leaves step_N.tmp,
which is never loaded, or step_N whole. `rank_r.json` carries the attempt's random id, so what an earlier, killed save
left behind cannot be mistaken for this one's.
"""

import errno
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

from megatron_llm.checkpoint.contents import METADATA, FileContents
from megatron_llm.checkpoint.durable import aside_of, flush, move_folder, remove_folder, replace_file, write_aside, write_at_once
from megatron_llm.checkpoint.hf_folder import INDEX, is_model_file, tokenizer_files
from megatron_llm.checkpoint.joined import join_weights
from megatron_llm.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    MANIFEST_DIGEST,
    REPLACED,
    TEMPORARY,
    TOKENIZER,
    Chunk,
    Manifest,
    TensorRecord,
    step_name,
    write_manifest,
)
from megatron_llm.checkpoint.tensor_file import FileSeal, TensorFileWriter, dtype_from_name, seal_bytes, seal_file, write_image
from megatron_llm.utils.errors import UserError

_POLL_SECONDS = 0.001, 0.05  # between the first looks for a record, and the last ones
_BUFFERS = 8  # pieces of memory of a save in the foreground: what the disk and the hashing are busy with, and the next ones
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Attempt:
    """One save: the root folder, the step, and a random id that tells this attempt's files from a former one's."""

    root: Path
    step: int
    id: str

    @property
    def temporary(self) -> Path:
        """The folder while the save is under way."""
        return self.root / (step_name(self.step) + TEMPORARY)

    @property
    def final(self) -> Path:
        """The folder once the checkpoint is complete."""
        return self.root / step_name(self.step)


def prepare(root: Path, step: int) -> Attempt:
    """Rank 0: make an empty temporary folder. UserError when the root cannot be written."""
    attempt = Attempt(root, step, secrets.token_hex(8))
    try:
        root.mkdir(parents=True, exist_ok=True)
        if attempt.temporary.exists():
            remove_folder(attempt.temporary)
        attempt.temporary.mkdir()
    except OSError as error:
        raise UserError(save_error(attempt, error)) from error
    return attempt


def save_error(attempt: Attempt, error: OSError) -> str:
    """The sentence for a save that the file system refused."""
    if error.errno in _DISK_FULL:
        existing = next(folder for folder in (attempt.root, *attempt.root.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        return (
            f"no space left to save step {attempt.step} in {attempt.root} ({free / 1e9:.1f} GB free): "
            "nothing of it was kept and earlier checkpoints are untouched; free space, lower --keep-last or change --save"
        )
    return f"cannot save step {attempt.step} in {attempt.root}: {error.strerror or error} ({error.filename or attempt.temporary})"


def write_rank(attempt: Attempt, rank: int, files: Sequence[FileContents]) -> None:
    """Write this rank's files and the record that vouches for them; UserError when the file system refuses."""
    try:
        _write_rank(attempt, rank, files)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not attempt.temporary.exists():
            raise UserError(
                f"{attempt.temporary}, made by rank 0, does not exist here: --save must be a folder that all machines share"
            ) from error
        raise UserError(save_error(attempt, error)) from error


def _write_rank(attempt: Attempt, rank: int, files: Sequence[FileContents]) -> None:
    tensors: dict[str, dict[str, Any]] = {}
    seals: dict[str, dict[str, Any]] = {}
    for file in files:
        seal = _write_file(attempt.temporary, file)
        file.enter(tensors)
        seals[file.name] = {"size": seal.size, "sha256": seal.sha256}
    record_data = {"attempt": attempt.id, "files": seals, "tensors": tensors}
    # Not flushed: it vouches to rank 0 for what is, and a crash of the machine ends the attempt whatever is in it.
    write_at_once(_record_path(attempt, rank), json.dumps(record_data).encode())


def _write_file(folder: Path, file: FileContents) -> FileSeal:
    path = folder / file.name
    if path.parent != folder:
        path.parent.mkdir(exist_ok=True)
    if file.image is not None:
        return write_image(path, file.image, file.layout.size)
    with TensorFileWriter(path, file.specs, METADATA, buffers=_BUFFERS) as writer:
        for entry, spec in zip(file.entries, file.specs, strict=True):
            writer.write(spec.name, entry.tensor)
        return writer.close()


def _record_path(attempt: Attempt, rank: int) -> Path:
    return attempt.temporary / f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class Commit:
    """What rank 0 needs to seal a save. `head` is the manifest without tensors and files.

    `documents` are JSON files beside the weights, by name. `hf`: the folder is one that transformers opens, so the
    tokenizer lies beside the weights and several weight files have an index. `joined` names a file that all weights are
    written to once more, whole.
    """

    attempt: Attempt
    world_size: int
    head: Manifest
    tokenizer: Path | None = None
    documents: Mapping[str, Any] = field(default_factory=dict)
    hf: bool = False
    joined: str | None = None


def commit(task: Commit, cancel: Event, give_up: Callable[[], bool]) -> Manifest:
    """Seal and rename the folder, move `latest`; returns the manifest. Rank 0 only, on any thread.

    `cancel` stops the waiting for the other ranks; so does `give_up`, asked while a record is missing. On any failure
    the temporary folder is removed and what was there before is as it was.
    """
    attempt = task.attempt
    try:
        records = [_await_record(attempt, rank, cancel, give_up) for rank in range(task.world_size)]
        manifest = replace(task.head, **_merge(records), saved_at=datetime.now(UTC).isoformat(timespec="seconds"))
        if task.joined is not None:
            manifest = join_weights(attempt.temporary, task.joined, manifest)
        small = _write_documents(task, manifest)
        if task.tokenizer is not None:
            target = attempt.temporary if task.hf else attempt.temporary / TOKENIZER
            small |= _copy_tokenizer(task.tokenizer, target, attempt.temporary)
        manifest = replace(manifest, files={**manifest.files, **small})
        for rank in range(task.world_size):
            _record_path(attempt, rank).unlink()
        write_manifest(attempt.temporary, Manifest.from_json(manifest.to_json()))
        aside = write_aside(attempt.root / LATEST, f"{attempt.final.name}\n".encode())  # what needs space comes before the renames
        folders = {(attempt.temporary / name).parent for name in (MANIFEST, *manifest.files)}
        flush([aside, *(attempt.temporary / name for name in (*small, MANIFEST, MANIFEST_DIGEST)), *sorted(folders)])
        _install(attempt, aside)
    except OSError as error:
        abandon(attempt)
        raise UserError(save_error(attempt, error)) from error
    except BaseException:
        abandon(attempt)
        raise
    return manifest


def abandon(attempt: Attempt) -> None:
    """Rank 0: remove what an unfinished attempt wrote; nothing when it is gone already."""
    aside_of(attempt.root / LATEST).unlink(missing_ok=True)
    if attempt.temporary.exists():
        remove_folder(attempt.temporary)


def _await_record(attempt: Attempt, rank: int, cancel: Event, give_up: Callable[[], bool]) -> dict[str, Any]:
    path, (pause, longest) = _record_path(attempt, rank), _POLL_SECONDS
    while True:
        asked_to_stop = cancel.is_set() or give_up()  # asked before the last look, so that a late file still counts
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_bytes())
            if record["attempt"] == attempt.id:
                return record
        if asked_to_stop:
            raise UserError(f"step {attempt.step} is not saved: the file of rank {rank} did not appear in {attempt.temporary}")
        time.sleep(pause)
        pause = min(1.5 * pause, longest)


def _merge(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`tensors` and `files` of the manifest from every rank's record; ValueError when ranks disagree about a tensor."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    chunks: dict[str, list[Chunk]] = {}
    files: dict[str, FileSeal] = {}
    for rank, record in enumerate(records):
        files.update({name: FileSeal(**seal) for name, seal in record["files"].items()})
        for key, tensor in record["tensors"].items():
            kind = (tensor["dtype"], tuple(tensor["shape"]))
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(f"rank {rank} holds {key} as {kind}, a rank before it as {kinds[key]}")
            chunks.setdefault(key, []).extend(Chunk(file, name, tuple(at), tuple(n)) for file, name, at, n in tensor["chunks"])
    tensors = {key: TensorRecord(dtype, shape, tuple(chunks[key])) for key, (dtype, shape) in kinds.items()}
    return {"tensors": tensors, "files": files}


def _write_documents(task: Commit, manifest: Manifest) -> dict[str, FileSeal]:
    """Write the JSON files and, where transformers needs one, the index of the weights; returns their seals."""
    documents = dict(task.documents)
    stored = {key: record for key, record in manifest.tensors.items() if all(is_model_file(chunk.file) for chunk in record.chunks)}
    places = {key: record.chunks[0].file for key, record in stored.items()}
    if task.hf and len(set(places.values())) > 1:
        total = sum(math.prod(record.shape) * dtype_from_name(record.dtype).itemsize for record in stored.values())
        documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    seals = {}
    for name, content in documents.items():
        data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        (task.attempt.temporary / name).write_bytes(data)
        seals[name] = seal_bytes(data)
    return seals


def _copy_tokenizer(source: Path, target: Path, folder: Path) -> dict[str, FileSeal]:
    """Copy a tokenizer's file, or the files of its folder, to `target` in the checkpoint `folder`; returns names and seals."""
    target.mkdir(exist_ok=True)
    seals = {}
    for path in tokenizer_files(source):
        shutil.copyfile(path, target / path.name)
        seals[str((target / path.name).relative_to(folder))] = seal_file(target / path.name)
    return seals


def _install(attempt: Attempt, aside: Path) -> None:
    """Give the finished folder its name, then point `latest` at it, whose content is `aside`."""
    replaced = attempt.root / (step_name(attempt.step) + REPLACED)
    if attempt.final.exists():  # the step was saved before: keep the old one until the new one has the name
        if replaced.exists():
            remove_folder(replaced)
        move_folder(attempt.final, replaced)
    move_folder(attempt.temporary, attempt.final)
    if replaced.exists():
        remove_folder(replaced)
    replace_file(aside, attempt.root / LATEST)
