"""Every parallel layer equals its plain form, forward and backward, at sizes that do not divide nicely.

The reference is computed in each rank from the logical tensors that the layers' own placements describe, so the test
also proves that the values do not depend on the layout.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llm.parallel.comm import all_gather_first_dim
from megatron_llm.parallel.groups import ParallelGroups, single_group
from megatron_llm.parallel.layers import (
    ColumnParallelLinear,
    ColumnPart,
    ParallelContext,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocabulary_parameter,
)
from megatron_llm.parallel.loss import vocab_parallel_cross_entropy
from megatron_llm.parallel.placement import get_placement
from megatron_llm.testing.ranks import run_ranks

CPU = torch.device("cpu")
LENGTH, BATCH, HIDDEN = 8, 3, 12


def contexts(groups: ParallelGroups, sequence_parallel: bool) -> tuple[ParallelContext, ParallelContext]:
    """The parallel context under test and the plain one that defines the right answer."""
    parallel = ParallelContext(groups.tp, sequence_parallel, CPU, torch.float64, seed=5)
    return parallel, ParallelContext(single_group(), False, CPU, torch.float64, seed=5)


def shard_of(whole: nn.Parameter, local: nn.Parameter, tensor: Tensor) -> Tensor:
    """What of `tensor`, shaped like the plain parameter `whole`, belongs into the rows of the local parameter."""
    result = torch.zeros_like(local)
    plain = {part.name: part for part in get_placement(whole).parts}
    for part in get_placement(local).parts:
        rows = plain[part.name].view(tensor)
        for dim, (start, size) in enumerate(zip(part.global_start, part.shape, strict=True)):
            rows = rows.narrow(dim, start, size)
        if part.numel:
            part.view(result).copy_(rows)
    return result


def check_parameter(groups: ParallelGroups, whole: nn.Parameter, local: nn.Parameter) -> None:
    """Same values; gradients equal after replicas that see only a part have been summed as grad sync does."""
    torch.testing.assert_close(local.detach(), shard_of(whole, local, whole.detach()), rtol=0, atol=0)
    assert local.grad is not None and whole.grad is not None
    grad, placement = local.grad.clone(), get_placement(local)
    everyone = all_gather_first_dim(grad.unsqueeze(0).contiguous(), groups.tp)
    if placement.partial_grad:
        for part in placement.parts:
            first = groups.tp.rank - part.replica
            part.view(grad).copy_(sum(part.view(everyone[first + other]) for other in range(part.replicas)))
    torch.testing.assert_close(grad, shard_of(whole, local, whole.grad), rtol=1e-12, atol=1e-12)


def rank_slice(x: Tensor, groups: ParallelGroups, dim: int) -> Tensor:
    return x.chunk(groups.tp.size, dim)[groups.tp.rank]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def column_and_row(groups: ParallelGroups, sequence_parallel: bool, kv_shards: int) -> None:
    """A fused column layer with (possibly shared) key/value shards, then a row layer, as in attention."""
    tp = groups.tp.size
    made = []
    for ctx in contexts(groups, sequence_parallel):
        shards = ctx.tp.size
        parts = [ColumnPart("q", 8 * 3, shards), ColumnPart("k", kv_shards * 3, min(shards, kv_shards))]
        column = ColumnParallelLinear(ctx, "layers.0.attention.qkv", HIDDEN, parts, bias=True, std=0.5)
        row = RowParallelLinear(ctx, "layers.0.attention.out", 24, HIDDEN, bias=True, std=0.5)
        for layer in (column, row):
            assert layer.bias is not None
            for part in get_placement(layer.bias).parts:  # biases start at zero: give them values that tell ranks apart
                values = torch.arange(part.global_shape[0], dtype=torch.float64) / 7
                part.view(layer.bias.data).copy_(values[part.global_start[0] : part.global_start[0] + part.shape[0]])
        made.append((column, row))
    (column, row), (plain_column, plain_row) = made

    def through(a: ColumnParallelLinear, b: RowParallelLinear, x: Tensor, size: int) -> Tensor:
        q, k = a(x).split(a.splits, dim=-1)
        heads = k.unflatten(-1, (-1, 3))
        return b(torch.tanh(q * heads.repeat_interleave(8 // size // heads.shape[2], dim=2).flatten(2)))

    x, upstream = random(LENGTH, BATCH, HIDDEN, seed=1), random(LENGTH, BATCH, HIDDEN, seed=2)
    whole_x = x.clone().requires_grad_()
    expected = through(plain_column, plain_row, whole_x, 1)
    expected.backward(upstream)
    local_x = (rank_slice(x, groups, 0) if sequence_parallel else x).clone().requires_grad_()
    got = through(column, row, local_x, tp)
    got.backward(rank_slice(upstream, groups, 0) if sequence_parallel else upstream)
    torch.testing.assert_close(got, rank_slice(expected, groups, 0) if sequence_parallel else expected, rtol=1e-12, atol=1e-12)
    assert whole_x.grad is not None
    torch.testing.assert_close(
        local_x.grad, rank_slice(whole_x.grad, groups, 0) if sequence_parallel else whole_x.grad, rtol=1e-12, atol=1e-12
    )
    for layer, plain in ((column, plain_column), (row, plain_row)):
        for local, whole in zip(layer.parameters(), plain.parameters(), strict=True):
            check_parameter(groups, whole, local)


@pytest.mark.parametrize("kv_shards", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["full", "sp"])
@pytest.mark.parametrize("tp", [1, 2, 4], ids=lambda n: f"tp{n}")
def test_column_then_row_equals_plain(tp: int, sequence_parallel: bool, kv_shards: int) -> None:
    run_ranks(column_and_row, sequence_parallel, kv_shards, tp=tp)


def embedding_to_loss(groups: ParallelGroups, sequence_parallel: bool, vocab: int, tied: bool) -> None:
    """Embedding, output layer and loss, tied or not, against torch's embedding and cross-entropy."""
    ids = torch.randint(0, vocab, (LENGTH, BATCH), generator=torch.Generator().manual_seed(3))
    ids[0, 0], ids[0, 1] = vocab - 1, 0  # the last and the first row
    labels, upstream = ids.flip(0).reshape(-1), random(LENGTH * BATCH, seed=4)
    made = []
    for ctx in contexts(groups, sequence_parallel):
        embedding = VocabParallelEmbedding(ctx, "embedding.word", vocab, HIDDEN, std=1.0)
        weight = embedding.weight if tied else vocabulary_parameter(ctx, "head.weight", vocab, HIDDEN, std=1.0)
        made.append((embedding, VocabParallelHead(ctx, weight, vocab)))
    (embedding, head), (plain_embedding, plain_head) = made
    plain_rows = plain_head.weight[:vocab]
    hidden = torch.tanh(F.embedding(ids, plain_embedding.weight[:vocab]))
    expected = F.cross_entropy(F.linear(hidden, plain_rows).flatten(0, 1), labels, reduction="none")
    expected.backward(upstream)
    logits = head(torch.tanh(embedding(ids)))
    got = vocab_parallel_cross_entropy(logits.flatten(0, 1), labels, head.first, head.valid, groups.tp)
    got.backward(upstream.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for local, whole in ((embedding.weight, plain_embedding.weight), (head.weight, plain_head.weight)):
        assert local.grad is not None and whole.grad is not None
        torch.testing.assert_close(local.detach(), shard_of(whole, local, whole.detach()), rtol=0, atol=0)
        torch.testing.assert_close(local.grad, shard_of(whole, local, whole.grad), rtol=1e-4, atol=1e-5)
        padding = local.grad[head.valid :]
        assert torch.equal(padding, torch.zeros_like(padding))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab", [2, 97, 128], ids=lambda n: f"v{n}")
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["full", "sp"])
@pytest.mark.parametrize("tp", [1, 4], ids=lambda n: f"tp{n}")
def test_embedding_head_and_loss_equal_plain(tp: int, sequence_parallel: bool, vocab: int, tied: bool) -> None:
    """Vocabulary 2 over four ranks leaves two ranks with nothing but padding."""
    run_ranks(embedding_to_loss, sequence_parallel, vocab, tied, tp=tp)
