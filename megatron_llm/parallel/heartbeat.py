"""What the ranks of a run show each other through the store they met in: that they live, where they are, who failed first.

The board only stores and reads; what follows from it is decided in `failure.py`.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

from torch import distributed as dist


class Phase(NamedTuple):
    """What a rank is doing, since when (monotonic seconds), and how long that may take (None: the guard's timeout)."""

    what: object
    step: int | None
    patience: float | None
    since: float

    def __str__(self) -> str:
        return f"{self.what}" if self.step is None else f"step {self.step}, {self.what}"

    @property
    def age(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self.since


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
    """What a rank shows of itself; `number` grows with each beat, `age` is the seconds it has been in its phase, see Phase."""

    number: int
    host: str
    pid: int
    running: bool
    where: str
    age: float
    patience: float | None

    def is_gone(self, silent: float, settle: float, patience: float) -> bool:
        """Whether the rank is dead, its beat being unchanged for `silent` seconds.

        On this machine its process tells, after `settle` seconds; elsewhere silence longer than `patience` does.
        """
        here = self.host == socket.gethostname()
        return not process_exists(self.pid) if here and silent > settle else silent > patience


class Board:
    """One rank's view of the shared board; safe to use from several threads."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        clone: dist.Store = store.clone()  # type: ignore[attr-defined]  # own connection: a long wait may hold the other
        self.store = dist.PrefixStore("board", clone)
        self.rank = rank
        self.number = 0
        self.lock = threading.Lock()

    def show(self, phase: PhaseTracker, running: bool) -> None:
        """Publish this rank's beat; once shown as not running it stays so."""
        with self.lock:
            now = phase.now
            beat = Beat(self.number, socket.gethostname(), os.getpid(), running, str(now), now.age, now.patience)
            self.store.set(f"beat/{self.rank}", json.dumps(beat))
            self.number += 1

    def beat_of(self, rank: int) -> Beat | None:
        """A rank's last beat; None when it has not started."""
        key = f"beat/{rank}"
        return Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None

    def failure(self) -> Failure | None:
        """The first failure, if there is one."""
        return Failure(*json.loads(self.store.get("failure"))) if self.store.check(["failure"]) else None

    def publish(self, failure: Failure) -> Failure:
        """Make this the first failure unless there is one; returns the first."""
        text = json.dumps(failure)
        first: bytes = self.store.compare_set("failure", "", text)
        if first.decode() == text and "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it as the cause
            report = json.dumps({"message": str(failure), "timestamp": int(time.time())})
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report)
        return Failure(*json.loads(first))

    def count_done(self, more: int) -> int:
        """Add to the number of ranks that are done; returns the sum."""
        return int(self.store.add("done", more))


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
