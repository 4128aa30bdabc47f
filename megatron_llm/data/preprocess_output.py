"""The output side of preprocessing: a work folder beside the output that survives a kill, and its way into place.

`<prefix>.partial/` holds a writer's files for each key, the journal and a lock. It is there from the first document to
the moment the finished files have been moved to their names; what has the final names is always whole.
"""

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_llm.data.encoder import EncodedTexts
from megatron_llm.data.indexed_writer import IndexedWriter, Marks, publish
from megatron_llm.data.journal import Counts, Entry, Journal, input_fingerprints
from megatron_llm.data.sidecar import Sidecar, write_sidecar
from megatron_llm.data.sources import InputFile, Position
from megatron_llm.utils.atomic import fsync_dir, make_folder, write_error
from megatron_llm.utils.errors import UserError


class WorkFolder:
    """Writers, journal and lock of one run. Use as a context manager, which closes but keeps everything.

    `names` gives the output prefix of each key, `settings` the fingerprint of everything that decides the output but the
    input files. After construction `entry` is where to go on from, None at the beginning.
    """

    def __init__(self, prefix: str, names: Mapping[str, str], vocab_size: int, settings: str, files: Sequence[InputFile]) -> None:
        self.path = Path(f"{prefix}.partial")
        self.stale = False
        self._names = dict(names)
        self._vocab_size = vocab_size
        self._inputs = input_fingerprints(files)
        self._files = files
        make_folder(self.path)
        self._lock = self._take_lock()
        self._journal = Journal(self.path / "journal.jsonl", settings)
        self.entry = self._journal.last_entry(files)
        self.stale = self.entry is None and (self.path / "journal.jsonl").exists()
        self._journal.begin(self.entry)
        self._writers: dict[str, IndexedWriter] = {}
        if self.entry is None or not self.entry.finished:
            marks = self.entry.marks if self.entry else {}
            for number, key in enumerate(names):
                self._writers[key] = IndexedWriter(self._work(number), vocab_size, marks.get(key, Marks()))

    def _work(self, number: int) -> Path:
        # Numbers, since keys may be no file names.
        return self.path / f"key{number}"

    def _take_lock(self) -> int:
        path = self.path / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {self.path}: wait for it, or choose another --output-prefix") from None
        except OSError as error:
            raise write_error(path, error) from error
        return descriptor

    @property
    def marks(self) -> dict[str, Marks]:
        """How much has been written for each key."""
        return {key: writer.marks for key, writer in self._writers.items()}

    def add(self, texts: Mapping[str, EncodedTexts]) -> None:
        """Append the documents of a block."""
        for key, encoded in texts.items():
            self._writers[key].add(encoded.ids, encoded.lengths, encoded.sequences)

    def commit(self, file: int, position: Position, consumed: int, counts: Counts) -> None:
        """Make everything added so far a point to go on from."""
        self._add_entry(file, position, consumed, counts, finished=False)

    def finish(self, consumed: int, counts: Counts, sidecars: Mapping[str, Sidecar]) -> None:
        """Write the indices and sidecars, move everything to its final name, remove the folder."""
        for number, (key, writer) in enumerate(self._writers.items()):
            writer.finish()
            write_sidecar(self._work(number), sidecars[key])
        self._add_entry(len(self._files) - 1, Position(), consumed, counts, finished=True)
        self.publish()

    def publish(self) -> None:
        """Move finished files to their final names (those an earlier run has not moved) and remove the folder."""
        for number, prefix in enumerate(self._names.values()):
            publish(self._work(number), prefix)
        self.remove()

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        self.close()
        try:
            shutil.rmtree(self.path)
            fsync_dir(self.path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error

    def _add_entry(self, file: int, position: Position, consumed: int, counts: Counts, finished: bool) -> None:
        marks = {key: writer.marks if finished else writer.flush() for key, writer in self._writers.items()}
        self._journal.add(Entry(file, position, self._inputs[file], consumed, marks, counts, finished))

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()
        self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
