"""Counters of the server in Prometheus' text format: requests, tokens, times, queue, memory."""

import resource
import threading
from collections import Counter
from pathlib import Path

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PREFIX = "megatron_llm_"


class Histogram:
    """Seconds, counted in buckets that Prometheus turns into percentiles."""

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.total, self.number = 0.0, 0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.total += seconds
        self.number += 1
        for place, bound in enumerate(_BOUNDS):
            self.counts[place] += seconds <= bound

    def lines(self, name: str) -> list[str]:
        """The lines of this histogram."""
        buckets = [f'{name}_bucket{{le="{bound:g}"}} {count}' for bound, count in zip(_BOUNDS, self.counts, strict=True)]
        return [*buckets, f'{name}_bucket{{le="+Inf"}} {self.number}', f"{name}_sum {self.total:.6f}", f"{name}_count {self.number}"]


class Metrics:
    """What is counted. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._prompt_tokens = self._tokens = self._running = self._waiting = 0
        self._seconds, self._first = Histogram(), Histogram()

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """A request to `route` ended with this HTTP status after so many seconds."""
        with self._lock:
            self._requests[route, status] += 1
            self._seconds.observe(seconds)

    def count_prompt(self, tokens: int) -> None:
        """A prompt was read."""
        with self._lock:
            self._prompt_tokens += tokens

    def count_tokens(self, number: int) -> None:
        """So many tokens were chosen."""
        with self._lock:
            self._tokens += number

    def observe_first_token(self, seconds: float) -> None:
        """From a request's arrival to its first token."""
        with self._lock:
            self._first.observe(seconds)

    def set_queue(self, running: int, waiting: int) -> None:
        """How many answers run and wait now."""
        with self._lock:
            self._running, self._waiting = running, waiting

    def text(self) -> str:
        """The page that Prometheus reads."""
        with self._lock:
            lines = []
            for name, kind, what, values in self._values():
                lines += [f"# HELP {_PREFIX}{name} {what}", f"# TYPE {_PREFIX}{name} {kind}"]
                lines += [value if value.startswith(_PREFIX) else f"{_PREFIX}{name}{value}" for value in values]
        return "\n".join(lines) + "\n"

    def _values(self) -> list[tuple[str, str, str, list[str]]]:
        requests = [f'{{route="{route}",status="{status}"}} {count}' for (route, status), count in sorted(self._requests.items())]
        return [
            ("requests_total", "counter", "Requests that ended, by route and HTTP status.", requests),
            ("prompt_tokens_total", "counter", "Tokens of prompts read.", [f" {self._prompt_tokens}"]),
            ("generated_tokens_total", "counter", "Tokens generated.", [f" {self._tokens}"]),
            ("running_answers", "gauge", "Answers being computed.", [f" {self._running}"]),
            ("waiting_answers", "gauge", "Answers waiting for a place.", [f" {self._waiting}"]),
            ("resident_memory_bytes", "gauge", "Memory of the process.", [f" {resident_bytes()}"]),
            ("request_seconds", "histogram", "Duration of requests.", self._seconds.lines(f"{_PREFIX}request_seconds")),
            ("first_token_seconds", "histogram", "Arrival to first token.", self._first.lines(f"{_PREFIX}first_token_seconds")),
        ]


def resident_bytes() -> int:
    """Memory of this process now, where the system tells it; otherwise the most it ever had."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
