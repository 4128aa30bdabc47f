"""A curve of bounded size: however long a run is, at most `limit` points are kept, each standing for equally many steps."""

import math
from collections.abc import Mapping
from typing import Any


class Series:
    """Values by step. Memory, drawing time and saved state stay bounded; values that are not finite are only counted.

    A point is the mean of its steps or, when `average` is off (a loss scale, which is never in between), the last.
    """

    def __init__(self, limit: int = 1000, *, average: bool = True) -> None:
        if limit < 2:
            raise ValueError(f"a series keeps at least 2 points, got {limit}")
        self._limit, self._width, self._average = limit, 1, average
        self._last_steps: list[int] = []
        self._values: list[float] = []
        self._counts: list[int] = []
        self.not_finite = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def steps(self) -> list[int]:
        """The last step of each point."""
        return list(self._last_steps)

    @property
    def values(self) -> list[float]:
        """The value of each point."""
        return list(self._values)

    def add(self, step: int, value: float | None) -> None:
        """Add the value of a later step; None is no value."""
        if value is None:
            return
        if not math.isfinite(value):
            self.not_finite += 1
            return
        if self._counts and self._counts[-1] < self._width:
            self._values[-1], self._counts[-1] = self._join(self._values[-1], self._counts[-1], value, 1)
            self._last_steps[-1] = step
            return
        self._last_steps.append(step)
        self._values.append(value)
        self._counts.append(1)
        if len(self) > self._limit:
            self._halve()

    def drop_after(self, step: int) -> None:
        """Forget the points that hold steps after `step`."""
        keep = sum(last <= step for last in self._last_steps)
        del self._last_steps[keep:], self._values[keep:], self._counts[keep:]

    def smoothed(self, share: float = 0.04) -> list[float]:
        """At each point the mean of the middle of the values around it, in a window of about `share` of the curve.

        The window is centred, so the curve does not lag behind; the highest and lowest tenth is left out, so that a
        spike does not bend it.
        """
        values = self.values
        reach = max(4, round(share * len(values) / 2))
        curve = []
        for position in range(len(values)):
            window = sorted(values[max(position - reach, 0) : position + reach + 1])
            cut = max(len(window) // 10, 1) if len(window) >= 5 else 0
            window = window[cut : len(window) - cut]
            curve.append(sum(window) / len(window))
        return curve

    def state_dict(self) -> dict[str, Any]:
        """The points, in JSON's types."""
        return {
            "width": self._width,
            "last_steps": self.steps,
            "values": self.values,
            "counts": list(self._counts),
            "not_finite": self.not_finite,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._width, self.not_finite = state["width"], state["not_finite"]
        self._last_steps, self._values, self._counts = list(state["last_steps"]), list(state["values"]), list(state["counts"])

    def _join(self, value: float, count: int, later: float, later_count: int) -> tuple[float, int]:
        total = count + later_count
        return ((value * count + later * later_count) / total if self._average else later), total

    def _halve(self) -> None:
        self._width *= 2
        for first in range(0, len(self) - 1, 2):
            joined = self._join(self._values[first], self._counts[first], self._values[first + 1], self._counts[first + 1])
            self._values[first + 1], self._counts[first + 1] = joined
        # The second of each pair now stands for both; an odd last point stays as it is.
        keep = [*range(1, len(self), 2), *([len(self) - 1] if len(self) % 2 else [])]
        self._last_steps = [self._last_steps[position] for position in keep]
        self._values, self._counts = [self._values[position] for position in keep], [self._counts[position] for position in keep]
