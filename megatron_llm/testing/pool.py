"""A pool of warm processes for tests that need several ranks.

Importing torch takes seconds, a small test milliseconds. One server process imports torch once and forks workers from
there; workers are reused for every job and replaced when a job fails, hangs or kills them.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from megatron_llm.parallel.grid import Grid
from megatron_llm.testing.worker import STACK_SIGNAL, Job, Reply, unpack, worker_main

START_TIMEOUT = 120.0  # seconds for a worker to come up on a busy machine
SETTLE_TIME = 2.0  # seconds the other ranks get, after the first failure, to fail by themselves
STACK_TIME = 0.5  # seconds a hanging worker gets to write its stacks


class RankError(RuntimeError):
    """A job failed: the message shows the first failing rank's coordinates and stack, `error_type` its exception."""

    def __init__(self, message: str, rank: int, error_type: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.error_type = error_type


@dataclass
class Worker:
    """A process, the pipe to it and the file it prints to; `shown` is how much of that file has been read."""

    process: ForkServerProcess
    connection: Connection
    log: Path
    shown: int = 0

    def read_log(self) -> str:
        """What was printed since the last call."""
        with self.log.open("rb") as file:
            file.seek(self.shown)
            text = file.read()
        self.shown += len(text)
        return text.decode(errors="replace")

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class Outcome:
    """How one rank's job has gone so far: a reply, or the exit code of a process that died, or neither yet."""

    reply: Reply | None = None
    exit_code: int | None = None

    @property
    def pending(self) -> bool:
        """Whether the rank is still running."""
        return self.reply is None and self.exit_code is None

    @property
    def failed(self) -> bool:
        """Whether the rank raised or died."""
        return self.exit_code is not None or (self.reply is not None and self.reply.result is None)


@dataclass
class Pool:
    """Warm workers, as many as the largest job so far needed. Not for use from several threads at once."""

    workers: list[Worker] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ranks-")))
    numbers: count = field(default_factory=count)

    def grow(self, size: int) -> None:
        """Start workers until there are `size`; they come up side by side."""
        context = multiprocessing.get_context("forkserver")
        # torch by its own name too, since the server may be unable to import ours (it has the parent's environment, not
        # its sys.path); pytest because a new process first loads its parent's main module.
        context.set_forkserver_preload(["torch.distributed", "megatron_llm.testing.worker", *({"pytest"} & set(sys.modules))])
        started = []
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            log = self.folder / f"worker{next(self.numbers)}.log"
            log.touch()
            process = context.Process(target=worker_main, args=(theirs, str(log)), name=log.stem)
            process.start()
            theirs.close()
            started.append(Worker(process, ours, log))
            self.workers.append(started[-1])
        for worker in started:
            if not worker.connection.poll(START_TIMEOUT):
                raise RuntimeError(f"a rank worker did not start within {START_TIMEOUT:.0f} s: {worker.read_log()}")
            worker.connection.recv_bytes()

    def run(self, grid: Grid, timeout: float, module: str, module_file: str | None, name: str, call: bytes, backend: str) -> list[bytes]:
        """Run a function on every rank of `grid`; the pickled results in rank order. RankError when any rank fails."""
        self.grow(grid.world_size)
        workers = self.workers[: grid.world_size]
        rendezvous = self.folder / f"rendezvous{next(self.numbers)}"
        clean = False
        try:
            for rank, worker in enumerate(workers):
                job = Job(grid, rank, str(rendezvous), timeout, tuple(sys.path), module, module_file, name, call, backend)
                worker.connection.send_bytes(pickle.dumps(job))
            outcomes = [Outcome() for _ in workers]
            self._collect(workers, outcomes, time.monotonic() + timeout)
            if any(outcome.failed for outcome in outcomes):
                self._collect(workers, outcomes, time.monotonic() + SETTLE_TIME, all_of_them=True)
                raise explain_failure(grid, outcomes)
            if any(outcome.pending for outcome in outcomes):
                raise self._explain_hang(grid, workers, outcomes, timeout)
            clean = True
            return [outcome.reply.result for outcome in outcomes if outcome.reply is not None and outcome.reply.result is not None]
        finally:
            show_logs(grid, workers)
            rendezvous.unlink(missing_ok=True)
            if not clean:
                self.discard(workers)

    def _collect(self, workers: list[Worker], outcomes: list[Outcome], deadline: float, all_of_them: bool = False) -> None:
        """Wait until every rank has reported or died, the deadline, or (unless `all_of_them`) the first failure."""
        while any(outcome.pending for outcome in outcomes):
            if not all_of_them and any(outcome.failed for outcome in outcomes):
                return
            waiting = [(w, o) for w, o in zip(workers, outcomes, strict=True) if o.pending]
            sources = [w.connection for w, _ in waiting] + [w.process.sentinel for w, _ in waiting]
            if not multiprocessing.connection.wait(sources, max(0.0, deadline - time.monotonic())):
                return
            for worker, outcome in waiting:
                collect_one(worker, outcome)

    def _explain_hang(self, grid: Grid, workers: list[Worker], outcomes: list[Outcome], timeout: float) -> RankError:
        """Every rank's state and, for those still running, their Python stacks."""
        hanging = [rank for rank, outcome in enumerate(outcomes) if outcome.pending]
        show_logs(grid, workers)  # what follows in the logs is then only the stacks
        for rank in hanging:
            pid = workers[rank].process.pid
            assert pid is not None, "a started process has a pid"
            os.kill(pid, STACK_SIGNAL)
        time.sleep(STACK_TIME)
        lines = [f"no answer within {timeout:g} s from {len(hanging)} of {grid.world_size} ranks"]
        for rank, worker in enumerate(workers):
            state = own_threads(worker.read_log()) if rank in hanging else "  finished"
            lines.append(f"{grid.describe(rank)}:\n{state}")
        return RankError("\n".join(lines), hanging[0], "TimeoutError")

    def discard(self, workers: list[Worker]) -> None:
        """Kill workers and forget them; the next job starts new ones."""
        for worker in workers:
            worker.kill()
            worker.log.unlink(missing_ok=True)
        self.workers = [worker for worker in self.workers if worker not in workers]

    def close(self) -> None:
        """Kill all workers and remove the pool's folder."""
        self.discard(self.workers)
        shutil.rmtree(self.folder, ignore_errors=True)


def collect_one(worker: Worker, outcome: Outcome) -> None:
    """Take a rank's reply if it has come; otherwise note its exit code if the process has ended."""
    try:
        if worker.connection.poll():
            outcome.reply = unpack(worker.connection.recv_bytes())
            return
    except (EOFError, ConnectionResetError):
        worker.process.join()  # the pipe closes with the process
    if not worker.process.is_alive():
        worker.process.join()
        outcome.exit_code = worker.process.exitcode


def explain_failure(grid: Grid, outcomes: list[Outcome]) -> RankError:
    """The error of the first failing rank in full, the others in a line each.

    A process that died comes before any exception: the exceptions are what its peers saw when its sockets closed.
    """
    dead = [rank for rank, outcome in enumerate(outcomes) if outcome.exit_code is not None]
    raised = {rank: o.reply for rank, o in enumerate(outcomes) if o.reply is not None and o.reply.result is None}
    if dead:
        first, error_type = dead[0], "ProcessDied"
        lines = [f"{grid.describe(first)} died: {describe_exit(outcomes[first].exit_code)}"]
    else:
        first = min(raised, key=lambda rank: raised[rank].moment)
        error_type = raised[first].error_type
        lines = [f"{grid.describe(first)} failed first: {raised[first].error}", raised[first].stack.rstrip()]
    for rank, outcome in enumerate(outcomes):
        if rank == first:
            continue
        if rank in raised:
            lines.append(f"then {grid.describe(rank)}: {raised[rank].error.splitlines()[0][:200]}")
        elif rank in dead:
            lines.append(f"also {grid.describe(rank)} died: {describe_exit(outcome.exit_code)}")
        elif outcome.pending:
            lines.append(f"{grid.describe(rank)} was still running and was stopped")
    return RankError("\n".join(lines), first, error_type)


def describe_exit(code: int | None) -> str:
    """An exit code in words, as in `killed by signal 9`."""
    return f"killed by signal {-code}" if code is not None and code < 0 else f"left with exit code {code}"


def own_threads(stacks: str) -> str:
    """Stacks without the harness's own watching thread."""
    threads = [part for part in stacks.split("\n\n") if "leave_with_parent" not in part]
    return "\n\n".join(threads).rstrip()


def show_logs(grid: Grid, workers: list[Worker]) -> None:
    """Print what each rank printed; pytest shows it with a failing test."""
    for rank, worker in enumerate(workers):
        for line in worker.read_log().splitlines():
            print(f"[rank {rank}] {line}" if grid.world_size > 1 else line)
