"""Every collective of the shared-memory backend against gloo's result or its definition, at odd sizes and in all types."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel import shm
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks

pytestmark = pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")

# One element, an odd number, just above what is summed without shares, several chunks and an odd rest.
SIZES = (0, 1, 7, 1021, 16_385, 270_001)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shm_group(ranks: list[int] | None = None) -> dist.ProcessGroup:
    shm.register()
    group = dist.new_group(ranks, backend="shm")
    assert group is not None
    return group


def values(size: int, dtype: torch.dtype, rank: int) -> Tensor:
    """This rank's numbers: any rank can make those of another."""
    numbers = torch.randint(-9, 10, (size,), generator=torch.Generator().manual_seed(100 + rank))
    noise = torch.rand(size, generator=torch.Generator().manual_seed(rank))
    return (numbers + noise).to(dtype) if dtype.is_floating_point else numbers.abs().to(dtype)


def expected(tensors: list[Tensor], op: dist.ReduceOp.RedOpType) -> Tensor:
    """The reduction in rank order; sums of 16-bit floats in fp32, rounded once."""
    wide = [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
    total = wide[0].clone()
    for one in wide[1:]:
        if op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            total += one
        elif op == dist.ReduceOp.PRODUCT:
            total *= one
        else:
            total = torch.maximum(total, one) if op == dist.ReduceOp.MAX else torch.minimum(total, one)
    if op == dist.ReduceOp.AVG:
        total /= len(tensors)
    return total.to(tensors[0].dtype)


def reductions(groups: ParallelGroups) -> None:
    group, size, rank = shm_group(), groups.world.size, groups.rank
    for dtype in (*FLOATS, *INTEGERS):
        for count in SIZES if dtype in (torch.float32, torch.bfloat16) else SIZES[:4]:
            whole = [values(count * size, dtype, other) for other in range(size)]
            everyone = [one[:count] for one in whole]
            for op in ("SUM", "MAX", "MIN", "PRODUCT", *(("AVG",) if dtype.is_floating_point else ())):
                op = getattr(dist.ReduceOp, op)
                result = everyone[rank].clone()
                dist.all_reduce(result, op=op, group=group)
                assert torch.equal(result, expected(everyone, op)), (dtype, count, op)
                if op in (dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN):
                    continue
                result = everyone[rank].clone()
                dist.reduce(result, dst=size - 1, op=op, group=group)
                assert torch.equal(result, expected(everyone, op) if rank == size - 1 else everyone[rank])
                part = torch.empty(count, dtype=dtype)
                dist.reduce_scatter_tensor(part, whole[rank], op=op, group=group)
                assert torch.equal(part, expected(whole, op)[rank * count : (rank + 1) * count]), (dtype, count, op)
                own = whole[rank].clone()
                dist.reduce_scatter_tensor(own[rank * count : (rank + 1) * count], own, op=op, group=group)
                assert torch.equal(own[rank * count : (rank + 1) * count], part), "in place"


def against_gloo(groups: ParallelGroups) -> None:
    group, size, rank = shm_group(), groups.world.size, groups.rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        for count in SIZES[1:]:
            own = values(count, torch.int64, rank).to(dtype)
            results = []
            for backend in (group, None):
                found = []
                gathered = torch.empty(count * size, dtype=dtype)
                dist.all_gather_into_tensor(gathered, own, group=backend)
                found.append(gathered)
                for source in range(size):
                    found.append(own.clone())
                    dist.broadcast(found[-1], src=source, group=backend)
                parts = [torch.empty(count, dtype=dtype) for _ in range(size)]
                dist.all_gather(parts, own, group=backend)
                found += parts
                at_root = [torch.empty(count, dtype=dtype) for _ in range(size)] if rank == size - 1 else None
                dist.gather(own, at_root, dst=size - 1, group=backend)
                found += at_root or []
                spread = [own + other if dtype != torch.bool else own for other in range(size)] if rank == 0 else None
                found.append(torch.empty(count, dtype=dtype))
                dist.scatter(found[-1], spread, src=0, group=backend)
                found.append(torch.empty(count * size, dtype=dtype))
                dist.all_to_all_single(found[-1], gathered.roll(rank), group=backend)
                results.append(found)
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (dtype, count)


def uneven_and_strided(groups: ParallelGroups) -> None:
    group, size, rank = shm_group(), groups.world.size, groups.rank
    # Rank r sends r + 3 c rows to rank c: all parts differ and one is empty.
    send, receive = [rank + 3 * to for to in range(size)], [source + 3 * rank for source in range(size)]
    results = []
    for backend in (group, None):
        output = torch.empty(sum(receive), 5)
        dist.all_to_all_single(output, values(sum(send) * 5, torch.float32, rank).view(-1, 5), receive, send, group=backend)
        results.append(output)
    assert torch.equal(*results)
    columns = values(42, torch.float32, rank).view(6, 7).t()
    assert not columns.is_contiguous()
    total = expected([values(42, torch.float32, other) for other in range(size)], dist.ReduceOp.SUM).view(6, 7).t()
    dist.all_reduce(columns, group=group)
    assert torch.equal(columns, total)
    dist.broadcast(columns[:, 1], src=0, group=group)
    parts = [torch.empty(7, 6).t() for _ in range(size)]
    dist.all_gather(parts, torch.full((6, 7), float(rank)), group=group)
    assert [part.unique().tolist() for part in parts] == [[float(other)] for other in range(size)]
    truth = torch.tensor([rank == 0, False, True])
    dist.all_reduce(truth, group=group)
    assert truth.tolist() == [True, False, True] and truth.view(torch.uint8).max() == 1
    odd = torch.tensor([float("nan") if rank == 0 else 1.0, float(rank)])
    dist.all_reduce(odd, op=dist.ReduceOp.MAX, group=group)
    assert odd[0].isnan() and odd[1] == size - 1
    bits = torch.tensor([1 << rank])
    dist.all_reduce(bits, op=dist.ReduceOp.BOR, group=group)
    assert bits.item() == (1 << size) - 1


def objects(groups: ParallelGroups) -> None:
    group, size, rank = shm_group(), groups.world.size, groups.rank
    gathered = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank * 1000}, group=group)
    assert [one["rank"] for one in gathered] == list(range(size))
    at_root = [None] * size if rank == 0 else None
    dist.gather_object(("from", rank), at_root, dst=0, group=group)
    assert at_root is None or at_root == [("from", other) for other in range(size)]
    told = [f"hello {rank}"]
    dist.broadcast_object_list(told, src=1, group=group)
    assert told == ["hello 1"]
    mine: list[object] = [None]
    dist.scatter_object_list(mine, list(range(size)) if rank == 0 else None, src=0, group=group)
    assert mine == [rank]
    dist.barrier(group=group)
    assert dist.get_backend(group) == "shm"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_reductions_are_in_rank_order_and_rounded_once(ranks: int) -> None:
    run_ranks(reductions, dp=ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_only_moves_data_equals_gloo(ranks: int) -> None:
    run_ranks(against_gloo, dp=ranks)
    run_ranks(uneven_and_strided, dp=ranks)


def test_objects() -> None:
    run_ranks(objects, dp=3)


def chains_of_calls(groups: ParallelGroups) -> None:
    """Many calls of changing kind and size, some of them waited for late: each must meet its own."""
    group, size, rank = shm_group(), groups.world.size, groups.rank
    order = torch.Generator().manual_seed(5)
    pending = []
    for number in range(400):
        kind, count = (int(torch.randint(high, (1,), generator=order)) for high in (4, 60_000))
        tensor = torch.full((count,), float(rank + number))
        if kind == 0:
            pending.append((dist.all_reduce(tensor, group=group, async_op=True), tensor, sum(range(size)) + size * number))
        elif kind == 1:
            pending.append((dist.broadcast(tensor, src=number % size, group=group, async_op=True), tensor, number % size + number))
        elif kind == 2:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
            assert bool((tensor == size - 1 + number).all())
        else:
            parts = torch.empty(count * size)
            dist.all_gather_into_tensor(parts, tensor, group=group)
            assert torch.equal(parts.view(size, count)[:, :1].flatten(), torch.arange(size)[: size if count else 0] + float(number))
        while len(pending) > 5:
            work, result, value = pending.pop(0)
            work.wait()
            assert bool((result == value).all())
    for work, _, _ in pending:
        work.wait()


@pytest.mark.parametrize("ranks", [2, 5])
def test_many_calls_of_changing_kind(ranks: int) -> None:
    run_ranks(chains_of_calls, dp=ranks)
