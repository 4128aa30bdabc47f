"""The pool of worker processes: order, bounds, and how failures come out."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_llm.data import worker_pool
from megatron_llm.data.worker_failures import WorkerFailure
from megatron_llm.data.worker_pool import CannotStartError, WorkerPool
from megatron_llm.utils.errors import UserError


def _square(number: int) -> tuple[int, int]:
    time.sleep(0.002 * (number % 5))  # finished out of order
    return number * number, os.getpid()


def _make_square() -> Callable[[int], tuple[int, int]]:
    return _square


def _fail(how: str, number: int) -> bytes:
    if number == 5:
        if how == "user":
            raise UserError("item 5 is bad")
        if how == "defect":
            raise KeyError("item 5")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    return b"x" * 300_000  # larger than a pipe holds


def _make_fail(how: str) -> Callable[[int], bytes]:
    return partial(_fail, how)


def _make_nothing() -> Callable[[int], int]:
    raise UserError("the worker cannot start")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    with WorkerPool[int, tuple[int, int]](_make_square, workers) as pool:
        results = list(pool.map(range(50)))
    assert [result for result, _ in results] == [number * number for number in range(50)]
    processes = {process for _, process in results}
    assert processes == {os.getpid()} if workers == 0 else os.getpid() not in processes and len(processes) == workers


def test_items_are_taken_only_a_little_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield number

    with WorkerPool[int, tuple[int, int]](_make_square, 2) as pool:
        for given, _ in enumerate(pool.map(items()), start=1):
            assert taken <= given + 8
    assert taken == 200


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", UserError, "^item 5 is bad$"),
        ("defect", WorkerFailure, "a worker process failed:\n(.|\n)*KeyError: 'item 5'"),
        (
            "kill",
            UserError,
            r"worker-\d of 2 worker processes died, killed by SIGKILL \(out of memory is the usual cause.*run the command again",
        ),
        ("exit", UserError, r"worker-\d of 2 worker processes died, with exit status 3; run"),
    ],
)
def test_failures_come_out_at_once(how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), WorkerPool[int, bytes](partial(_make_fail, how), 2) as pool:
        list(pool.map(range(100)))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_cannot_start_say_why(workers: int) -> None:
    with pytest.raises(CannotStartError, match="^the worker cannot start$"), WorkerPool[int, int](_make_nothing, workers) as pool:
        list(pool.map(range(100)))


def _make_once(path: Path) -> Callable[[int], int]:
    with path.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    return _process


def _process(_: int) -> int:
    time.sleep(0.005)
    return os.getpid()


def test_what_workers_need_is_made_once_for_each_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five workers, two forked from one process at most: three processes make it, and none of them is a worker."""
    monkeypatch.setattr(worker_pool, "FAMILY", 2)
    with WorkerPool[int, int](partial(_make_once, tmp_path / "made"), 5) as pool:
        workers = set(pool.map(range(60)))
    made = [int(line) for line in (tmp_path / "made").read_text().splitlines()]
    assert len(workers) == 5 and len(made) == 3 and not workers & set(made)
    assert not any(_alive(process) for process in (*workers, *made))


def _make_broken() -> Callable[[int], int]:
    raise KeyError("a defect")


def test_a_defect_in_what_they_need_keeps_its_stack() -> None:
    with pytest.raises(WorkerFailure, match="KeyError: 'a defect'"), WorkerPool[int, int](_make_broken, 2) as pool:
        list(pool.map(range(3)))


SCRIPT = """
import os, sys
from megatron_llm.data.worker_pool import WorkerPool
from tests.unit.data.test_worker_pool import _make_square
if __name__ == "__main__":
    with WorkerPool(_make_square, 2) as pool:
        results = pool.map(iter(int, 1))
        print(*{next(results)[1] for _ in range(20)}, flush=True)
        sys.stdin.read()
"""


def test_workers_leave_when_the_main_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        workers = list(map(int, main.stdout.readline().split()))
        assert len(workers) == 2
        main.kill()
    deadline = time.monotonic() + 20
    while any(_alive(process) for process in workers):
        assert time.monotonic() < deadline, "the workers outlived the main process"
        time.sleep(0.05)


def _alive(process: int) -> bool:
    """Whether a process runs (a zombie, which waits for a parent that never asks, does not)."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
