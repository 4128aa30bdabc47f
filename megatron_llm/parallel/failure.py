"""When one rank fails, all leave soon, and the one that failed first is named with its coordinates and what it was doing.

Each rank runs a small watching thread beside training. Through the store the ranks met in, it shows once a second that
it is alive and where it is, and looks whether anybody has failed. Three things make a failure: a rank raises; a
rank stops showing itself (killed, machine lost), which its neighbour in a ring notices; a rank stays in one phase longer
than the timeout, and then the rank that has been longest in its phase is the one that hangs. An error that only tells of
a broken or timed-out connection is a consequence: its rank first looks for the cause for a few seconds.

    store, rank, world = next(dist.rendezvous("env://"))
    grid, phase = Grid.from_world(world, tp, pp), PhaseTracker()          # PhaseTracker is in heartbeat.py
    with rank_guard(grid, rank, store, phase, timeout=600.0):
        dist.init_process_group("gloo", store=dist.PrefixStore("pg", store), rank=rank, world_size=world)
        groups = build_groups(grid, device, timedelta(seconds=660))  # a little longer, so that the guard speaks first
        for step in range(...):
            phase.enter("load data", step=step)
            ...
            phase.enter("optimizer")

The guard turns an exception into its printed line and SystemExit. A step can be slow once (compiling, building an index):
`phase.enter("build index", patience=3600)` on the rank that works; ranks that wait for it are patient as well.
"""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from torch import distributed as dist

from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.heartbeat import Beat, Board, Failure, PhaseTracker
from megatron_llm.utils.errors import UserError

CONSEQUENCE = re.compile(r"gloo|nccl|connection|socket|time[d ]*out|broken pipe", re.IGNORECASE)
SETTLE = 3.5  # intervals in which a live rank surely shows itself
LEAVE_TIME = 10.0  # seconds an interpreter gets to shut down after a failure
DIED = "died without a word (killed, out of memory, or its machine is lost)"


@contextmanager
def rank_guard(
    grid: Grid,
    rank: int,
    store: dist.Store,
    phase: PhaseTracker,
    *,
    timeout: float = 600.0,
    interval: float = 1.0,
    dead_after: float = 60.0,
) -> Iterator[None]:
    """Guard the body: any rank's failure ends all ranks with status 1 and a line that names the first. See the module's text.

    Every rank of `grid` enters with a client of one store, and they leave together: who is done waits for the others.
    `timeout` seconds in one phase count as hanging. A silent rank counts as dead after a few intervals when its process
    is gone from this machine, and after `dead_after` seconds when it ran on another one. One rank alone is not guarded.
    """
    if grid.world_size == 1:
        yield
        return
    guard = Guard(grid, rank, store, phase, timeout, interval, dead_after)
    restore_sigterm = leave_on_sigterm()
    guard.thread.start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            guard.leave(error)
        guard.finish()
        raise
    else:
        guard.finish()
    restore_sigterm()


class Guard:
    """One rank's watching thread and what it decides."""

    def __init__(
        self, grid: Grid, rank: int, store: dist.Store, phase: PhaseTracker, timeout: float, interval: float, dead_after: float
    ) -> None:
        self.grid, self.rank, self.phase = grid, rank, phase
        self.timeout, self.interval, self.dead_after = timeout, interval, dead_after
        self.board = Board(store, rank)
        self.done = False
        self.stopped = threading.Event()
        self.leave_by: float | None = None  # set when the main thread is on its way out with an error
        self.seen: tuple[int, float] = (-1, time.monotonic())  # the neighbour's last beat and when it was new
        self.thread = threading.Thread(target=self.watch, name="rank_guard", daemon=True)

    def watch(self) -> None:
        """Once an interval: show that we live, look whether somebody failed; never returns when somebody has."""
        while not self.stopped.is_set():
            try:
                self.board.show(self.phase, running=not self.done)
                failure = self.board.failure() or self.find_silent_neighbour() or self.find_hang()
            except dist.DistError as error:
                if self.done:
                    return  # the host of the store was done a moment earlier
                failure = Failure(None, "the host of the rendezvous store", "an unknown phase", f"is gone ({first_line(error)})")
            if self.leave_by is not None:
                if time.monotonic() > self.leave_by:
                    os._exit(1)
            elif failure is not None:
                self.exit(failure)
            self.stopped.wait(self.interval)

    def about(self, rank: int, where: str, error: str) -> Failure:
        """A failure of a rank."""
        return Failure(rank, self.grid.describe(rank), where, error)

    def find_silent_neighbour(self) -> Failure | None:
        """Publish the next rank of the ring as dead when its beats have stopped."""
        neighbour = (self.rank + 1) % self.grid.world_size
        beat = self.board.beat_of(neighbour)
        if beat is None or not beat.running or beat.number != self.seen[0]:
            self.seen = (beat.number if beat else -1, time.monotonic())
            return None
        gone = beat.is_gone(time.monotonic() - self.seen[1], 2 * self.interval, self.dead_after)
        return self.board.publish(self.about(neighbour, beat.where, DIED)) if gone else None

    def find_hang(self) -> Failure | None:
        """When this rank is over its time, publish the rank that has been longest in its phase: the others wait for it."""
        now = self.phase.now
        if self.leave_by is not None or now.age < (now.patience or self.timeout):
            return None
        beats = [self.board.beat_of(rank) for rank in range(self.grid.world_size)]
        if any(beat is not None and beat.running and beat.age < (beat.patience or 0.0) for beat in beats):
            return None  # somebody does what may take long, and this rank waits for it
        return self.board.publish(self.longest_in_phase() or self.about(self.rank, str(now), f"did not move on for {now.age:.0f} s"))

    def longest_in_phase(self) -> Failure | None:
        """The rank that never started or has not moved on for longest."""
        beats = [(rank, self.board.beat_of(rank)) for rank in range(self.grid.world_size)]
        absent = [rank for rank, beat in beats if beat is None]
        if absent:
            return self.about(absent[0], "start", "never came")
        running: list[tuple[int, Beat]] = [(rank, beat) for rank, beat in beats if beat is not None and beat.running]
        if not running:
            return None
        oldest, beat = max(running, key=lambda pair: pair[1].age)
        return self.about(oldest, beat.where, f"did not move on for {beat.age:.0f} s while the others waited")

    def find_cause(self, error: BaseException) -> Failure | None:
        """What made this rank's connections fail: a published failure, a rank that fell silent, or one that hangs."""
        before = [self.board.beat_of(rank) for rank in range(self.grid.world_size)]
        settle = SETTLE * self.interval
        end = time.monotonic() + settle
        while time.monotonic() < end:
            failure = self.board.failure()
            if failure is not None:
                return failure
            time.sleep(self.interval / 4)
        for rank, beat in enumerate(before):
            if beat is not None and beat.running and beat == self.board.beat_of(rank) and beat.is_gone(settle, 0.0, 0.0):
                return self.about(rank, beat.where, DIED)
        return self.longest_in_phase() if "time" in str(error).lower() else None

    def leave(self, error: BaseException) -> NoReturn:
        """Publish, print one line (and the stack of a defect), and leave with SystemExit, within a bounded time."""
        if self.leave_by is not None:
            self.thread.join()  # the watching thread is ending this process already
        self.leave_by = time.monotonic() + 3 * SETTLE * self.interval + LEAVE_TIME
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are leaving; a launcher's SIGTERM must not cut the message off
        where = str(self.phase.now)
        mine = first = self.about(self.rank, where, f"{type(error).__name__}: {error}".strip().removesuffix(":"))
        try:
            first = self.board.publish((is_consequence(error) and self.find_cause(error)) or mine)
        except dist.DistError as lost:
            print(f"{self.grid.describe(self.rank)} cannot tell the others ({first_line(lost)})", file=sys.stderr)
        if first == mine:
            expected = isinstance(error, (UserError, SystemExit, KeyboardInterrupt))
            print("" if expected else "".join(traceback.format_exception(error)), first, sep="", file=sys.stderr, flush=True)
        elif first.error != mine.error or self.speaks_for_another_machine(first):  # bad input on every rank is told once a machine
            print(f"{self.grid.describe(self.rank)} leaves {where} ({first_line(error)}): {first}", file=sys.stderr, flush=True)
        self.linger(first)
        raise SystemExit(error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1) from None

    def speaks_for_another_machine(self, first: Failure) -> bool:
        """Whether this is the first rank of a machine on which nobody has told of `first`. torchrun numbers a machine's ranks in a row."""
        size = int(os.environ.get("LOCAL_WORLD_SIZE", self.grid.world_size))
        return first.rank is not None and self.rank % size == 0 and first.rank // size != self.rank // size

    def exit(self, failure: Failure) -> NoReturn:
        """Leave from the watching thread, whatever the main thread hangs in."""
        self.leave_by = time.monotonic()
        print(f"{self.grid.describe(self.rank)} leaves {self.phase.now}: {failure}", file=sys.stderr, flush=True)
        if failure.rank == self.rank:
            faulthandler.dump_traceback(sys.stderr)  # it hangs: show where
        self.linger(failure)
        sys.stdout.flush()
        os._exit(1)

    def linger(self, first: Failure) -> None:
        """Give the others time to hear of the failure, and let the rank that failed go first: launchers report that one."""
        time.sleep((1.5 if first.rank == self.rank else 3.0) * self.interval)

    def finish(self) -> None:
        """Wait until every rank is done, so that nobody succeeds when somebody fails; then stop watching."""
        self.phase.enter("wait for the other ranks to finish", patience=float("inf"))
        self.done = True
        self.board.show(self.phase, running=False)
        everybody = self.board.count_done(1)
        while everybody < self.grid.world_size and self.thread.is_alive():  # it ends early when the store's host is done
            time.sleep(self.interval / 4)
            everybody = self.count_done()
        self.stopped.set()
        self.thread.join()

    def count_done(self) -> int:
        """Ranks that are done; all of them when the host of the store has left, which it does last."""
        try:
            return self.board.count_done(0)
        except dist.DistError:
            return self.grid.world_size


def is_consequence(error: BaseException) -> bool:
    """Whether an error tells of a broken or timed-out connection, or of being asked to leave, and so has its cause elsewhere."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGTERM
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and CONSEQUENCE.search(str(error)) is not None)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, shortened."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def leave_on_sigterm() -> Callable[[], object]:
    """Where nobody handles SIGTERM, make it an ordinary way out, since torchrun sends it when another rank has failed.

    Returns a function that undoes it.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)
