"""The rank harness itself: results, first failing rank, hangs with stacks, dead processes, warm workers, no orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.pool import RankError
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.utils.errors import UserError


def coordinates(groups: ParallelGroups, tensor: torch.Tensor, *, scale: float) -> tuple[dict[str, int], torch.Tensor, int]:
    return groups.grid.coords(groups.rank), tensor * scale + groups.rank, groups.dp.size


def test_results_come_in_rank_order_as_copies() -> None:
    sent = torch.arange(3.0)
    results = run_ranks(coordinates, sent, tp=2, dp=2, scale=2.0)
    assert [coords for coords, _, _ in results] == [
        {"tp": 0, "dp": 0, "pp": 0},
        {"tp": 1, "dp": 0, "pp": 0},
        {"tp": 0, "dp": 1, "pp": 0},
        {"tp": 1, "dp": 1, "pp": 0},
    ]
    for rank, (_, tensor, dp_size) in enumerate(results):
        assert torch.equal(tensor, sent * 2 + rank)
        assert dp_size == 2
    assert torch.equal(sent, torch.arange(3.0))


def sum_over_every_group(groups: ParallelGroups) -> list[float]:
    sums = []
    for group in (groups.tp, groups.dp, groups.pp, groups.model, groups.embedding, groups.world):
        value = torch.tensor([float(groups.rank)])
        if group.pg is not None:
            dist.all_reduce(value, group=group.pg)
        sums.append(value.item())
    return sums


def test_eight_ranks_have_working_groups() -> None:
    results = run_ranks(sum_over_every_group, tp=2, dp=2, pp=2)
    assert results[0] == [0 + 1, 0 + 2, 0 + 4, 0 + 1 + 4 + 5, 0 + 4, 28]
    assert results[7] == [6 + 7, 5 + 7, 3 + 7, 2 + 3 + 6 + 7, 3 + 7, 28]


def one_rank(groups: ParallelGroups) -> tuple[int, bool, int]:
    return dist.get_world_size(), groups.tp.pg is None, torch.get_num_threads()


def test_one_rank_has_a_real_process_group() -> None:
    assert run_ranks(one_rank) == [(1, True, 1)]


def draw(groups: ParallelGroups) -> float:
    torch.set_default_dtype(torch.float64)
    return float(torch.rand((), dtype=torch.float32))


def test_every_job_starts_from_the_same_state() -> None:
    first = run_ranks(draw, tp=2)
    assert run_ranks(draw, tp=2) == first
    assert first[0] == first[1]


def fail_on_rank_two(groups: ParallelGroups) -> None:
    if groups.rank == 2:
        raise UserError("the layer count is odd")
    dist.barrier()


def test_the_first_failing_rank_is_named_with_its_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(fail_on_rank_two, tp=2, pp=2, timeout=60)
    text = str(caught.value)
    assert text.startswith("rank 2 (tp 0, dp 0, pp 1) failed first: megatron_llm.utils.errors.UserError: the layer count is odd")
    assert "in fail_on_rank_two" in text
    assert caught.value.rank == 2
    assert caught.value.error_type == "UserError"
    for other in (0, 1, 3):
        lines = [line for line in text.splitlines() if f"rank {other} (" in line]
        assert len(lines) == 1, "a rank that failed as a consequence gets one line"
    assert time.monotonic() - start < 20


def hang_on_rank_one(groups: ParallelGroups) -> None:
    if groups.rank == 1:
        sleep_long()
    dist.barrier()


def sleep_long() -> None:
    time.sleep(3600)


def test_a_hang_shows_every_ranks_stack() -> None:
    run_ranks(one_rank, tp=2)  # workers are up, so that the time below is the job's
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(hang_on_rank_one, tp=2, timeout=1.0)
    assert time.monotonic() - start < 15
    text = str(caught.value)
    head, second = text.split("rank 1 (tp 1, dp 0, pp 0):")
    assert "no answer within 1 s from 2 of 2 ranks" in head
    assert "in barrier" in head and "in hang_on_rank_one" in head
    assert "in sleep_long" in second
    assert "leave_with_parent" not in text
    assert run_ranks(one_rank, tp=2)[0][0] == 2, "hanging workers are replaced"


def die_on_rank_one(groups: ParallelGroups, how: str) -> None:
    if groups.rank == 1:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.parametrize(("how", "words"), [("exit", "left with exit code 7"), ("kill", "killed by signal 9")])
def test_a_dead_process_is_reported_at_once(how: str, words: str) -> None:
    run_ranks(one_rank, dp=2)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(die_on_rank_one, how, dp=2, timeout=60)
    assert time.monotonic() - start < 15
    assert str(caught.value).startswith(f"rank 1 (tp 0, dp 1, pp 0) died: {words}")
    assert caught.value.error_type == "ProcessDied"
    assert run_ranks(one_rank, dp=2)[0][0] == 2, "dead workers are replaced"


def process_id(groups: ParallelGroups) -> int:
    return os.getpid()


def test_workers_are_reused_and_jobs_are_quick(capsys: pytest.CaptureFixture[str]) -> None:
    pids = run_ranks(process_id, tp=2)
    costs = []
    for _ in range(5):
        start = time.monotonic()
        assert run_ranks(process_id, tp=2) == pids
        costs.append(time.monotonic() - start)
    with capsys.disabled():
        print(f" [a job on 2 warm ranks: {min(costs) * 1000:.0f} ms] ", end="")
    assert min(costs) < 2.0, "starting a Python with torch for each job would take longer"


def talk(groups: ParallelGroups) -> None:
    print(f"hello from {groups.describe()}")


def test_what_ranks_print_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(talk, tp=2)
    out = capsys.readouterr().out
    assert "[rank 0] hello from rank 0 (tp 0, dp 0, pp 0)" in out
    assert "[rank 1] hello from rank 1 (tp 1, dp 0, pp 0)" in out


def unpicklable(groups: ParallelGroups) -> object:
    return lambda: None


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank() -> None:
    with pytest.raises(RankError, match=r"rank 0 .*pickle"):
        run_ranks(unpicklable)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="module-level function"):
        run_ranks(lambda groups: None)


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            from megatron_llm.testing.ranks import run_ranks

            def hang(groups, folder):
                open(f"{folder}/{os.getpid()}.pid", "w").close()
                time.sleep(3600)

            if __name__ == "__main__":
                import sys
                run_ranks(hang, sys.argv[1], tp=2, timeout=600)
            """
        )
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 120), "both ranks should have started"
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert wait_until(lambda: not any(is_running(pid) for pid in pids), 10), "workers leave with their parent"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
