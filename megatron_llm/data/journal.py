"""The journal of a preprocessing run: what has safely reached the disk, so that a killed run goes on from there.

One JSON object a line, appended and forced to the disk after the data it speaks of. The first line holds the
fingerprint of the settings; each further line is an entry. A line cut short by a crash counts as not written.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_llm.data.indexed_writer import Marks
from megatron_llm.data.sources import InputFile, Position
from megatron_llm.utils.atomic import write_error, write_text

_FORMAT = 1


@dataclass(frozen=True)
class Counts:
    """What has been done: documents and tokens written, empty texts and bad lines passed over (of all keys together)."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Entry:
    """A point at which everything before is on the disk.

    `file` is the number of the input file being read and `position` the place in it, `inputs` the fingerprint of the
    files up to and with it, `consumed` the bytes of all files read. `marks` says how far each key's writer is.
    `finished`: all input is read and the indices are written, only moving the files to their place is left.
    """

    file: int
    position: Position
    inputs: str
    consumed: int
    marks: dict[str, Marks]
    counts: Counts = field(default_factory=Counts)
    finished: bool = False


class Journal:
    """The journal file of a work folder, open for appending."""

    def __init__(self, path: Path, settings: str) -> None:
        self._path, self._settings = path, settings
        self._stream: IO[bytes] | None = None

    def last_entry(self, files: Sequence[InputFile]) -> Entry | None:
        """The newest entry whose settings and inputs are those of this run; None when there is nothing to go on from."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise write_error(self._path, error) from error
        values = [value for line in lines[:-1] if (value := _parse(line)) is not None]
        if not values or values[0] != self._header():
            return None
        known = input_fingerprints(files)
        for value in reversed(values[1:]):
            entry = _entry(value)
            if entry.file < len(files) and entry.inputs == known[entry.file] and (not entry.finished or entry.file == len(files) - 1):
                return entry
        return None

    def begin(self, entry: Entry | None) -> None:
        """Start the journal anew (atomically), with the entry to go on from if there is one."""
        values = [self._header()] + ([asdict(entry)] if entry is not None else [])
        write_text(self._path, "".join(json.dumps(value) + "\n" for value in values))
        try:
            self._stream = open(self._path, "ab")  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise write_error(self._path, error) from error

    def add(self, entry: Entry) -> None:
        """Append an entry; what it speaks of must be on the disk already."""
        assert self._stream is not None
        try:
            self._stream.write(json.dumps(asdict(entry)).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        """Close the file, which stays."""
        if self._stream is not None:
            self._stream.close()

    def _header(self) -> dict[str, Any]:
        return {"journal": _FORMAT, "settings": self._settings}


def input_fingerprints(files: Sequence[InputFile]) -> list[str]:
    """For each file a hash of it and all files before it: name, size and time of change."""
    digest = hashlib.sha256()
    fingerprints = []
    for file in files:
        digest.update(f"{os.path.realpath(file.path)}\0{file.size}\0{file.mtime_ns}\0".encode())
        fingerprints.append(digest.hexdigest())
    return fingerprints


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _entry(value: dict[str, Any]) -> Entry:
    marks = {key: Marks(**mark) for key, mark in value["marks"].items()}
    return Entry(
        value["file"],
        Position(**value["position"]),
        value["inputs"],
        value["consumed"],
        marks,
        Counts(**value["counts"]),
        value["finished"],
    )
