"""Files that survive a crash: written, flushed to the disk, then moved into place by one rename.

A rename within a folder is atomic, so a reader sees the old file or the new one, never half of one. It is durable only after the
folder itself was flushed. A flush takes a file system about as long for one small file as for ten at the same time, so
writing and flushing are two steps. Unlike `utils.atomic` these raise plain OSErrors: a save puts its own sentence to them.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_llm.checkpoint.pieces import in_threads
from megatron_llm.utils.atomic import fsync_dir


def aside_of(path: Path) -> Path:
    """The hidden name beside `path` under which its next content is written."""
    return path.with_name(f".{path.name}.tmp")


def write_aside(path: Path, data: bytes) -> Path:
    """Write `data` under the hidden name, which is returned: for `flush` and then `replace_file`."""
    aside = aside_of(path)
    aside.write_bytes(data)
    return aside


def write_at_once(path: Path, data: bytes) -> None:
    """Write a file that other processes see whole or not at all. After a crash of the machine it may be neither."""
    os.replace(write_aside(path, data), path)


def flush(paths: Sequence[Path]) -> None:
    """Force files, and the entries of folders, to the disk: side by side, so that a file system can do it in one go."""
    for _ in in_threads(fsync_dir, paths):  # what flushes a folder flushes a file too
        pass


def replace_file(aside: Path, path: Path) -> None:
    """Move a flushed file over `path` in one step, durably."""
    os.replace(aside, path)
    fsync_dir(path.parent)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder; `target` must not exist (or be empty)."""
    os.rename(source, target)
    fsync_dir(target.parent)


def set_aside(folder: Path) -> Path:
    """Give a folder that is to be removed a name that says so, which is returned: half removed it cannot be taken for whole."""
    if folder.name.endswith(".deleted"):
        return folder
    doomed = folder.with_name(f"{folder.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    return doomed


def remove_folder(folder: Path) -> None:
    """Remove a folder, or what is left of it, once it is set aside."""
    shutil.rmtree(set_aside(folder))
