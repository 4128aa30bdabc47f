"""A function applied to a stream of items by worker processes: results in order, memory bounded, no hang when one dies.

Each worker has a pipe of its own and at most one item at a time, so neither side can wait for the other to empty a full
pipe, a dead worker is seen at once, and workers leave when the main process is gone, however it went. Arrays come back
through memory that a worker shares with the main process (see shared_slots.py).

What the function needs (a tokenizer, say) is made once, in a process of its own, from which the workers are then forked:
it costs the time and the memory of one.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from selectors import EVENT_READ, DefaultSelector
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from megatron_llm.data.shared_slots import Packed, SharedSlots
from megatron_llm.data.worker_failures import Failure, how_it_ended, tell
from megatron_llm.utils.errors import UserError

# A worker may be this many results ahead of their use, each of up to so many bytes; further or larger ones take the pipe.
SLOTS, SLOT_BYTES = 4, 2 << 20
# Workers forked from one process: their pipes are handed to it in one message, which holds 250.
FAMILY = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


def start_server(module: str) -> None:
    """Start the process that all others are forked from, which imports `module` while the caller goes on.

    To be called before the first pool of a program: a server that runs already is left as it is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    forkserver.ensure_running()


class CannotStartError(UserError):
    """What the workers need could not be made; the message says why."""


_CLOSED = object()


@dataclass
class _Family:
    """The process that some workers are forked from, the pipe on which it tells how they ended, and what it has told."""

    process: BaseProcess
    pipe: Connection
    slots: SharedSlots
    ended: dict[int, int] = field(default_factory=dict)

    def end_of(self, worker: int) -> int | Failure | None:
        """The exit status of a worker that is gone, or why there never was one; None when that cannot be told."""
        while worker not in self.ended:
            try:
                told: Any = self.pipe.recv() if self.pipe.poll(5) else None
            except (EOFError, OSError):
                told = None
            if told is None or isinstance(told, Failure):
                return told
            number, status = told
            self.ended[number] = status
        return self.ended[worker]


@dataclass
class _Worker:
    number: int
    family: _Family
    pipe: Connection
    free: list[int]
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
        return self.worker.family.slots.unpack(self.message, self.slot)

    def release(self) -> None:
        if self.slot is not None:
            self.worker.free.append(self.slot)


class WorkerPool(Generic[Item, Result]):
    """`workers` processes that each call the function that `make()` returns on items. Use as a context manager.

    `make` and items must be picklable; what `make` returns need not be, but must survive a fork: no threads. With no workers
    (0) everything happens in this process. A UserError raised by the function is raised here, one raised by `make` as a
    CannotStartError; anything else becomes a WorkerFailure; a process that dies is a UserError.

    numpy arrays in a result are read-only and hold until the next result is asked for: copy what is to stay.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], workers: int) -> None:
        self._make = make
        self._count = workers
        self._families: list[_Family] = []
        self._workers: list[_Worker] = []
        self._ready = DefaultSelector()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results, in the order of the items. Items are taken only a little ahead of the results given out."""
        if self._count == 0:
            function = self._made_here()
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

    def _made_here(self) -> Callable[[Item], Result]:
        try:
            return self._make()
        except UserError as error:
            raise CannotStartError(str(error)) from error

    def start(self) -> None:
        """Start the workers, which get ready while the caller goes on; `map` does it where it has not been done."""
        if self._workers:
            return
        # Not forked from this process: libraries keep threads here, which a fork would lose while they hold locks. All
        # come from a small server process instead, which is as safe as starting afresh and much quicker.
        context = multiprocessing.get_context("forkserver")
        for first in range(0, self._count, FAMILY):
            self._start_family(context, range(first, min(first + FAMILY, self._count)))

    def _start_family(self, context: ForkServerContext, numbers: range) -> None:
        pipes = {number: context.Pipe() for number in numbers}
        ours, theirs = context.Pipe(duplex=False)
        slots = SharedSlots(SLOTS * len(numbers), SLOT_BYTES)
        ends = {number: end for number, (_, end) in pipes.items()}
        process = context.Process(target=_fork_workers, args=(ends, theirs, slots, self._make), name="workers", daemon=True)
        process.start()
        for end in (theirs, *ends.values()):
            end.close()
        family = _Family(process, ours, slots)
        self._families.append(family)
        for place, (number, (pipe, _)) in enumerate(pipes.items()):
            worker = _Worker(number, family, pipe, list(range(place * SLOTS, (place + 1) * SLOTS)))
            self._workers.append(worker)
            self._ready.register(pipe, EVENT_READ, worker)

    def _send(self, worker: _Worker, number: int, item: Item) -> None:
        worker.item = number
        worker.slot = worker.free.pop() if worker.free else None
        try:
            worker.pipe.send((item, worker.slot))
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self, finished: dict[int, _Answer]) -> None:
        """Wait for at least one result."""
        for key, _ in self._ready.select():
            worker: _Worker = key.data
            try:
                answer: Any = worker.pipe.recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            if isinstance(answer, Failure):
                raise answer.exception()
            assert worker.item is not None
            finished[worker.item] = _Answer(worker, worker.slot, answer)
            worker.item = worker.slot = None

    def _death(self, worker: _Worker) -> Exception:
        """Why a worker cannot be reached: what it said before it left, why it never was, or how it died."""
        try:
            last: Any = worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError):
            last = None
        if isinstance(last, Failure):
            return last.exception()
        end = worker.family.end_of(worker.number)
        if isinstance(end, Failure):
            return CannotStartError(end.message) if end.user_error else end.exception()
        return UserError(
            f"worker-{worker.number} of {self._count} worker processes died, {how_it_ended(end)}; run the command again to go on"
        )

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._ready.close()
        for worker in self._workers:
            worker.pipe.close()
        for family in self._families:
            family.process.terminate()  # it takes its workers with it
        for family in self._families:
            family.process.join()
            family.pipe.close()
            family.slots.close()
        self._workers, self._families = [], []

    def __enter__(self) -> "WorkerPool[Item, Result]":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _fork_workers(pipes: Mapping[int, Connection], told: Connection, slots: SharedSlots, make: Callable[[], Callable[[Any], Any]]) -> None:
    """The life of the process that workers are forked from: until the last of them has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        function = make()
    except Exception as error:  # noqa: BLE001 - told to the main process, which raises it
        tell(told, Failure.of(error))
        return
    gc.freeze()  # what is there by now is not looked through again in each worker
    workers: dict[int, int] = {}
    for number, pipe in pipes.items():
        process = os.fork()
        if process == 0:
            _be_worker(pipe, [told, *(other for other in pipes.values() if other is not pipe)], slots, function)
        workers[process] = number
    for pipe in pipes.values():
        pipe.close()
    signal.signal(signal.SIGTERM, lambda *_: _terminate(list(workers)))
    while workers:
        process, status = os.wait()
        tell(told, (workers.pop(process), os.waitstatus_to_exitcode(status)))


def _terminate(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(process, signal.SIGTERM)


def _be_worker(pipe: Connection, others: Iterable[Connection], slots: SharedSlots, function: Callable[[Any], Any]) -> NoReturn:
    """What a worker does after the fork. It leaves without a word to what it shares with the process it was forked from."""
    status = 1
    try:
        for other in others:
            other.close()
        _work(pipe, slots, function)
        status = 0
    finally:
        os._exit(status)


def _work(pipe: Connection, slots: SharedSlots, function: Callable[[Any], Any]) -> None:
    """The life of a worker: until the pipe is closed at the other end."""
    try:
        while (task := _next(pipe)) is not _CLOSED:
            item, slot = task
            pipe.send(slots.pack(function(item), slot))
    except (BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # noqa: BLE001 - told to the main process, which raises it
        tell(pipe, Failure.of(error))


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return _CLOSED
