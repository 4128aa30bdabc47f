"""Files that survive a crash: written, flushed to the disk, then moved into place by one rename.

A rename within a folder is atomic, so a reader sees the old file or the new one, never half of one. It is durable only after the
folder itself was flushed. Unlike `utils.atomic` these raise plain OSErrors: a save puts its own sentence to them.
"""

import os
import shutil
from pathlib import Path

from megatron_llm.utils.atomic import fsync_dir


def write_aside(path: Path, data: bytes) -> Path:
    """Write `data` to a hidden file beside `path`, flushed to the disk, for `replace_file` to move into place."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return aside


def replace_file(aside: Path, path: Path) -> None:
    """Move a file over `path` in one step, durably."""
    os.replace(aside, path)
    fsync_dir(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds either its old content or all of `data`, whenever the machine stops."""
    replace_file(write_aside(path, data), path)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder; `target` must not exist (or be empty)."""
    os.rename(source, target)
    fsync_dir(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, renaming it first so that a half-removed one cannot be taken for whole."""
    doomed = folder if folder.name.endswith(".deleted") else folder.with_name(f"{folder.name}.deleted")
    if doomed != folder:
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(folder, doomed)
    shutil.rmtree(doomed)
