"""Output layer and loss in one operation: equal to plain cross-entropy in fp64, whatever the split and the chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels.dispatch import Kernels, select_kernels
from megatron_llm.parallel.groups import ParallelGroups, single_process_groups
from megatron_llm.parallel.layers import vocabulary_rows
from megatron_llm.parallel.linear_loss import VocabularyShard, linear_cross_entropy
from megatron_llm.testing.ranks import run_ranks

LENGTH, BATCH, HIDDEN, VOCABULARY = 6, 3, 8, 97


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels and token weights (some zero), the same everywhere."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (LENGTH * BATCH,), generator=generator)
    labels[0], labels[1] = 0, VOCABULARY - 1
    weights = torch.rand(LENGTH * BATCH, generator=generator).masked_fill(torch.arange(LENGTH * BATCH) % 5 == 2, 0.0)
    return hidden, weight, labels, weights


def plain(dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden states and weight, in fp64."""
    hidden, weight, labels, weights = inputs(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = (F.cross_entropy(F.linear(hidden.flatten(0, 1), weight), labels, reduction="none") * weights.double()).sum()
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def kernels_of(name: str) -> Kernels:
    kernels = select_kernels(name, torch.device("cpu"))  # type: ignore[arg-type]
    assert kernels.name == name
    return kernels


def computed(
    groups: ParallelGroups, dtype: torch.dtype, kernels: str, sequence_parallel: bool, rows: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the operation: loss, this rank's hidden gradient, its rows of the weight gradient without padding."""
    tp = groups.tp
    hidden, whole, labels, weights = inputs(dtype)
    size = vocabulary_rows(VOCABULARY, tp.size)
    first = min(tp.rank * size, VOCABULARY)
    valid = min(size, VOCABULARY - first)
    weight = torch.full((size, HIDDEN), 7.0, dtype=dtype)  # padding that would show
    weight[:valid] = whole[first : first + valid]
    if sequence_parallel:
        hidden = hidden.chunk(tp.size)[tp.rank]
    hidden, weight = hidden.clone().requires_grad_(), weight.requires_grad_()
    shard = VocabularyShard(first, valid, tp, sequence_parallel)
    chunk_bytes = rows * size * weight.element_size()
    loss = linear_cross_entropy(hidden, weight, labels, weights, shard, kernels_of(kernels), chunk_bytes=chunk_bytes)
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, labels, weights, shard, kernels_of(kernels), chunk_bytes=chunk_bytes)
    assert torch.equal(loss.detach(), again)
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not weight.grad[valid:].any()
    return loss.detach(), hidden.grad, weight.grad[:valid]


def fused_is_built() -> bool:
    return select_kernels("auto", torch.device("cpu")).name == "fused"


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (3, True)], ids=["tp1", "tp2", "tp2-sp", "tp3-sp"]
)
def test_equals_plain_cross_entropy(tp: int, sequence_parallel: bool, dtype: torch.dtype, kernels: str) -> None:
    if kernels == "fused" and not fused_is_built():
        pytest.skip("the C++ kernels are not built on this machine")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for rows, scale in ((1, 1.0), (7, 0.5), (100, 1.0)):
        arguments = (dtype, kernels, sequence_parallel, rows, scale)
        results = [computed(single_process_groups(), *arguments)] if tp == 1 else run_ranks(computed, *arguments, tp=tp)
        loss, grad_hidden, grad_weight = plain(dtype, scale)
        for found, _, _ in results:
            torch.testing.assert_close(found.double(), loss, **tolerance)
        parts = [found for _, found, _ in results]
        hidden_grads = [torch.cat(parts)] if sequence_parallel else parts
        for found in hidden_grads:
            torch.testing.assert_close(found.double(), grad_hidden, **tolerance)
        torch.testing.assert_close(torch.cat([found for _, _, found in results]).double(), grad_weight, **tolerance)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, labels, weights = inputs(torch.float32)
    hidden.requires_grad_()
    shard = VocabularyShard(0, VOCABULARY, single_process_groups().tp)
    linear_cross_entropy(hidden, weight, labels, weights, shard, kernels_of("torch")).backward()
    torch.testing.assert_close(hidden.grad, plain(torch.float32, 1.0)[1].float())
    assert weight.grad is None
