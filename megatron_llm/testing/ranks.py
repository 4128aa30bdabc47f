"""Run a function on several ranks of this machine: the one harness of every multi-process test.

    def double(groups, value):                      # a module-level function; ranks find it by its name
        return value * 2 + groups.rank

    assert run_ranks(double, 10, tp=2, pp=2) == [20, 21, 22, 23]

Ranks are processes that meet through a file (no ports), with one torch thread each and a fresh random state. Their groups
are gloo's, which is everywhere; `backend="shm"`, or MEGATRON_LLM_TEST_BACKEND=shm for all, takes shared memory.
Arguments and results are pickled, so tensors arrive as copies.

Every worker imports the module of `fn` once, so a test module that imports something heavy (transformers) for its own
part does that inside the function which needs it.
"""

import atexit
import functools
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

from megatron_llm.parallel.grid import Grid
from megatron_llm.testing.pool import Pool
from megatron_llm.testing.worker import unpack


def run_ranks(
    fn: Callable[..., Any],
    *args: Any,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    timeout: float = 60.0,
    backend: str | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run `fn(groups, *args, **kwargs)` on tp x pp x dp ranks and return each rank's result in rank order.

    `fn` is a module-level function (or a static method), found in the workers by module and name. One rank too runs in
    a worker, with a real process group of one. What ranks print is printed here after the job, with the rank in front.
    `backend` of the groups: gloo unless given here or by MEGATRON_LLM_TEST_BACKEND.

    Raises RankError with the coordinates and stack of the rank that failed first, at once when a process dies, and
    with every rank's Python stack when the job takes longer than `timeout` seconds.
    """
    module = sys.modules[fn.__module__]
    found: Any = module
    for part in fn.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not fn:
        raise ValueError(f"run_ranks needs a module-level function that workers can find by name, got {fn.__module__}.{fn.__qualname__}")
    grid = Grid(tp=tp, dp=dp, pp=pp)
    name = fn.__module__ if fn.__module__ != "__main__" else "__mp_main__"
    file = getattr(module, "__file__", None)
    chosen = backend or os.environ.get("MEGATRON_LLM_TEST_BACKEND", "gloo")
    results = session_pool(os.getpid()).run(grid, timeout, name, file, fn.__qualname__, pickle.dumps((args, kwargs)), chosen)
    return [unpack(result) for result in results]


@functools.lru_cache(maxsize=1)
def session_pool(process: int) -> Pool:
    """The pool of this process (a forked child makes its own), closed when the interpreter exits."""
    assert process == os.getpid(), "the pool belongs to the process that made it"
    pool = Pool()
    atexit.register(pool.close)
    return pool
