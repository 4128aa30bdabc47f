"""Finding the newest complete checkpoint, and telling which were passed over and why.

A checkpoint is complete when its folder has its final name, its manifest matches its digest, and every file has the
size and digest the manifest says. Digests are spread over the ranks; rank 0 decides and all ranks hear the same answer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_llm.checkpoint.exchange import agree, attempt, gather_json, share_json
from megatron_llm.checkpoint.hf_folder import list_tensors, read_hf_config
from megatron_llm.checkpoint.hf_manifest import is_foreign
from megatron_llm.checkpoint.manifest import (
    DELETED,
    MANIFEST,
    TEMPORARY,
    DamagedCheckpoint,
    DamagedContents,
    Manifest,
    parse_step,
    read_manifest,
)
from megatron_llm.checkpoint.tensor_file import seal_file
from megatron_llm.parallel.groups import ParallelGroups, single_process_groups
from megatron_llm.utils.errors import UserError

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint folder: its manifest, or what is wrong with it as far as one can see without reading its tensors."""

    path: Path
    manifest: Manifest | None
    problem: str | None
    unfinished: bool = False


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is itself a checkpoint of ours (as opposed to a folder of checkpoints)."""
    return path.is_dir() and ((path / MANIFEST).exists() or parse_step(path.name) is not None)


def list_checkpoints(root: Path) -> list[Candidate]:
    """Every checkpoint folder under `root`, newest first: the order in which they were saved, not their steps.

    (After going back to step 100 and training on, a step 150 saved today is newer than a step 300 saved yesterday.)
    Damaged and unfinished ones come first.
    """
    found = []
    for path in sorted(root.iterdir(), reverse=True):
        named = parse_step(path.name)
        if named is None or named[1] == DELETED or not path.is_dir():
            continue
        if named[1] == TEMPORARY:
            found.append(Candidate(path, None, "its save was not finished", unfinished=True))
            continue
        found.append(_candidate(path))
    return sorted(found, key=lambda candidate: -candidate.manifest.sequence if candidate.manifest else -math.inf)


def quick_check(path: Path) -> Manifest:
    """The manifest of a checkpoint after checking it and the sizes of all files; DamagedCheckpoint otherwise."""
    manifest = read_manifest(path)
    for name, seal in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(path, f"{name} is missing")
        if file.stat().st_size != seal.size:
            raise DamagedCheckpoint(path, f"{name} has {file.stat().st_size} bytes, the manifest says {seal.size}")
    return manifest


def digest_problems(path: Path, manifest: Manifest, rank: int = 0, ranks: int = 1, *, tensors: bool = True) -> list[str]:
    """Read every `ranks`-th file, from number `rank` on, and return a sentence for each that is not what was written.

    `tensors=False` leaves out the files that hold tensors, for a caller that verifies these while it loads them.
    """
    held = {chunk.file for record in manifest.tensors.values() for chunk in record.chunks}
    names = [name for name in sorted(manifest.files) if tensors or name not in held]
    problems = []
    for name in names[rank::ranks]:
        try:
            seal = seal_file(path / name)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if seal != manifest.files[name]:
            problems.append(f"{name} does not match its digest: the file was changed or damaged after it was written")
    return problems


def find_latest(root: Path | str, report: Callable[[str], None] = print) -> Path | None:
    """`choose_checkpoint` for a single process."""
    return choose_checkpoint(root, single_process_groups(), report)


def choose_checkpoint(
    path: Path | str,
    groups: ParallelGroups,
    report: Callable[[str], None] = print,
    *,
    tensors: bool = True,
    damaged: Mapping[Path, str] | None = None,
) -> Path | None:
    """The checkpoint to load: `path` itself when it is one, otherwise the newest complete one under it. Collective.

    None when the folder is absent or holds no finished checkpoint. UserError (on every rank) when `path` itself is
    damaged, or when there are finished checkpoints and all are damaged: starting afresh would hide that. `report`
    receives, on rank 0, one line saying which was skipped and why, and which is taken.

    `tensors=False` leaves out the digests of tensors: for a caller that verifies what it loads, see `load_newest`. `damaged` are
    those that are known to be, and why.
    """
    path, known = Path(path), dict(damaged or {})
    candidates: list[Candidate] = []
    error: Exception | None = None
    if groups.world.rank == 0:
        found, error = attempt(lambda: _candidates(path))
        candidates = [replace(one, manifest=None, problem=known[one.path]) if one.path in known else one for one in found or []]
    agree(error, f"looking for a checkpoint in {path}", groups)
    unfinished: list[str] = []
    broken: list[str] = []
    queue = iter(candidates)
    while True:
        candidate = next(queue, None)
        while candidate is not None and candidate.manifest is None:
            (unfinished if candidate.unfinished else broken).append(f"{candidate.path.name} ({candidate.problem})")
            candidate = next(queue, None)
        chosen: str | None = share_json(str(candidate.path) if candidate else None, groups)
        if chosen is None:
            break
        problems = _verify_together(Path(chosen), groups, tensors=tensors)
        if not problems:
            _tell(report if groups.world.rank == 0 else None, unfinished + broken, Path(chosen))
            return Path(chosen)
        broken.append(f"{Path(chosen).name} ({problems[0]})")
    return _none_left(path, unfinished, broken, groups, report)


def load_newest(
    path: Path | str,
    groups: ParallelGroups,
    load: Callable[[Path], Loaded],
    report: Callable[[str], None] = print,
    *,
    foreign: bool = False,
) -> Loaded | None:
    """Choose a checkpoint and `load` it; where that finds it damaged (DamagedContents), the next one. Collective.

    So a checkpoint is read once, not once to verify it and once more to load it. What `load` returns; None, and errors,
    as for `choose_checkpoint`. `foreign`: a Hugging Face folder will do as well, as for `choose_source`.
    """
    damaged: dict[Path, str] = {}
    while True:
        chosen = (_choose_foreign(Path(path), groups, report) if foreign else None) or choose_checkpoint(
            path, groups, report, tensors=False, damaged=damaged
        )
        if chosen is None:
            return None
        try:
            return load(chosen)
        except DamagedContents as error:
            if chosen in damaged or is_foreign(chosen):
                raise
            damaged[chosen] = error.reason


def choose_source(path: Path | str, groups: ParallelGroups, report: Callable[[str], None] = print) -> Path | None:
    """Like `choose_checkpoint`, and also takes a Hugging Face folder (`hf_manifest.is_foreign`), whose line says so. Collective.

    A folder that holds checkpoints is taken for that, whatever else lies in it.
    """
    return _choose_foreign(Path(path), groups, report) or choose_checkpoint(path, groups, report)


def _choose_foreign(path: Path, groups: ParallelGroups, report: Callable[[str], None]) -> Path | None:
    """`path` when it is a Hugging Face folder, with its line."""
    line, error = attempt(lambda: _foreign_line(path)) if groups.world.rank == 0 else (None, None)
    agree(error, f"looking for weights in {path}", groups)
    line = share_json(line, groups)
    if line is None:
        return None
    if groups.world.rank == 0:
        report(line)
    return path


def _foreign_line(path: Path) -> str | None:
    """What there is to say of a Hugging Face folder; None when it is not one."""
    if not is_foreign(path) or any(parse_step(child.name) for child in path.iterdir()):
        return None
    hf = read_hf_config(path)
    tensors = list_tensors(path)
    kind = ", ".join(map(str, hf.get("architectures") or [hf.get("model_type")]))
    dtypes = "/".join(sorted({tensor.dtype for tensor in tensors.values()}))
    files = len({tensor.file for tensor in tensors.values()})
    return f"Hugging Face folder: loading {path} ({kind}, {dtypes}, {files} file{'s' if files > 1 else ''})"


def _candidates(path: Path) -> list[Candidate]:
    if not path.exists():
        return []
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a checkpoint's folder, or a folder of checkpoints")
    if not is_checkpoint(path):
        try:
            return list_checkpoints(path)
        except OSError as error:
            raise UserError(f"cannot look for checkpoints in {path}: {error.strerror or error}") from error
    named = parse_step(path.name)
    if named and named[1] == TEMPORARY:
        raise UserError(f"{path} is an unfinished save and cannot be loaded: load {path.parent} to take the newest complete one")
    return [_candidate(path)]


def _candidate(path: Path) -> Candidate:
    try:
        return Candidate(path, quick_check(path), None)
    except DamagedCheckpoint as error:
        return Candidate(path, None, error.reason)


def _verify_together(path: Path, groups: ParallelGroups, *, tensors: bool) -> list[str]:
    """Digests of a checkpoint's files, with or without those that hold tensors, spread over the ranks; every rank gets all problems."""

    def verify() -> list[str]:
        return digest_problems(path, read_manifest(path), groups.world.rank, groups.world.size, tensors=tensors)

    problems, error = attempt(verify)
    if error is not None:
        visible = path.exists()
        problems = [str(error) if visible else f"{groups.describe()} does not see the folder: it must be shared by all machines"]
    gathered: list[Any] = gather_json(problems, groups)
    return [problem for rank_problems in gathered for problem in rank_problems]


def _tell(report: Callable[[str], None] | None, passed_over: list[str], chosen: Path) -> None:
    if report is not None:
        skipped = f"skipped {', '.join(passed_over)}; " if passed_over else ""
        report(f"checkpoint: {skipped}loading {chosen}")


def _none_left(path: Path, skipped: list[str], damaged: list[str], groups: ParallelGroups, report: Callable[[str], None]) -> Path | None:
    damaged = share_json(damaged, groups)
    if damaged:
        raise UserError(
            f"no complete checkpoint in {path}: {'; '.join(damaged)}; take another folder, or move this one away to start afresh"
        )
    if groups.world.rank == 0 and skipped:
        report(f"checkpoint: skipped {', '.join(skipped)}; there is no complete one in {path}")
    return None
