"""How many threads a step is computed with, where the server's own work needs a processor too.

A step of a small model is many small operators. Several threads gain little there, and those that wait for the next operator
spin on processors that requests are read and answers written on; a large model gains nearly as much as there are threads.
So it is tried out once, when the model has been loaded.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_LARGE_SECONDS = 0.5  # a step that takes one thread so long is worth all processors, and trying it out more would take long too
_WORTH = 1.5  # times faster that all threads must be than one
_REPEATS = 7


def best_threads(step: Callable[[], object]) -> int | None:
    """1 when one thread is nearly as fast as all; None: as torch does it, also when the environment says how many.

    `step` computes one step; it is called some times.
    """
    every = torch.get_num_threads()
    if every == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    with using_threads(1):
        one = _fastest(step)
    if one > _LARGE_SECONDS:
        return None
    return 1 if one < _WORTH * _fastest(step) else None


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Let this thread compute with so many threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def _fastest(step: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, fewer when they take long."""
    least, end = float("inf"), time.perf_counter() + _LARGE_SECONDS
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        step()
        least = min(least, time.perf_counter() - begin)
        if time.perf_counter() > end:
            break
    return least
