"""Progress of long work: percent, rates and time left; one refreshed line on a terminal, an occasional line elsewhere.

Everything goes to stderr, so that a tool's output stays clean.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TextIO, TypeVar

Item = TypeVar("Item")


class Progress:
    """Reports how far a piece of work is. Use as a context manager; the last line is written at its end.

    `total` is the amount of work (None: unknown) in `unit`; a unit of "B" is shown as KB, MB, GB. `update` takes the
    amount done so far and counters (`documents=12`), which are shown with their rates. `every` is the least number of
    seconds between lines (default: 0.2 on a terminal, 10 elsewhere).
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "",
        every: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._every = every if every is not None else (0.2 if self._terminal else 10.0)
        self._clock = clock
        self._start = self._last = clock()
        self._before = self._done = 0.0
        self._counters: dict[str, float] = {}
        self._first_counters: dict[str, float] = {}
        self._width = 0

    def update(self, done: float, **counters: float) -> None:
        """Work done so far, and counters so far (both in all, not since the last call). Prints when it is time to."""
        self._done = done
        for name, value in counters.items():
            self._first_counters.setdefault(name, 0.0)
            self._counters[name] = value
        if self._clock() - self._last >= self._every:
            self.show()

    def advance(self, amount: float = 1.0) -> None:
        """One more piece of work is done."""
        self.update(self._done + amount)

    def resume(self, done: float, **counters: float) -> None:
        """Start from what an earlier run had done, so that rates and the time left speak of this run alone."""
        self._before = self._done = done
        self._start = self._clock()
        self._first_counters.update(counters)
        self._counters.update(counters)

    def show(self) -> None:
        """Print the line now, whatever the time."""
        self._last = self._clock()
        self._print(self.line(), end="\r" if self._terminal else "\n")

    def say(self, message: str) -> None:
        """Print a line of its own without tearing the refreshed line."""
        self._print(message, end="\n")

    def close(self) -> None:
        """Write the last line: totals, mean rates, time taken."""
        self._print(self.line(final=True), end="\n")

    def line(self, final: bool = False) -> str:
        """The progress line as text."""
        seconds = max(self._clock() - self._start, 1e-9)
        rate = (self._done - self._before) / seconds
        parts = [f"{self.description}:"]
        if self.total:
            parts.append(f"{100.0 * min(self._done / self.total, 1.0):.1f} %")
        parts.append(f"{amount(self._done, self.unit)} ({amount(rate, self.unit)}/s)")
        for name, value in self._counters.items():
            speed = (value - self._first_counters[name]) / seconds
            parts.append(f"{amount(value)} {name} ({amount(speed)}/s)")
        if final:
            parts.append(f"in {duration(seconds)}")
        elif self.total and rate > 0:
            parts.append(f"ETA {duration(max(self.total - self._done, 0.0) / rate)}")
        return parts[0] + " " + ", ".join(parts[1:])

    def _print(self, text: str, end: str) -> None:
        if self._terminal:
            padding = " " * max(0, self._width - len(text))
            self._width = len(text) if end == "\r" else 0
            text = "\r" + text + padding
        print(text, end=end, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._terminal:
            print(file=self._stream, flush=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, reporting progress; `total` defaults to their number where it is known."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total) as progress:
        for item in items:
            yield item
            progress.advance()


def amount(value: float, unit: str = "") -> str:
    """A number for people: 950, 12.3 k, 4.56 M; with unit "B" decimal kilo-, mega-, gigabytes."""
    spaced = f" {unit}" if unit else ""
    if abs(value) < 1000:
        return f"{value:.0f}{spaced}" if value == int(value) or abs(value) >= 100 else f"{value:.1f}{spaced}"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {letter}{unit}"
    raise AssertionError(value)


def duration(seconds: float) -> str:
    """Seconds as 8.4 s, 3:05 (minutes) or 2:03:05 (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
