"""Allowed ranges of single numbers, kept beside each field so that parsing, checking and documentation agree."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """A range of numbers; `low_open` and `high_open` leave the end itself out. Infinite and NaN values are never inside."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def contains(self, value: float) -> bool:
        """Whether a finite value lies in the range."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def text(self) -> str:
        """The range in words, to follow "must be": `at least 1`, `more than 0 and less than 1`."""
        parts = []
        if math.isfinite(self.low):
            parts.append(f"{'more than' if self.low_open else 'at least'} {_plain(self.low)}")
        if math.isfinite(self.high):
            parts.append(f"{'less than' if self.high_open else 'at most'} {_plain(self.high)}")
        return " and ".join(parts) or "a finite number"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


FINITE = Bounds()
COUNT = Bounds(low=1)  # sizes and numbers of things there must be one of
NOT_NEGATIVE = Bounds(low=0)
POSITIVE = Bounds(low=0, low_open=True)
SEED = Bounds(low=0, high=2**32 - 1)  # what numpy's generators take
PROBABILITY = Bounds(low=0, high=1, high_open=True)  # dropping everything, or a beta of 1, leaves nothing to train
