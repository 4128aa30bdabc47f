"""When one rank fails, all leave soon, and the one that failed first is named with its coordinates and what it was doing.

Each rank runs a small watching thread beside training. Through the store the ranks met in, it shows once a second that
it is alive and where it is, and looks whether anybody has failed. Three things make a failure: a rank raises; a
rank stops showing itself (killed, machine lost), which its neighbour in a ring notices; a rank stays in one phase longer
than the timeout, and then the rank that has been longest in its phase is the one that hangs. An error that only tells of
a broken or timed-out connection is a consequence: its rank first looks for the cause for a few seconds.

    store, rank, world = next(torch.distributed.rendezvous("env://"))
    grid, phase = Grid.from_world(world, tp, pp), PhaseTracker()
    with rank_guard(grid, rank, store, phase, timeout=600.0):
        torch.distributed.init_process_group("gloo", store=torch.distributed.PrefixStore("pg", store), rank=rank, world_size=world)
        groups = build_groups(grid, device, timedelta(seconds=660))  # a little longer, so that the guard speaks first
        for step in range(...):
            phase.enter("load data", step=step)
            ...
            phase.enter("optimizer")

The guard turns an exception into its printed line and SystemExit. A step can be slow once (compiling, building an index):
`phase.enter("build index", patience=3600)`.
"""

import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch import distributed as dist

from megatron_llm.parallel.grid import Grid
from megatron_llm.utils.errors import UserError

CONSEQUENCE = re.compile(r"gloo|nccl|connection|socket|time[d ]*out|broken pipe", re.IGNORECASE)
SETTLE_BEATS = 3.5  # intervals in which a live rank surely shows itself
LEAVE_TIME = 10.0  # seconds an interpreter gets to shut down after a failure
DIED = "died without a word (killed, out of memory, or its machine is lost)"


class Phase(NamedTuple):
    """What a rank is doing, since when (monotonic seconds), and how long that may take (None: the guard's timeout)."""

    what: object
    step: int | None
    patience: float | None
    since: float

    def __str__(self) -> str:
        return f"{self.what}" if self.step is None else f"step {self.step}, {self.what}"


class PhaseTracker:
    """Where this rank is, for the line that a failure prints. Cheap enough for every pipeline action."""

    def __init__(self) -> None:
        self.now = Phase("start", None, None, time.monotonic())

    def enter(self, what: object, *, step: int | None = None, patience: float | None = None) -> None:
        """Begin a phase; `what` is turned into text only when needed. Without `step` the step stays what it was."""
        self.now = Phase(what, self.now.step if step is None else step, patience, time.monotonic())


class Failure(NamedTuple):
    """The first failure: who, where in the run, and what."""

    rank: int | None
    who: str
    where: str
    error: str

    def __str__(self) -> str:
        return f"first failure: {self.who} in {self.where}: {self.error}"


class Beat(NamedTuple):
    """What a rank shows of itself; `number` grows with each beat, `age` is the seconds it has been in its phase."""

    number: int
    host: str
    pid: int
    running: bool
    where: str
    age: float


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

    Every rank of `grid` enters with a client of one store, and leaves together: who is done waits for the others.
    `timeout` seconds in one phase count as hanging. A silent rank counts as dead after about 3 intervals when its
    process is gone from this machine, and after `dead_after` seconds when it runs on another one.
    """
    if grid.world_size == 1:
        yield
        return
    guard = Guard(grid, rank, store, phase, timeout, interval, dead_after)
    restore = on_sigterm_leave()
    guard.thread.start()
    try:
        yield
        guard.finish()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            guard.finish()
            raise
        guard.leave(error)
    finally:
        restore()


class Guard:
    """One rank's watching thread and what it knows."""

    def __init__(
        self, grid: Grid, rank: int, store: dist.Store, phase: PhaseTracker, timeout: float, interval: float, dead_after: float
    ) -> None:
        self.grid, self.rank, self.phase = grid, rank, phase
        self.timeout, self.interval, self.dead_after = timeout, interval, dead_after
        self.store = dist.PrefixStore("rank_guard", store.clone())  # type: ignore[attr-defined]  # own connection: a wait holds the other
        self.state = "running"
        self.number = 0
        self.stopped = threading.Event()
        self.leave_by: float | None = None
        self.lock = threading.Lock()
        self.seen: tuple[int, float] = (-1, time.monotonic())  # the neighbour's last beat and when it was new
        self.thread = threading.Thread(target=self.watch, name="rank_guard", daemon=True)

    def watch(self) -> None:
        """Once an interval: show that we live, look whether somebody failed; never returns when somebody has."""
        while True:
            try:
                self.show()
                failure = self.published() or self.find_silent_neighbour() or self.find_hang()
            except dist.DistError as error:
                if self.state == "done":
                    return  # the host of the store was done a moment earlier
                failure = Failure(None, "the host of the rendezvous store", "an unknown phase", f"is gone ({first_line(error)})")
            if self.leave_by is not None and time.monotonic() > self.leave_by:
                os._exit(1)
            if failure is not None and self.leave_by is None:
                self.exit(failure)
            if self.stopped.wait(self.interval):
                return

    def show(self) -> None:
        """Publish this rank's beat."""
        with self.lock:  # so that no older state overwrites a newer one
            now = self.phase.now
            beat = Beat(self.number, socket.gethostname(), os.getpid(), self.state == "running", str(now), time.monotonic() - now.since)
            self.number += 1
            self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def beat_of(self, rank: int) -> Beat | None:
        """A rank's last beat; None when it has not started."""
        key = f"beat/{rank}"
        return Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None

    def published(self) -> Failure | None:
        """The first failure, if there is one."""
        return Failure(*json.loads(self.store.get("failure"))) if self.store.check(["failure"]) else None

    def publish(self, failure: Failure) -> Failure:
        """Make this the first failure unless there is one; returns the first."""
        text = json.dumps(failure)
        first: bytes = self.store.compare_set("failure", "", text)
        if first.decode() == text and "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it as the root cause
            report = json.dumps({"message": str(failure), "timestamp": int(time.time())})
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report)
        return Failure(*json.loads(first))

    def about(self, rank: int, where: str, error: str) -> Failure:
        """A failure of a rank."""
        return Failure(rank, self.grid.describe(rank), where, error)

    def find_silent_neighbour(self) -> Failure | None:
        """Publish the next rank of the ring as dead when its beats have stopped."""
        neighbour = (self.rank + 1) % self.grid.world_size
        beat = self.beat_of(neighbour)
        if beat is None or not beat.running or beat.number != self.seen[0]:
            self.seen = (beat.number if beat else -1, time.monotonic())
            return None
        gone = self.is_gone(beat, time.monotonic() - self.seen[1], self.dead_after)
        return self.publish(self.about(neighbour, beat.where, DIED)) if gone else None

    def is_gone(self, beat: Beat, silent: float, dead_after: float) -> bool:
        """Whether the rank of an unchanged beat is dead: on this machine its process tells, elsewhere the length of the silence."""
        here = beat.host == socket.gethostname()
        return not process_exists(beat.pid) if here and silent > 2 * self.interval else silent > dead_after

    def find_hang(self) -> Failure | None:
        """When this rank is over its time, publish the rank that has been longest in its phase: the others wait for it."""
        now = self.phase.now
        age = time.monotonic() - now.since
        if self.state == "failed" or age < (now.patience or self.timeout):
            return None
        return self.publish(self.longest_in_phase() or self.about(self.rank, str(now), f"did not move on for {age:.0f} s"))

    def longest_in_phase(self) -> Failure | None:
        """The rank that never started or has not moved on for longest."""
        beats = [(rank, self.beat_of(rank)) for rank in range(self.grid.world_size)]
        absent = [rank for rank, beat in beats if beat is None]
        if absent:
            return self.about(absent[0], "start", "never came")
        oldest, beat = max(((rank, beat) for rank, beat in beats if beat and beat.running), key=lambda pair: pair[1].age, default=(0, None))
        return self.about(oldest, beat.where, f"did not move on for {beat.age:.0f} s while the others waited") if beat else None

    def find_cause(self, error: BaseException) -> Failure | None:
        """What made this rank's connections fail: a published failure, a rank that fell silent, or one that hangs."""
        before = [self.beat_of(rank) for rank in range(self.grid.world_size)]
        settle = SETTLE_BEATS * self.interval
        end = time.monotonic() + settle
        while time.monotonic() < end:
            failure = self.published()
            if failure is not None:
                return failure
            time.sleep(self.interval / 4)
        for rank, beat in enumerate(before):
            if beat is not None and beat.running and beat == self.beat_of(rank) and self.is_gone(beat, settle, settle):
                return self.about(rank, beat.where, DIED)
        return self.longest_in_phase() if "time" in str(error).lower() else None

    def leave(self, error: BaseException) -> None:
        """Publish, print one line (and the stack of a defect), and leave with SystemExit."""
        self.leave_by = time.monotonic() + 2 * SETTLE_BEATS * self.interval + LEAVE_TIME
        where = str(self.phase.now)
        text = f"{type(error).__name__}: {error}".strip().removesuffix(":")
        mine = first = self.about(self.rank, where, text)
        try:
            first = self.publish((is_consequence(error) and self.find_cause(error)) or mine)
            self.state = "failed"
        except dist.DistError:
            pass  # the store is gone too: our own error is all there is to tell
        expected = isinstance(error, (UserError, SystemExit, KeyboardInterrupt))
        if first == mine:
            stack = "" if expected else "".join(traceback.format_exception(error))
            print(f"{stack}{first}", file=sys.stderr, flush=True)
            time.sleep(1.5 * self.interval)  # the others hear of it before a launcher ends them, or the store ends with us
        elif first.error != mine.error:  # the same bad input on every rank is told once
            print(f"{self.grid.describe(self.rank)} leaves {where} ({first_line(error)}): {first}", file=sys.stderr, flush=True)
        raise SystemExit(error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1) from None

    def exit(self, failure: Failure) -> None:
        """Leave from the watching thread, whatever the main thread hangs in."""
        print(f"{self.grid.describe(self.rank)} leaves {self.phase.now}: {failure}", file=sys.stderr, flush=True)
        if failure.rank == self.rank:
            faulthandler.dump_traceback(sys.stderr)  # it hangs: show where
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def finish(self) -> None:
        """Wait until every rank is done, so that nobody succeeds when somebody fails; then stop watching."""
        self.phase.enter("wait for the other ranks to finish")
        self.state = "done"
        try:
            self.show()
            done = self.store.add("done", 1)
            while done < self.grid.world_size:
                time.sleep(self.interval / 4)
                done = self.store.add("done", 0)
        except dist.DistError:
            pass  # the host of the store left: it does so only when all are done
        self.stopped.set()
        self.thread.join()


def is_consequence(error: BaseException) -> bool:
    """Whether an error tells of a broken or timed-out connection, or of being asked to leave, and so has its cause elsewhere."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGTERM
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and CONSEQUENCE.search(str(error)) is not None)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, shortened."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def process_exists(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.is_dir():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)  # no /proc, as on macOS
    except ProcessLookupError:
        return False
    return True


def on_sigterm_leave() -> Any:
    """Where nobody handles SIGTERM, make it an ordinary way out, since torchrun sends it when another rank has failed.

    Returns a function that restores the handler.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)
