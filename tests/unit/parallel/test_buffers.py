"""The layout of flat buffers, and gradient accumulation in them, in one process."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.kernels.reference import _PIECE
from megatron_llm.parallel.buffers import ALIGNMENT, Bucket, build_buckets, main_grad
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.groups import Group, ParallelGroups, single_group, single_process_groups
from megatron_llm.parallel.placement import Part, Placement, get_placement, set_placement


def parameter(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    placement = Placement(name, (Part("", shape, (0,) * len(shape), 0, shape),))
    return set_placement(nn.Parameter(torch.randn(shape).to(dtype)), placement)


def module(*parameters: nn.Parameter) -> nn.Module:
    found = nn.Module()
    for number, value in enumerate(parameters):
        found.register_parameter(f"p{number}", value)
    return found


def names(buckets: list[Bucket]) -> list[list[str]]:
    return [[get_placement(slot.parameter).logical_name for slot in bucket.slots] for bucket in buckets]


def as_data_parallel(rank: int, size: int) -> ParallelGroups:
    """Groups that only look data parallel: enough to lay out buffers."""
    alone = single_group()
    dp = Group(tuple(range(size)), rank)
    return ParallelGroups(Grid(dp=size), rank, alone, dp, alone, alone, alone, alone, torch.device("cpu"))


def test_buckets_follow_the_backward_and_close_when_full() -> None:
    chunk = module(*[parameter(name, (3, 10)) for name in "abcde"])
    buckets = build_buckets([chunk], single_process_groups(), shard=False, bucket_size=60)
    assert names(buckets) == [["e", "d"], ["c", "b"], ["a"]]


def test_the_last_chunk_comes_first() -> None:
    chunks = [module(parameter("a", (3, 3))), module(parameter("b", (3, 3)))]
    buckets = build_buckets(chunks, single_process_groups(), shard=False, bucket_size=1000)
    assert [(bucket.index, bucket.chunk) for bucket in buckets] == [(0, 1), (1, 0)]


def test_vectors_and_types_have_buckets_of_their_own_due_when_their_last_parameter_is() -> None:
    chunk = module(parameter("w1", (3, 3)), parameter("n1", (3,)), parameter("w2", (3, 3)), parameter("h", (3, 3), torch.bfloat16))
    buckets = build_buckets([chunk], single_process_groups(), shard=False, bucket_size=1000)
    assert names(buckets) == [["h"], ["n1"], ["w2", "w1"]]


def test_a_parameter_used_twice_or_by_two_chunks_is_one() -> None:
    shared = parameter("shared", (3, 3))
    chunks = [module(shared, parameter("a", (3, 3)), shared), module(parameter("b", (3, 3)), shared)]
    buckets = build_buckets(chunks, single_process_groups(), shard=False, bucket_size=1000)
    assert names(buckets) == [["b"], ["a", "shared"]]


def test_frozen_parameters_are_left_alone() -> None:
    frozen = parameter("frozen", (3, 3)).requires_grad_(False)
    buckets = build_buckets([module(frozen, parameter("a", (3, 3)))], single_process_groups(), shard=False, bucket_size=1000)
    assert names(buckets) == [["a"]]
    assert not hasattr(frozen, "main_grad")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_values_survive_and_shards_are_equal_aligned_and_cover_everything(size: int) -> None:
    shapes = [(7, 11), (1, 1), (13, 17), (64, 2), (3, 5)]
    values = [torch.randn(shape) for shape in shapes]
    covered = [torch.zeros(value.numel()) for value in values]
    for rank in range(size):
        parameters = [parameter(str(number), shape) for number, shape in enumerate(shapes)]
        for target, value in zip(parameters, values, strict=True):
            target.data.copy_(value)
        for bucket in build_buckets([module(*parameters)], as_data_parallel(rank, size), shard=True, bucket_size=100):
            low, high = bucket.owned
            assert high - low == len(bucket.params) // size
            assert low % ALIGNMENT == high % ALIGNMENT == 0
            assert all(slot.start % ALIGNMENT == 0 for slot in bucket.slots)
            for segment in bucket.segments():
                assert torch.equal(
                    bucket.params[segment.offset :][: segment.end - segment.start],
                    segment.parameter.detach().flatten()[segment.start : segment.end],
                )
                covered[int(get_placement(segment.parameter).logical_name)][segment.start : segment.end] += 1
        assert all(torch.equal(target, value) for target, value in zip(parameters, values, strict=True))
    assert all(bool((count == 1).all()) for count in covered)


def test_bucket_size_is_checked() -> None:
    with pytest.raises(ValueError, match="bucket_size"):
        build_buckets([module(parameter("a", (3, 3)))], single_process_groups(), shard=False, bucket_size=0)


def backward(value: nn.Parameter, gradient: Tensor) -> None:
    (value.float() * gradient).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_of_the_step_before_is_left(dtype: torch.dtype) -> None:
    used, unused = parameter("a", (3, 5), dtype), parameter("b", (7, 2), dtype)
    sync = GradSync([module(used, unused)], single_process_groups(), shard=True, overlap=True, bucket_size=1000)
    for trained in (used, unused, used):
        sync.zero_grad()
        backward(trained, torch.ones(trained.shape))
        backward(trained, torch.full(trained.shape, 2.0))
        sync.finish()
        for value in (used, unused):
            assert value.grad is None
            assert torch.equal(main_grad(value), torch.full(value.shape, 3.0 if value is trained else 0.0))


@pytest.mark.parametrize("shape", [(3, 5), (3, _PIECE // 2 + 1)], ids=["small", "in-pieces"])
def test_16_bit_gradients_are_added_in_fp32(shape: tuple[int, int]) -> None:
    value = parameter("a", shape, torch.bfloat16)
    sync = GradSync([module(value)], single_process_groups(), shard=True, overlap=True, bucket_size=100)
    for _ in range(3):
        backward(value, torch.full(shape, 1.0))
        backward(value, torch.full(shape, 2.0**-10))  # lost if it were added in bf16
    sync.finish()
    assert value.grad is None
    assert bool((value.main_grad == 3 + 3 * 2.0**-10).all())  # type: ignore[attr-defined]


def test_the_gradient_of_a_weight_used_twice_is_counted_once() -> None:
    value = parameter("a", (3, 5))
    sync = GradSync([module(value, value)], single_process_groups(), shard=True, overlap=True, bucket_size=100)
    (value * 2.0 + value * 3.0).sum().backward()
    sync.finish()
    assert torch.equal(sync.buckets[0].grads[:15], torch.full((15,), 5.0))


def test_parameters_do_not_keep_a_dropped_gradsync_alive() -> None:
    value = parameter("a", (3, 5))
    sync = GradSync([module(value)], single_process_groups(), shard=True, overlap=True, bucket_size=100)
    gone = weakref.ref(sync)
    del sync
    gc.collect()
    assert gone() is None
    backward(value, torch.ones(3, 5))
