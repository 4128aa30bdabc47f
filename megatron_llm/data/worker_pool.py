"""A function applied to a stream of items by worker processes: results in order, memory bounded, no hang when one dies.

Each worker has a pipe of its own and at most one item at a time, so neither side can wait for the other to empty a full
pipe, a dead worker is seen at once, and workers leave when the main process is gone, however it went. Arrays come back
through memory that a worker shares with the main process (see shared_slots.py).
"""

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_llm.data.shared_slots import Packed, SharedSlots
from megatron_llm.utils.errors import UserError

# A worker may be this many results ahead of their use, each of up to so many bytes; further or larger ones take the pipe.
SLOTS, SLOT_BYTES = 4, 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def start_server(module: str) -> None:
    """Start the process that workers are forked from, which imports `module` while the caller goes on.

    To be called before the first pool of a program: a server that runs already is left as it is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    forkserver.ensure_running()


class WorkerFailure(RuntimeError):
    """A worker's function raised; the message is its stack."""


@dataclass(frozen=True)
class _Failure:
    message: str
    user_error: bool


_CLOSED = object()


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    slots: SharedSlots
    free: list[int] = field(default_factory=lambda: list(range(SLOTS)))
    item: int | None = None  # number of the item it has
    slot: int | None = None  # where the result of that item may be put


@dataclass
class _Answer:
    """A result that has come in, and the slot it occupies until it has been used."""

    worker: _Worker
    slot: int | None
    message: Any

    def open(self) -> Any:
        if not isinstance(self.message, Packed):
            return self.message
        assert self.slot is not None
        return self.worker.slots.unpack(self.message, self.slot)

    def release(self) -> None:
        if self.slot is not None:
            self.worker.free.append(self.slot)


class WorkerPool(Generic[Item, Result]):
    """`workers` processes that each call `make()` once and then the function it returned on items. Use as a context manager.

    `make` and items must be picklable. With no workers (0) everything happens in this process. A UserError raised by the
    function is raised here; anything else it raises becomes a WorkerFailure; a process that dies is a UserError.

    numpy arrays in a result are read-only and hold until the next result is asked for: copy what is to stay.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], workers: int) -> None:
        self._make = make
        self._count = workers
        self._workers: list[_Worker] = []

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results, in the order of the items. Items are taken only a little ahead of the results given out."""
        if self._count == 0:
            function = self._make()
            yield from (function(item) for item in items)
            return
        self.start()
        waiting: deque[Item] = deque()
        finished: dict[int, _Answer] = {}
        source = iter(items)
        read = sent = given = 0
        more = True
        while True:
            # One item ready for each worker, so that none waits for the disk; the window bounds what a slow item holds up.
            while more and len(waiting) < self._count and read - given < 4 * self._count:
                try:
                    waiting.append(next(source))
                    read += 1
                except StopIteration:
                    more = False
            for worker in self._workers:
                if worker.item is None and waiting:
                    self._send(worker, sent, waiting.popleft())
                    sent += 1
            if given in finished:
                answer = finished.pop(given)
                yield answer.open()
                answer.release()
                given += 1
            elif given < sent:
                self._receive(finished)
            elif not more and not waiting:
                return

    def start(self) -> None:
        """Start the workers, which call `make()` while the caller goes on; `map` does it where it has not been done."""
        if self._workers:
            return
        # Not forked from this process: libraries keep threads here, which a fork would lose while they hold locks. They
        # are forked from a small server process instead, which is as safe as starting afresh and much quicker.
        context = multiprocessing.get_context("forkserver")
        for number in range(self._count):
            ours, theirs = context.Pipe()
            slots = SharedSlots(context, SLOTS, SLOT_BYTES)
            process = context.Process(target=_work, args=(theirs, slots, self._make), name=f"worker-{number}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, slots))

    def _send(self, worker: _Worker, number: int, item: Item) -> None:
        worker.item = number
        worker.slot = worker.free.pop() if worker.free else None
        try:
            worker.pipe.send((item, worker.slot))
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self, finished: dict[int, _Answer]) -> None:
        """Wait for at least one result."""
        busy = {worker.pipe: worker for worker in self._workers if worker.item is not None}
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]
            try:
                answer: Any = worker.pipe.recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            if isinstance(answer, _Failure):
                raise _exception(answer)
            assert worker.item is not None
            finished[worker.item] = _Answer(worker, worker.slot, answer)
            worker.item = worker.slot = None

    def _death(self, worker: _Worker) -> Exception:
        """Why a worker cannot be reached: what it said before it left, or how it died."""
        worker.process.join(5)
        try:
            last: Any = worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError):
            last = None
        if isinstance(last, _Failure):
            return _exception(last)
        code = worker.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit status {code}"
        hint = " (out of memory is the usual cause: use fewer --workers)" if code == -signal.SIGKILL else ""
        return UserError(f"{worker.process.name} of {self._count} worker processes died, {how}{hint}; run the command again to go on")

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()
        self._workers = []

    def __enter__(self) -> "WorkerPool[Item, Result]":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _exception(failure: _Failure) -> Exception:
    return UserError(failure.message) if failure.user_error else WorkerFailure(failure.message)


def _work(pipe: Connection, slots: SharedSlots, make: Callable[[], Callable[[Any], Any]]) -> None:
    """The life of a worker: until the pipe is closed at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        function = make()
        while (task := _next(pipe)) is not _CLOSED:
            item, slot = task
            pipe.send(slots.pack(function(item), slot))
    except (BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        _report(pipe, _Failure(str(error), True))
    except Exception:  # noqa: BLE001 - told to the main process, which raises it
        _report(pipe, _Failure(f"a worker process failed:\n{traceback.format_exc()}", False))


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return _CLOSED


def _report(pipe: Connection, failure: _Failure) -> None:
    try:
        pipe.send(failure)
    except (BrokenPipeError, ConnectionResetError):
        return
