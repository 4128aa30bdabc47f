"""Whatever happens to one rank, all leave soon and the first failing one is named. Real processes, two of the tests under torchrun."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel import shm
from megatron_llm.parallel.failure import rank_guard
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.heartbeat import PhaseTracker
from megatron_llm.utils.errors import UserError

ROOT = Path(__file__).parents[2]
GRID = Grid(tp=2, dp=1, pp=2)
INTERVAL = 0.2


def barrier(phase: PhaseTracker, step: int) -> None:
    phase.enter("barrier", step=step)
    dist.barrier()


def one_raises(rank: int, phase: PhaseTracker) -> None:
    barrier(phase, 0)
    if rank == 3:
        phase.enter("load data", step=1)
        raise UserError("train.idx is truncated")
    barrier(phase, 1)


def one_has_a_defect(rank: int, phase: PhaseTracker) -> None:
    if rank == 1:
        phase.enter("forward", step=0)
        torch.zeros(2) @ torch.zeros(3)
    barrier(phase, 0)


def all_raise_the_same(rank: int, phase: PhaseTracker) -> None:
    raise UserError("TP 3 does not divide 4 heads")


def one_is_killed(rank: int, phase: PhaseTracker) -> None:
    barrier(phase, 0)
    if rank == 2:
        phase.enter("save checkpoint", step=1)
        time.sleep(4 * INTERVAL)
        os.kill(os.getpid(), signal.SIGKILL)
    barrier(phase, 1)


def one_is_killed_and_nobody_communicates(rank: int, phase: PhaseTracker) -> None:
    if rank == 2:
        time.sleep(4 * INTERVAL)
        os.kill(os.getpid(), signal.SIGKILL)
    phase.enter("count", step=7)
    time.sleep(3600)


def one_hangs(rank: int, phase: PhaseTracker) -> None:
    barrier(phase, 0)
    if rank == 1:
        phase.enter("load data", step=1)
        time.sleep(3600)
    time.sleep(5 * INTERVAL)
    barrier(phase, 1)


def one_takes_its_time(rank: int, phase: PhaseTracker) -> None:
    barrier(phase, 0)
    if rank == 0:
        phase.enter("build index", patience=60.0)
        time.sleep(4.5)  # longer than the guard's timeout
    barrier(phase, 1)


def nothing_happens(rank: int, phase: PhaseTracker) -> None:
    barrier(phase, 0)
    phase.enter("write files")
    time.sleep(4 * INTERVAL if rank == 0 else 0.0)


def clean_exit(rank: int, phase: PhaseTracker) -> None:
    raise SystemExit(0)


def guarded(name: str, rank: int, store_file: str, log: str, backend: str) -> None:
    """Body of one test process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store, phase = dist.FileStore(store_file, GRID.world_size), PhaseTracker()
    phase.enter("start up", patience=60.0)
    if backend == shm.BACKEND:
        shm.register()
    with rank_guard(GRID, rank, store, phase, timeout=3.0 if name in ("one_hangs", "one_takes_its_time") else 60.0, interval=INTERVAL):
        dist.init_process_group(
            backend, store=dist.PrefixStore("pg", store), rank=rank, world_size=GRID.world_size, timeout=timedelta(seconds=60)
        )
        globals()[name](rank, phase)


def run_guarded(
    body: Callable[[int, PhaseTracker], None], folder: Path, backend: str = "gloo"
) -> tuple[list[int | None], list[str], float]:
    """Exit codes and outputs of four ranks, and the seconds until all had left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "pytest"])
    logs = [folder / f"{rank}.log" for rank in range(GRID.world_size)]
    processes = [
        context.Process(target=guarded, args=(body.__name__, rank, str(folder / "store"), str(logs[rank]), backend))
        for rank in range(GRID.world_size)
    ]
    for process in processes:
        process.start()
    start = time.monotonic()
    for process in processes:
        process.join(60)
    seconds = time.monotonic() - start
    running = [process for process in processes if process.is_alive()]
    for process in running:
        process.kill()
        process.join()
    assert not running, "every rank leaves"
    return [process.exitcode for process in processes], [log.read_text() for log in logs], seconds


def test_a_rank_that_raises_is_named_by_all(tmp_path: Path) -> None:
    codes, logs, seconds = run_guarded(one_raises, tmp_path)
    line = "first failure: rank 3 (tp 1, dp 0, pp 1) in step 1, load data: UserError: train.idx is truncated"
    assert codes == [1, 1, 1, 1]
    assert logs[3].strip() == line, "a bad input is one line, without a stack"
    for rank in (0, 1, 2):
        assert f"rank {rank} (" in logs[rank]
        assert "leaves step 1, barrier" in logs[rank]
        assert logs[rank].strip().endswith(line)
    assert seconds < 30


def test_a_defect_shows_its_stack_on_its_rank_only(tmp_path: Path) -> None:
    codes, logs, _ = run_guarded(one_has_a_defect, tmp_path)
    assert codes == [1, 1, 1, 1]
    assert "Traceback" in logs[1] and "in one_has_a_defect" in logs[1]
    assert "first failure: rank 1 (tp 1, dp 0, pp 0) in step 0, forward: RuntimeError: " in logs[1]
    assert not any("Traceback" in logs[rank] for rank in (0, 2, 3))


def test_what_every_rank_raises_is_told_once(tmp_path: Path) -> None:
    codes, logs, _ = run_guarded(all_raise_the_same, tmp_path)
    assert codes == [1, 1, 1, 1]
    assert sum(log.strip().startswith("first failure: rank") for log in logs) == 1
    for log in logs:
        assert log.count("\n") <= 1


@pytest.mark.parametrize(
    ("body", "where", "backend"),
    [
        (one_is_killed, "step 1, save checkpoint", "gloo"),
        (one_is_killed_and_nobody_communicates, "step 7, count", "gloo"),
        pytest.param(
            one_is_killed,
            "step 1, save checkpoint",
            "shm",
            marks=pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable"),
        ),
    ],
)
def test_a_killed_rank_is_named_by_the_others(body: Callable[[int, PhaseTracker], None], where: str, backend: str, tmp_path: Path) -> None:
    codes, logs, seconds = run_guarded(body, tmp_path, backend)
    assert codes == [1, 1, -signal.SIGKILL, 1]
    for rank in (0, 1, 3):
        assert "first failure: rank 2 (tp 0, dp 0, pp 1) in" in logs[rank]
        assert "died without a word" in logs[rank]
    if body is one_is_killed:
        assert where in logs[0]
    assert seconds < 30


def test_a_hanging_rank_is_named_and_shows_its_stack(tmp_path: Path) -> None:
    codes, logs, seconds = run_guarded(one_hangs, tmp_path)
    assert codes == [1, 1, 1, 1]
    for rank in range(4):
        assert "first failure: rank 1 (tp 1, dp 0, pp 0) in step 1, load data: did not move on for" in logs[rank]
    assert "in one_hangs" in logs[1], "the hanging rank shows its stack"
    assert "in barrier" not in logs[0], "the waiting ranks do not"
    assert seconds < 30


@pytest.mark.parametrize("body", [nothing_happens, clean_exit, one_takes_its_time])
def test_ranks_that_end_well_leave_with_status_zero(body: Callable[[int, PhaseTracker], None], tmp_path: Path) -> None:
    codes, logs, _ = run_guarded(body, tmp_path)
    assert codes == [0, 0, 0, 0]
    assert logs == ["", "", "", ""]


SCRIPT = """
import os, signal, sys, time
import torch.distributed as dist
from megatron_llm.parallel.failure import rank_guard
from megatron_llm.parallel.heartbeat import PhaseTracker
from megatron_llm.parallel.grid import Grid
from megatron_llm.utils.errors import UserError

def main():
    if sys.argv[1] == "kill":
        signal.signal(signal.SIGTERM, lambda *_: None)  # a trainer that wants to save first
    store, rank, world = next(dist.rendezvous("env://"))
    phase = PhaseTracker()
    with rank_guard(Grid.from_world(world, tp=2, pp=1), rank, store, phase, interval=0.3):
        dist.init_process_group("gloo", store=dist.PrefixStore("pg", store), rank=rank, world_size=world)
        for step in range(1000):
            phase.enter("data", step=step)
            if step == 3 and rank == 1:
                if sys.argv[1] == "raise":
                    raise UserError("the disk is full")
                time.sleep(0.7)
                os.kill(os.getpid(), signal.SIGKILL)
            phase.enter("barrier")
            dist.barrier()

main()
"""


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("raise", "first failure: rank 1 (tp 1, dp 0, pp 0) in step 3, data: UserError: the disk is full"),
        ("kill", "first failure: rank 1 (tp 1, dp 0, pp 0) in step 3, data: died without a word"),
    ],
    ids=["raise", "kill"],
)
def test_under_torchrun(how: str, line: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), how],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert line in done.stderr
    assert "rank 0 (tp 0, dp 0, pp 0) leaves step 3, barrier" in done.stderr
    cause = done.stderr.split("Root Cause")[1]
    assert "rank      : 1 (local_rank: 1)" in cause, "the launcher blames the right rank too"
    assert (line if how == "raise" else "SIGKILL") in cause
