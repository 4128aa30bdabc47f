"""Programs on one GPU take turns in waves: as many at a time as its memory holds, one of them in every wave.

The first program, the anchor, stays from the first wave to the last, so that every other one is compared with steps of the
anchor that were taken between its own. A time budget bounds everything: what it leaves no time for is a row that says so.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.programs import Program, ProgramError, Running
from benchmarks.workload import Workload

OUT_OF_TIME = "the time budget ran out before its turn"


@dataclass
class Result:
    """One program's measured steps, or why there are none. `anchor_s`: the anchor's median in the same wave."""

    program: Program
    about: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    anchor_s: float | None = None
    not_run: str | None = None

    @property
    def median(self) -> float | None:
        """Median seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """A row of the JSON file."""
        row = {"name": self.program.name, "role": self.program.role, "settings": dict(self.program.settings), **self.about}
        if self.not_run is not None:
            return {**row, "not_run": self.not_run}
        return {**row, "median_s": self.median, "seconds": self.seconds, "anchor_s": self.anchor_s}


class Bounded(Running):
    """A started program that is ended when it has not answered by `deadline`, a time of the monotonic clock."""

    def __init__(self, program: Program, work: Workload, log: Path, deadline: float) -> None:
        self.deadline = deadline
        super().__init__(program, work, log)

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        try:
            return super()._answers(max(0.1, min(seconds, self.deadline - time.monotonic())))
        except ProgramError as error:
            if time.monotonic() >= self.deadline:
                raise ProgramError("it was not done when the time budget ran out") from error
            raise


def waves_of(programs: Sequence[Program], size: int) -> list[list[int]]:
    """Numbers of all programs but the first, `size` to a wave and in order; one with the setting `alone` has a wave to itself."""
    waves: list[list[int]] = []
    shared: list[int] = []
    for number, program in enumerate(programs[1:], 1):
        if program.settings.get("alone"):
            waves.append([number])
            continue
        if not shared:
            waves.append(shared)
        shared.append(number)
        if len(shared) == size:
            shared = []
    return waves


@dataclass
class Turns:
    """Settings of a comparison: the work, rounds of turns, programs alive at once, when to stop, where logs go."""

    work: Workload
    rounds: int
    alive: int
    deadline: float
    folder: Path
    say: Callable[[str], None]

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """Measure all, the first as the anchor. Never raises for a program that fails, and ends soon after the deadline."""
        results = [Result(program) for program in programs]
        running: dict[int, Bounded] = {}
        waves = waves_of(programs, max(1, self.alive - 1)) or [[]]
        longest = 0.0
        try:
            for number, wave in enumerate(waves):
                began = time.monotonic()
                if began + longest > self.deadline:
                    for index in wave:
                        results[index].not_run = OUT_OF_TIME
                    continue
                self.say(f"wave {number + 1} of {len(waves)}: {', '.join(programs[index].name for index in wave) or programs[0].name}")
                self._wave(results, [0, *wave] if number == 0 or 0 in running else wave, running)
                for index in wave:
                    if index in running:
                        running.pop(index).close()
                longest = max(longest, time.monotonic() - began)
        finally:
            for program in running.values():
                program.close()
        return results

    def _wave(self, results: list[Result], members: list[int], running: dict[int, Bounded]) -> None:
        """Start those that are not running yet, all together, and let the wave take its turns."""
        for index in members:
            if index not in running:
                running[index] = Bounded(results[index].program, self.work, self.folder / f"{index:02d}.log", self.deadline)
        for index in members:
            if not results[index].about:
                self._guarded(index, results, running, functools.partial(self._ready, index, results, running))
        anchor: list[float] = []
        for turn in range(self.rounds):
            if turn and time.monotonic() >= self.deadline:
                break
            for index in members:
                if index in running:
                    into = [results[index].seconds, anchor] if index == 0 else [results[index].seconds]
                    self._guarded(index, results, running, functools.partial(self._step, running[index], into))
        for index in members:
            results[index].anchor_s = statistics.median(anchor) if anchor else None

    def _ready(self, index: int, results: list[Result], running: dict[int, Bounded]) -> None:
        began = time.monotonic()
        results[index].about = running[index].wait_ready()
        losses = ", ".join(f"{loss:.3f}" for loss in results[index].about["first_losses"])
        self.say(f"  {results[index].program.name}: ready after another {time.monotonic() - began:.0f} s, losses {losses}")

    def _step(self, program: Bounded, into: list[list[float]]) -> None:
        answer = program.step()
        for seconds in into:
            seconds.append(answer.seconds)

    def _guarded(self, index: int, results: list[Result], running: dict[int, Bounded], work: Callable[[], object]) -> None:
        """Do the work; a program that fails in it keeps its reason and leaves."""
        try:
            work()
        except ProgramError as error:
            running.pop(index).close()
            done = len(results[index].seconds)
            reason = str(error).removeprefix("error: ")
            results[index].not_run = f"failed after {done} steps: {reason}" if done else reason
            self.say(f"  {results[index].program.name}: not run: {results[index].not_run}")
