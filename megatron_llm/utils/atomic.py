"""Files and folders that appear whole or not at all.

Everything is written under a temporary name beside its place, forced to the disk, and renamed. A reader never sees a
half-written file, and a crash leaves at most a temporary name that the next run replaces.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_llm.utils.errors import UserError


def fsync_dir(path: str | Path) -> None:
    """Force a folder's entries to the disk (a rename is durable only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: str | Path) -> None:
    """Force every file and folder under `path`, and `path` itself, to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as stream:
                os.fsync(stream.fileno())
        fsync_dir(folder)


def write_error(path: str | Path, error: OSError) -> UserError:
    """What to tell the user when `path` cannot be written (full disk, no permission, read-only)."""
    return UserError(f"cannot write {path}: {error.strerror or error}; free space there or choose another place")


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents if need be; a UserError says why that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    return Path(path)


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears at `path`, replacing what is there, when the block ends without an exception.

    `mode` is "wb", or "w" for UTF-8 text with \\n line ends. The parent folder is created. On an exception the temporary
    file is removed and `path` is as it was; failures of the disk become a UserError.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode {mode!r}: atomic_file writes 'w' or 'wb'")
    target = Path(path)
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    text = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    try:
        with open(temporary, mode, **text) as stream:  # type: ignore[call-overload]
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        fsync_dir(target.parent)
    except OSError as error:
        if not _concerns(error, target.parent):
            raise
        raise write_error(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path, "w") as stream:
        stream.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically: indented, keys in the order given, non-ASCII text kept readable."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder that appears at `path` when the block ends without an exception.

    Yields a temporary folder beside `path` (`<name>.tmp`, emptied first when a crash left one). A folder already at
    `path` is replaced: it is gone only once the new one is whole. On an exception the temporary folder is removed.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    try:
        _remove(temporary)
        temporary.mkdir()
        yield temporary
        fsync_tree(temporary)
        _remove(old)
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
        fsync_dir(target.parent)
        _remove(old)
    except OSError as error:
        if not _concerns(error, target.parent):
            raise
        raise write_error(target, error) from error
    finally:
        _remove(temporary)


def _concerns(error: OSError, folder: Path) -> bool:
    # The block under `with` may fail on files of its own; only a failed write (which names no file) or a name in the
    # folder written to is about the target.
    if error.filename is None:
        return error.errno is not None
    return os.path.abspath(os.fsdecode(error.filename)).startswith(os.path.abspath(folder) + os.sep)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
