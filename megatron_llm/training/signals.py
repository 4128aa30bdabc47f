"""Leaving in time: signals from a scheduler or the keyboard, a time limit, a step to stop after.

A signal handler only notes the signal; the training loop asks between steps, saves and leaves. A handler that saved by
itself would run in the middle of a collective. Each rank may answer differently for a moment (a signal reaches one rank
first, clocks differ), so the loop must combine the ranks' answers before acting on one.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: Slurm's --signal=USR1@120 ahead of the time limit


class SignalWatcher:
    """While entered, notes signals instead of dying from them; a SIGINT after another signal interrupts at once.

    Use in the main thread as `with SignalWatcher() as signals:`. `received` is the first signal's name, or None.
    """

    def __init__(self, watched: Sequence[signal.Signals] = WATCHED) -> None:
        self.received: str | None = None
        self._watched = tuple(watched)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalWatcher":
        for number in self._watched:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = name = signal.Signals(number).name
            # os.write, because print may be interrupted in the middle of its own lock.
            os.write(2, f"\n{name} received: saving and leaving after this step\n".encode())


class ExitMonitor:
    """Says when to save and leave before the last step.

    `exit_duration_in_mins` counts from the construction of the monitor, so make it early: loading counts too.
    `exit_interval` leaves after a step that is a multiple of it. `clock` returns seconds.
    """

    def __init__(
        self,
        exit_duration_in_mins: float | None = None,
        exit_interval: int | None = None,
        signals: SignalWatcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._interval, self._signals, self._clock = exit_duration_in_mins, exit_interval, signals, clock
        self._start = clock()

    def should_exit(self, step: int) -> str | None:
        """The reason to save and leave now that `step` steps are complete, or None to go on."""
        if self._signals is not None and self._signals.received is not None:
            return f"{self._signals.received} received"
        minutes = (self._clock() - self._start) / 60.0
        if self._limit is not None and minutes >= self._limit:
            return f"{minutes:.1f} minutes have passed, exit_duration_in_mins is {self._limit:g}"
        if self._interval is not None and step > 0 and step % self._interval == 0:
            return f"step {step} is a multiple of exit_interval {self._interval}"
        return None
