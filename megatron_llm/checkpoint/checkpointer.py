"""`Checkpointer`: saving from a training loop, in the foreground or in the background.

Both ways take the same road (`save.write_rank`, then `save.commit`); in the background a thread walks it over a copy of
the tensors. The thread makes that copy too, while the training computes its next gradients, which changes no weight and
no optimizer state; before the update that does, `settle` waits for what is left of the copy. Collectives are only ever
called from the caller's thread: at the start of a save and in `wait`.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import torch

from megatron_llm import __version__
from megatron_llm.checkpoint.assemble import WeightCollector
from megatron_llm.checkpoint.contents import FileContents, adapter_files, hf_files, sharded_files
from megatron_llm.checkpoint.durable import remove_folder
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.exchange import agree, attempt, describe_error, share_json
from megatron_llm.checkpoint.manifest import OPTIMIZER, Manifest, plain_json
from megatron_llm.checkpoint.retention import Retention, apply_retention, complete_checkpoints
from megatron_llm.checkpoint.save import Attempt, Commit, abandon, commit, prepare, write_rank
from megatron_llm.checkpoint.staging import Staging, copy_entries
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.utils.errors import UserError

_VISIBILITY_SECONDS = 60.0  # how long a file that another machine has written may take to appear on a shared file system
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # as peft names it


class _Job:
    """One save of this rank: its copy and its write; on rank 0 then the commit and the removal of older ones; and the errors.

    `files` gives what is to be written, out of memory that nobody changes. `seal` is rank 0's; it leaves in `doomed` the
    folders that are to be removed.
    """

    def __init__(
        self,
        task: Attempt,
        rank: int,
        files: Callable[[], Sequence[FileContents]],
        seal: Callable[["_Job"], None] | None,
    ) -> None:
        self.task = task
        self.cancel = Event()
        self.deadline: float | None = None
        self.write_error: Exception | None = None
        self.seal_error: Exception | None = None
        self.tidy_error: Exception | None = None
        self._copied, self._written, self._sealed = Event(), Event(), Event()
        self._rank, self._files = rank, files
        self._seal = seal
        self.doomed: list[Path] = []
        self._thread: Thread | None = None

    def write(self) -> None:
        """Write this rank's files; the error is kept."""
        files, self.write_error = attempt(self._files)
        self._copied.set()
        if files is not None:
            _, self.write_error = attempt(lambda: write_rank(self.task, self._rank, files))
        self._written.set()

    def seal(self) -> None:
        """Rank 0: commit; the error is kept. Nothing on the other ranks."""
        seal = self._seal
        if seal is not None:
            _, self.seal_error = attempt(lambda: seal(self))
        self._sealed.set()

    def tidy(self) -> None:
        """After the commit: remove the folders set aside; the error is kept."""
        try:
            for folder in self.doomed:
                remove_folder(folder)
        except OSError as error:
            self.tidy_error = _cannot_remove(self.task.step, error)

    def start(self) -> None:
        """Do all three on a thread. It does not keep a dying process alive: what it leaves is only a `.tmp`."""
        self._start(self._run)

    def start_tidying(self) -> None:
        """Do the last one on a thread: a file system may take its time to free the space of large files."""
        if self.doomed:
            self._start(self.tidy)

    def _start(self, work: Callable[[], None]) -> None:
        self._thread = Thread(target=work, name=f"save-step-{self.task.step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.write()
        if self.write_error is None:
            self.seal()
            if self.seal_error is None:
                self.tidy()

    @property
    def error(self) -> Exception | None:
        """What has gone wrong so far."""
        return self.write_error or self.seal_error or self.tidy_error

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way here."""
        return self._sealed.is_set() and (self._thread is None or not self._thread.is_alive())

    def join_copy(self) -> None:
        """Wait until the tensors that were to be saved are no longer looked at."""
        self._copied.wait()

    def join_write(self) -> None:
        """Wait for this rank's write."""
        self._written.wait()

    def join_seal(self) -> None:
        """All ranks have written: wait for the commit, or do it here when there is no thread."""
        self.deadline = time.monotonic() + _VISIBILITY_SECONDS
        if self._thread is None:
            self.seal()
        else:
            self._sealed.wait()

    def join(self) -> None:
        """Wait for all that is under way."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """A rank failed: end the commit and remove what was written."""
        self.cancel.set()
        self.join()
        if self._seal is not None:
            abandon(self.task)

    def timed_out(self) -> bool:
        """Whether a file that was reported as written has not appeared in time."""
        return self.deadline is not None and time.monotonic() > self.deadline


class Checkpointer:
    """Saves checkpoints of one run under `root` and removes those its retention policy does not keep.

    With `async_save` a save returns at once. The tensors of its entries must stay as they are until `settle` has returned,
    which waits until they are copied to host memory. The outcome, good or bad, is told by the next `save` or `wait` on all
    ranks alike. Older checkpoints that do not stay lose their names before a save is done, and their files in the background.
    All methods but `settle` are collective over `groups.world`. Call `wait` before leaving. `report` receives one line for
    each checkpoint removed (rank 0).

    `form` "sharded": each rank writes the rectangles it owns to one file. "hf": each checkpoint is a folder that
    transformers opens as it is; the weights are put together on the ranks that write them (`assemble`), which takes
    host memory of the size of what a rank writes. "adapter": rank 0 joins the weights, which are few, to one file.
    """

    def __init__(
        self,
        root: Path | str,
        groups: ParallelGroups,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: bool = True,
        async_save: bool = False,
        form: Literal["sharded", "hf", "adapter"] = "sharded",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.root = Path(root)
        self._form = form
        self._collector = WeightCollector(groups) if form == "hf" else None
        self._groups = groups
        self._retention = Retention(keep_last, keep_every, keep_best)
        self._async = async_save
        self._report = report
        self._staging = Staging(pinned=groups.device.type == "cuda")
        self._job: _Job | None = None
        self._known: dict[Path, Manifest] = {}
        self._sequence: int | None = None

    def save(
        self,
        step: int,
        entries: Sequence[Entry],
        state: Mapping[str, Any],
        validation_loss: float | None = None,
        tokenizer_folder: Path | str | None = None,
        documents: Mapping[str, Any] | None = None,
        contract: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save `entries` of every rank and rank 0's `state` as step `step`; returns the checkpoint's folder.

        `state` is plain JSON, copied before this returns. The keys `config` (the RunConfig as a dictionary) and
        `tokenizer_fingerprint` also fill the manifest's family, vocabulary size and fingerprint. `tokenizer_folder` (or file) is
        copied into the checkpoint. `documents` are JSON files by name to write beside the weights, `contract` goes into the
        manifest (both rank 0's). UserError on every rank when any rank cannot write; what was saved before is then untouched.
        With `async_save` that error may be about the save before this one, which then has not begun.
        """
        self.wait()
        files = self._files(entries)

        def head() -> Manifest:
            return copy.deepcopy(replace(self._head(step, state, validation_loss), contract=plain_json(contract or {})))

        task, seal = self._begin(step, head, tokenizer_folder, copy.deepcopy(dict(documents or {})))
        job = _Job(task, self._groups.world.rank, files, seal)
        if self._async:
            job.start()
        else:
            job.write()
            self._agree_on_write(job)
            self._agree_on_seal(job)
            job.start_tidying()
        self._job = job
        return task.final

    def reserve(self, entries: Sequence[Entry]) -> None:
        """Get the host memory for background saves of these entries now, so that the first one waits for its copy alone.

        Nothing when saves are not in the background, and while one is under way.
        """
        if self._async and self._job is None:
            self._staging.reserve(self._planned(entries))

    def settle(self) -> None:
        """Return when the tensors of the last `save` may change: at once, or when the copy of them is made. Not collective."""
        if self._job is not None:
            self._job.join_copy()

    def _files(self, entries: Sequence[Entry]) -> Callable[[], list[FileContents]]:
        """What this rank writes to which file; with `async_save` calling it makes the copy that training does not touch."""
        planned = self._planned(entries)
        staged = self._staging.reserve(planned) if self._async else None
        if self._collector is not None:
            places = {entry.key: entry.tensor for file in staged or () for entry in file.entries}
            weights = self._collector.collect(_parted(entries)[0], places if staged is not None else None)
            whole = {entry.key: entry for entry in weights}
            planned = [replace(file, entries=[whole.get(entry.key, entry) for entry in file.entries]) for file in planned]
        if staged is None:
            return lambda: planned
        if self._groups.device.type != "cpu":  # its transfers come in the order of its work, and are short
            copy_entries(planned, staged)
            return lambda: staged

        def copied() -> list[FileContents]:
            copy_entries(planned, staged)
            return staged

        return copied

    def _planned(self, entries: Sequence[Entry]) -> list[FileContents]:
        """The files of this rank. In the Hugging Face form whole weights have a place in them, but no values yet."""
        rank = self._groups.world.rank
        if self._collector is None:
            return adapter_files(rank, entries) if self._form == "adapter" else sharded_files(rank, entries)
        weights, rest = _parted(entries)
        share = self._collector.share(weights)
        blank = [
            Entry(whole.key, whole.shape, (0,) * len(whole.shape), torch.empty(whole.shape, dtype=whole.dtype, device="meta"))
            for whole in share.tensors
        ]
        return hf_files(rank, blank, share.number, share.count, rest)

    def wait(self) -> None:
        """Wait until the save under way is complete on the disk; UserError on every rank when it failed."""
        job, self._job = self._job, None
        if job is None:
            return
        job.join_write()
        if not all(self._agree_on_write(job)):
            self._agree_on_seal(job)
            job.join()
            agree(job.tidy_error, _doing(job), self._groups)

    def _agree_on_write(self, job: _Job) -> list[bool]:
        """All ranks have written, or tell an error; for each rank whether it is done with all the rest as well."""
        ended = job.ended  # asked before the error, so that none can come between
        try:
            return agree(job.error, _doing(job), self._groups, also=ended)
        except Exception:
            job.stop()
            raise

    def _agree_on_seal(self, job: _Job) -> None:
        """Wait for the commit."""
        job.join_seal()
        agree(job.seal_error, _doing(job), self._groups)

    def _begin(
        self, step: int, head: Callable[[], Manifest], tokenizer: Path | str | None, documents: Mapping[str, Any]
    ) -> tuple[Attempt, Callable[[_Job], None] | None]:
        """Rank 0 makes the temporary folder; every rank learns the attempt, or that it failed."""
        source = Path(tokenizer) if tokenizer is not None else None

        def begin() -> Commit:
            if source is not None and not source.exists():
                raise UserError(f"the tokenizer {source} to be saved with the checkpoint does not exist")
            filled = head()
            started = prepare(self.root, step)
            joined = ADAPTER_WEIGHTS if self._form == "adapter" else None
            return Commit(started, self._groups.world.size, filled, source, documents, hf=self._form != "sharded", joined=joined)

        task, error = attempt(begin) if self._groups.world.rank == 0 else (None, None)
        told = [task.attempt.id if task else None, describe_error(error) if error else None]
        name, failure = share_json(told, self._groups)
        if error is not None:
            raise error
        if failure is not None:
            raise UserError(f"{self._groups.grid.describe(0)} failed while preparing to save step {step}: {failure}")
        return Attempt(self.root, step, name), self._sealing(task) if task else None

    def _head(self, step: int, state: Mapping[str, Any], validation_loss: float | None) -> Manifest:
        config = state.get("config", {}).get("model", {})
        return Manifest(
            step=step,
            sequence=0,
            tensors={},
            files={},
            state=plain_json(state),
            layout=self._groups.grid.axes,
            family=config.get("model"),
            vocab_size=config.get("vocab_size"),
            tokenizer_fingerprint=state.get("tokenizer_fingerprint"),
            validation_loss=validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None,
            versions={"megatron_llm": __version__, "torch": torch.__version__},
        )

    def _sealing(self, task: Commit) -> Callable[[_Job], None]:
        """What rank 0 does after its write: number and commit the checkpoint, then choose which ones stay."""

        def seal(job: _Job) -> None:
            if self._sequence is None:
                self._known = complete_checkpoints(self.root)
                self._sequence = max((manifest.sequence for manifest in self._known.values()), default=0)
            self._sequence += 1
            manifest = commit(replace(task, head=replace(task.head, sequence=self._sequence)), job.cancel, job.timed_out)
            self._known[job.task.final] = manifest
            job.doomed = self._set_aside(job.task.step)

        return seal

    def _set_aside(self, step: int) -> list[Path]:
        """Older checkpoints that are not to stay lose their names; the folders to remove."""
        try:
            removed, doomed = apply_retention(self.root, self._retention, self._known)
        except OSError as error:
            raise _cannot_remove(step, error) from error
        for path in removed:
            if self._report is not None:
                self._report(f"removed checkpoint {path.name}: not among those to keep")
        return doomed


def _cannot_remove(step: int, error: OSError) -> UserError:
    return UserError(f"step {step} is saved, but an older checkpoint cannot be removed: {error}")


def _doing(job: _Job) -> str:
    return f"saving step {job.task.step}"


def _parted(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Weights, and what only a training needs."""
    weights = [entry for entry in entries if not entry.key.startswith(OPTIMIZER)]
    return weights, [entry for entry in entries if entry.key.startswith(OPTIMIZER)]
