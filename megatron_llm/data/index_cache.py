"""The cache of index arrays: built once per file system, by whichever process gets there first, and memory-mapped by all.

One entry is one folder, `<label>-<key>/`, holding the arrays as .npy files and `description.json`: what they were built
from, and their shapes. The key is a digest of that description, so that an entry can only be found by who would build
the same. An entry is filled under a temporary name and appears by one rename: a folder under its final name is whole.

A lock keeps others from building the same thing at the same time. It only saves work: where a file system has no locks,
or keeps them to one machine, several processes build and the first rename wins. The kernel drops the lock of a process
that dies, so a killed builder blocks nobody; what it leaves under its temporary name is removed by the next builder.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.utils.atomic import fsync_dir, fsync_tree, make_folder, write_error
from megatron_llm.utils.errors import UserError

DESCRIPTION = "description.json"
WHOLE_DIGEST_BYTES = 64 << 20
DIGEST_BLOCKS = 256
DIGEST_BLOCK_BYTES = 1 << 16
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # any other errno of flock: this file system has no locks
_THERE = (errno.EEXIST, errno.ENOTEMPTY)

WRITERS = 2  # threads

# What a builder gives: arrays and their names, each as soon as it is built, so that it is written while the next is built.
Arrays = Iterable[tuple[str, NDArray[Any]]]


class MappedArrays(Mapping[str, NDArray[Any]]):
    """The arrays of an entry, memory-mapped read-only. Pickling keeps the folder's name only; the copy maps them again."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            shapes = json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))["arrays"]
            self._arrays = {name: np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r")) for name in shapes}
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(str(error)) from error
        for name, array in self._arrays.items():
            if [str(array.dtype), *array.shape] != shapes[name]:
                raise self._damaged(f"{name} is {array.dtype} {list(array.shape)}, expected {shapes[name]}")

    def _damaged(self, why: str) -> UserError:
        return UserError(f"the index cache {self.folder} is damaged ({why}): delete that folder, it is built again")

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[type["MappedArrays"], tuple[Path]]:
        return MappedArrays, (self.folder,)


@dataclass(frozen=True)
class IndexCache:
    """A folder of entries.

    `timeout` is how many seconds to wait for another process that builds; `say` receives one line before a build and
    before a wait.
    """

    folder: Path
    timeout: float = 3600.0
    say: Callable[[str], None] = print

    def entry(self, label: str, description: Mapping[str, Any]) -> Path:
        """The folder of the entry for this description; `label` only makes the name readable."""
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{re.sub('[^A-Za-z0-9._-]', '_', label)}-{key}"

    def get(self, label: str, description: Mapping[str, Any], build: Callable[[], Arrays]) -> MappedArrays:
        """The arrays of the entry, built by this process or by another one if they are not there yet.

        `description` (JSON values) must hold everything the arrays depend on. UserError: the folder cannot be written,
        or whoever builds took longer than `timeout`.
        """
        entry = self.entry(label, description)
        if entry.is_dir():
            return MappedArrays(entry)
        make_folder(self.folder)
        start, told = time.monotonic(), False
        while not entry.is_dir():
            with _try_lock(Path(f"{entry}.lock")) as holder:
                if holder is None:
                    if not entry.is_dir():
                        self._build(entry, label, description, build)
                    break
            if not told:
                self.say(f"waiting for the index of {label}: {holder} builds it in {entry}")
                told = True
            if time.monotonic() - start > self.timeout:
                raise UserError(
                    f"waited {self.timeout:.0f} s for {holder} to build the index {entry}: see whether that process still works;"
                    " tools/build_index.py builds it ahead of time"
                )
            time.sleep(0.1)
        return MappedArrays(entry)

    def _build(self, entry: Path, label: str, description: Mapping[str, Any], build: Callable[[], Arrays]) -> None:
        self.say(f"building the index of {label} in {entry}")
        _remove_leftovers(entry)
        host, pid = socket.gethostname(), os.getpid()
        temporary = Path(f"{entry}.{host}.{pid}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir()
            shapes = _write(temporary, build())
            text = json.dumps({"arrays": shapes, "built_from": dict(description)}, indent=2)
            (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
            fsync_tree(temporary)
            os.rename(temporary, entry)
            fsync_dir(self.folder)
        except OSError as error:
            # Where locks do not reach, another process may have put the same entry there meanwhile: that one is as good.
            if error.errno not in _THERE and not entry.is_dir():
                raise write_error(temporary, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, arrays: Arrays) -> dict[str, list[Any]]:
    """Write the arrays to `<name>.npy` each, in the background; gives their dtypes and shapes."""
    shapes: dict[str, list[Any]] = {}
    with ThreadPoolExecutor(WRITERS) as pool:
        writes = []
        for name, array in arrays:
            shapes[name] = [str(array.dtype), *array.shape]
            writes.append(pool.submit(_write_array, folder / f"{name}.npy", array))
        for write in writes:
            write.result()
    return shapes


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with open(path, "wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _try_lock(path: Path) -> Iterator[str | None]:
    """Yield None holding the lock, or who holds it ("process 12 on host"). Without locks in the file system: None."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    with os.fdopen(descriptor, "r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                yield _holder(stream)
                return
        else:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
        yield None
        # Reached only when the entry is there, so whoever still opens or holds the old lock file finds nothing to do.
        path.unlink(missing_ok=True)


def _holder(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read().strip() or "another process"


def _remove_leftovers(entry: Path) -> None:
    """Remove what builders of this entry left on this machine when they were killed."""
    host = re.escape(socket.gethostname())
    pattern = re.compile(re.escape(entry.name) + rf"\.{host}\.(\d+)\.[0-9a-f]+\.tmp")
    for path in entry.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def file_digest(path: str | Path) -> dict[str, Any]:
    """What identifies a file's content, for a description: size and SHA-256.

    Above 64 MiB the digest is of 256 blocks spread evenly over the file, and the time of its last change is added.
    """
    with open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        digest = hashlib.sha256()
        if status.st_size <= WHOLE_DIGEST_BYTES:
            digest.update(stream.read())
            return {"size": status.st_size, "sha256": digest.hexdigest()}
        for block in range(DIGEST_BLOCKS):
            stream.seek((status.st_size - DIGEST_BLOCK_BYTES) * block // (DIGEST_BLOCKS - 1))
            digest.update(stream.read(DIGEST_BLOCK_BYTES))
    return {"size": status.st_size, "sha256_of_blocks": digest.hexdigest(), "changed_ns": status.st_mtime_ns}
