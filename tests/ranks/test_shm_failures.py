"""What the ranks of a shared-memory group are told when one is late, wrong, gone or out of memory; and that nothing is left behind."""

import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel import shm
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.pool import RankError
from megatron_llm.testing.ranks import run_ranks
from tests.ranks.test_shm_collectives import shm_group

pytestmark = pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")

Message = tuple[str, float]


def named() -> list[str]:
    """What lies in /dev/shm, without the semaphores and blocks that Python's and torch's own processes keep there."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "psm_", "torch_")))


def impatient(seconds: float = 1.0) -> dist.ProcessGroup:
    shm.register()
    group = dist.new_group(backend="shm", timeout=timedelta(seconds=seconds))
    assert group is not None
    return group


def message_of(call: Callable[[], object]) -> Message:
    """The error of a call and the seconds until it came."""
    start = time.monotonic()
    with pytest.raises(dist.DistBackendError) as caught:
        call()
    return str(caught.value), time.monotonic() - start


def late_for_a_collective(groups: ParallelGroups) -> list[Message]:
    group = impatient()
    dist.barrier(group=group)
    dist.barrier(group=group)
    if groups.rank == 2:
        dist.barrier()  # gloo: until the others have given up
        return [message_of(lambda: dist.barrier(group=group))]
    tensor = torch.ones(100_000)
    work = dist.all_reduce(tensor, group=group, async_op=True)
    found = [message_of(work.wait)]
    assert isinstance(work.exception(), dist.DistBackendError) and not work.is_success()
    found.append(message_of(lambda: dist.all_reduce(tensor, group=group)))
    dist.barrier()
    return found


def late_for_a_transfer(groups: ParallelGroups) -> list[Message]:
    group = impatient()
    if groups.rank == 1:
        dist.barrier()
        return []
    work = dist.irecv(torch.empty(4), 1, group=group, tag=7)
    assert work is not None
    short = message_of(lambda: work.wait(timedelta(milliseconds=300)))
    dist.barrier()
    return [short]


def different_calls(groups: ParallelGroups) -> list[Message]:
    group = shm_group()
    if groups.rank == 0:
        return [message_of(lambda: dist.all_reduce(torch.ones(4), group=group))]
    return [message_of(lambda: dist.all_reduce(torch.ones(5), group=group))]


def different_sizes(groups: ParallelGroups) -> list[Message]:
    group = shm_group()
    if groups.rank == 0:
        dist.send(torch.ones(4), 1, group=group)
        return []
    return [message_of(lambda: dist.recv(torch.ones(5), 0, group=group))]


def wrong_arguments(groups: ParallelGroups) -> None:
    group = shm_group()
    for call, error, text in (
        (lambda: dist.all_reduce(torch.ones(3), op=dist.ReduceOp.BOR, group=group), TypeError, "not defined for tensors of type Float"),
        (lambda: dist.all_reduce(torch.ones(3, dtype=torch.int64), op=dist.ReduceOp.AVG, group=group), TypeError, "Long"),
        (lambda: dist.all_reduce(torch.ones(3).to(torch.float8_e4m3fn), group=group), TypeError, "cannot reduce"),
        (lambda: dist.all_gather_into_tensor(torch.ones(3), torch.ones(3), group=group), ValueError, "2 times as large"),
        (lambda: dist.all_reduce(torch.ones(3).to_sparse(), group=group), ValueError, "dense"),
    ):
        with pytest.raises(error, match=text):
            call()
    total = torch.ones(3)  # a refused call leaves the group usable
    dist.all_reduce(total, group=group)
    assert total.tolist() == [2.0] * 3


def killed(groups: ParallelGroups, how: str) -> None:
    group = shm_group()
    received = torch.empty(3_000_000)
    dist.barrier(group=group)
    if groups.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        if how == "collective":
            dist.all_reduce(torch.ones(10), group=group)
        elif how == "receive":
            dist.recv(received, 1, group=group)
        else:
            dist.send(received, 1, group=group)
    except dist.DistBackendError as error:
        raise AssertionError(f"{error} after {time.monotonic() - start:.2f} s") from error


def aborted(groups: ParallelGroups) -> list[Message]:
    group = shm_group()
    dist.barrier(group=group)
    if groups.rank == 0:
        work = dist.all_reduce(torch.ones(10), group=group, async_op=True)
        time.sleep(0.2)
        group.abort()
        return [message_of(work.wait)]
    time.sleep(0.4)
    return [message_of(lambda: dist.recv(torch.ones(10), 0, group=group))]


def taken_down(groups: ParallelGroups) -> list[Message]:
    group = shm_group()
    dist.barrier(group=group)
    if groups.rank == 0:
        dist.destroy_process_group(group)
        return []
    return [message_of(lambda: dist.all_reduce(torch.ones(10), group=group))]


def no_room(groups: ParallelGroups) -> list[Message]:
    if groups.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 31, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        return [message_of(shm_group)]
    finally:
        if groups.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_late_rank_is_named() -> None:
    first, second, late = run_ranks(late_for_a_collective, dp=3)
    for name, found in (("rank 0", first), ("rank 1", second)):
        texts, seconds = zip(*found, strict=True)
        assert any("all_reduce (number 3 of the group of ranks 0, 1, 2)" in text for text in texts[:1])
        assert "not arrived: rank 2 (process" in texts[0] or "has given up" in texts[0], (name, texts)
        assert 0.5 < seconds[0] < 5
        assert seconds[1] < 0.5, "a group that has failed stays failed"
    assert any("timed out" in text for text, _ in first + second)
    assert "given up" in late[0][0]


def test_a_late_transfer_is_named() -> None:
    found, _ = run_ranks(late_for_a_transfer, dp=2)
    assert "timed out: rank 0 waited" in found[0][0]
    assert "receive of 16 bytes with tag 7 from rank 1" in found[0][0]
    assert found[0][1] < 3


def test_calls_that_do_not_fit_are_refused() -> None:
    for found in run_ranks(different_calls, dp=2):
        assert "was asked for something else" in found[0][0] or "given up" in found[0][0]
    _, found = run_ranks(different_sizes, dp=2)
    assert "sent 16 bytes for the receive of 20 bytes" in found[0][0]


def test_wrong_arguments_are_refused_before_anybody_waits() -> None:
    run_ranks(wrong_arguments, dp=2)


@pytest.mark.parametrize("how", ["collective", "receive", "send"])
def test_a_killed_rank_is_noticed_within_a_second(how: str) -> None:
    before = named()
    with pytest.raises(RankError) as caught:
        run_ranks(killed, how, dp=2, timeout=30)
    text = str(caught.value)
    assert "rank 1 (tp 0, dp 1, pp 0) died: killed by signal 9" in text
    assert "connection lost, rank 1 (process" in text and "has died while rank 0 waited for it" in text
    assert float(text.rpartition(" after ")[2].split()[0]) < 1.5
    assert named() == before


def test_an_aborted_group_ends_every_wait() -> None:
    for found in run_ranks(aborted, dp=2):
        assert "abort" in found[0][0]
        assert found[0][1] < 2


def test_a_group_that_a_rank_has_left() -> None:
    _, found = run_ranks(taken_down, dp=2)
    assert "rank 0 (process" in found[0][0] and "has left the group while rank 1 waited for it" in found[0][0]


def test_no_room_is_said_by_every_rank() -> None:
    for found in run_ranks(no_room, dp=2):
        assert (
            "KiB of shared memory for the group of ranks 0, 1 (File too large): give the container or the user more memory" in found[0][0]
        )


def nothing_named(groups: ParallelGroups) -> list[str]:
    group = shm_group()
    dist.all_reduce(torch.ones(10), group=group)
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]


def test_nothing_has_a_name_in_dev_shm() -> None:
    before = named()
    assert run_ranks(nothing_named, dp=2) == [[], []]
    assert named() == before
