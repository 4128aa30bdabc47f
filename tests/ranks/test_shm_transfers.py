"""Sends and receives over shared memory, operations that go on in the background, and several groups at once."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel import shm
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from tests.ranks.test_shm_collectives import shm_group, values

pytestmark = pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")

LARGE = 3_000_001  # elements: 12 MB, several times a ring


def tags_and_sizes(groups: ParallelGroups) -> None:
    group, rank = shm_group(), groups.rank
    other = 1 - rank
    sizes = [1, 1021, 0, LARGE, 7, 300_000]
    received = [torch.full((size,), -1.0) for size in sizes]
    sends = [dist.isend(values(size, torch.float32, rank + 10 * tag), other, group=group, tag=tag) for tag, size in enumerate(sizes)]
    for tag in (4, 0, 5, 2, 3, 1):  # another order than they were sent in
        dist.recv(received[tag], other, group=group, tag=tag)
    for work in sends:
        work.wait()
    for tag, size in enumerate(sizes):
        assert torch.equal(received[tag], values(size, torch.float32, other + 10 * tag)), tag
    # Two with one tag keep their order; a strided tensor is sent and filled by its elements.
    first, second, grid = torch.empty(3), torch.empty(3), torch.zeros(4, 5).t()
    posted = [dist.irecv(tensor, other, group=group, tag=8) for tensor in (first, second, grid)]
    for tensor in (torch.full((3,), 1.0), torch.full((3,), 2.0), torch.arange(20.0).view(4, 5).t()):
        dist.send(tensor, other, group=group, tag=8)
    for work in posted:
        work.wait()
    assert first.tolist() == [1] * 3 and second.tolist() == [2] * 3
    assert torch.equal(grid, torch.arange(20.0).view(4, 5).t())


def around_the_ring(groups: ParallelGroups) -> None:
    group, size, rank = shm_group(), groups.world.size, groups.rank
    for count in (5, 40_000, LARGE):
        received = torch.empty(count, dtype=torch.bfloat16)
        operations = [
            dist.P2POp(dist.isend, torch.full((count,), rank, dtype=torch.bfloat16), group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        assert bool((received == (rank - 1) % size).all())


def from_anybody(groups: ParallelGroups) -> None:
    group, size, rank = shm_group(), groups.world.size, groups.rank
    if rank:
        dist.send(torch.tensor([rank * 10]), 0, group=group, tag=3)
        dist.send_object_list([f"from {rank}"], 0, group=group)
        return
    seen = {}
    for _ in range(size - 1):
        tensor = torch.empty(1, dtype=torch.int64)
        source = dist.recv(tensor, group=group, tag=3)
        seen[source] = int(tensor)
    assert seen == {other: other * 10 for other in range(1, size)}
    for other in range(1, size):
        told: list[object] = [None]
        dist.recv_object_list(told, other, group=group)
        assert told == [f"from {other}"]


def background(groups: ParallelGroups) -> None:
    group, rank = shm_group(), groups.rank
    # A rank that is late holds nobody up before the wait, for a collective and for transfers larger than a ring.
    total, received = torch.full((LARGE,), float(rank)), torch.empty(LARGE)
    dist.barrier(group=group)
    if rank:
        time.sleep(0.5)
    start = time.monotonic()
    works = [
        dist.all_reduce(total, group=group, async_op=True),
        dist.isend(torch.full((LARGE,), rank + 5.0), 1 - rank, group=group),
        dist.irecv(received, 1 - rank, group=group),
    ]
    posted = time.monotonic() - start
    if rank == 0:
        assert posted < 0.4
        assert not works[0].is_completed()
        assert not works[2].is_completed()
    # Nobody waits: polling alone must see all of it end, since threads of the groups' own move it.
    end = time.monotonic() + 30
    while not all(work.is_completed() for work in works) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(work.is_completed() and work.is_success() for work in works)
    assert bool((total == 1).all()) and bool((received == 6 - rank).all())
    future = dist.all_reduce(total, group=group, async_op=True).get_future()
    future.wait()
    assert bool((future.value()[0] == 2).all())


def a_full_ring_and_another_group(groups: ParallelGroups) -> None:
    """Rank 0 waits for its send before the collective that rank 1 is already in: the posted receive must drain the ring."""
    group, rank = shm_group(), groups.rank
    second = shm_group()
    if rank == 0:
        time.sleep(0.2)
        dist.send(torch.ones(LARGE), 1, group=group)
        dist.barrier(group=second)
        return
    received = torch.zeros(LARGE)
    work = dist.irecv(received, 0, group=group)
    dist.barrier(group=second)
    work.wait()
    assert bool((received == 1).all())


def opposite_orders(groups: ParallelGroups) -> None:
    first, second, rank = shm_group(), shm_group(), groups.rank
    tensors = [torch.full((100_003,), float(rank + i)) for i in range(2)]
    order = (0, 1) if rank % 2 == 0 else (1, 0)
    works = [dist.all_reduce(tensors[i], group=(first, second)[i], async_op=True) for i in order]
    for work in works:
        work.wait()
    ranks = sum(range(groups.world.size))
    assert [int(t[-1]) for t in tensors] == [ranks, ranks + groups.world.size]


def several_threads(groups: ParallelGroups) -> None:
    """Threads of one rank use groups of their own at once, and one thread polls another's transfer."""
    own = [shm_group() for _ in range(3)]
    wrong: list[int] = []

    def train(index: int) -> None:
        for number in range(60):
            tensor = torch.full((1 + 997 * number,), float(groups.rank + index))
            dist.all_reduce(tensor, group=own[index])
            if not bool((tensor == 2 * index + 1).all()):
                wrong.append(number)

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def sends_outlive_their_sender(groups: ParallelGroups, folder: str) -> None:
    shm.register()
    dist.destroy_process_group()
    dist.init_process_group("shm", init_method=f"file://{folder}/again", rank=groups.rank, world_size=2, timeout=timedelta(seconds=30))
    if groups.rank == 0:
        dist.send(torch.arange(1000), 1)
        dist.destroy_process_group()
    else:
        time.sleep(0.5)
        received = torch.empty(1000, dtype=torch.int64)
        dist.recv(received, 0)
        assert torch.equal(received, torch.arange(1000))
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/last", rank=groups.rank, world_size=2)


def test_tags_in_any_order_and_any_size() -> None:
    run_ranks(tags_and_sizes, dp=2)


@pytest.mark.parametrize("ranks", [2, 5])
def test_all_send_and_receive_at_once(ranks: int) -> None:
    run_ranks(around_the_ring, dp=ranks)


def test_receive_from_anybody() -> None:
    run_ranks(from_anybody, dp=3)


def test_operations_go_on_in_the_background() -> None:
    run_ranks(background, dp=2)


def test_a_full_ring_holds_no_other_group_up() -> None:
    run_ranks(a_full_ring_and_another_group, dp=2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_groups_progress_independently(ranks: int) -> None:
    run_ranks(opposite_orders, dp=ranks)


def test_several_threads() -> None:
    run_ranks(several_threads, dp=2)


def test_what_was_sent_arrives_although_the_sender_has_left(tmp_path: object) -> None:
    run_ranks(sends_outlive_their_sender, str(tmp_path), dp=2)
