"""A curve of bounded size: however long a run is, at most `limit` points are kept, each the mean of equally many steps."""

import math
from collections.abc import Mapping
from typing import Any


class Series:
    """Values by step. Memory, drawing time and saved state stay bounded; values that are not finite are only counted."""

    def __init__(self, limit: int = 1000) -> None:
        if limit < 2:
            raise ValueError(f"a series keeps at least 2 points, got {limit}")
        self._limit, self._width = limit, 1
        self._last_steps: list[int] = []
        self._sums: list[float] = []
        self._counts: list[int] = []
        self.not_finite = 0

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def steps(self) -> list[int]:
        """The last step of each point."""
        return list(self._last_steps)

    @property
    def values(self) -> list[float]:
        """The mean over the steps of each point."""
        return [total / count for total, count in zip(self._sums, self._counts, strict=True)]

    def add(self, step: int, value: float | None) -> None:
        """Add the value of a later step; None is no value."""
        if value is None:
            return
        if not math.isfinite(value):
            self.not_finite += 1
            return
        if self._counts and self._counts[-1] < self._width:
            self._last_steps[-1] = step
            self._sums[-1] += value
            self._counts[-1] += 1
            return
        self._last_steps.append(step)
        self._sums.append(value)
        self._counts.append(1)
        if len(self) > self._limit:
            self._halve()

    def drop_after(self, step: int) -> None:
        """Forget the points that hold steps after `step`."""
        keep = sum(last <= step for last in self._last_steps)
        del self._last_steps[keep:], self._sums[keep:], self._counts[keep:]

    def smoothed(self, share: float = 0.03) -> list[float]:
        """Exponential moving average whose memory is about `share` of the curve, without the bias towards the first value."""
        decay = 1.0 - 1.0 / max(share * len(self), 1.0)
        mean, weight, curve = 0.0, 0.0, []
        for value in self.values:
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
            curve.append(mean / weight)
        return curve

    def state_dict(self) -> dict[str, Any]:
        """The points, in JSON's types."""
        return {
            "width": self._width,
            "last_steps": self.steps,
            "sums": list(self._sums),
            "counts": list(self._counts),
            "not_finite": self.not_finite,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._width, self.not_finite = state["width"], state["not_finite"]
        self._last_steps, self._sums, self._counts = list(state["last_steps"]), list(state["sums"]), list(state["counts"])

    def _halve(self) -> None:
        self._width *= 2
        self._last_steps = [self._last_steps[min(i + 1, len(self) - 1)] for i in range(0, len(self), 2)]
        self._sums = [sum(self._sums[i : i + 2]) for i in range(0, len(self._sums), 2)]
        self._counts = [sum(self._counts[i : i + 2]) for i in range(0, len(self._counts), 2)]
