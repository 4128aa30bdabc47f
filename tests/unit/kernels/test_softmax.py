"""Statistics and gradient of the cross-entropy in C++, against the definition in fp64."""

import pytest
import torch
from torch import Tensor

from megatron_llm.kernels import reference

# Errors relative to the largest value of a result: rounding to the type once, and sums of thousands of terms in fp32.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
TYPES = list(ROUNDING)
# Columns, first vocabulary id, valid columns: one, less than a vector, a prime, padding, longer than a block of the kernel.
SHAPES = [(1, 0, 1), (7, 3, 5), (97, 0, 97), (5003, 1000, 4999), (40, 8, 0)]


def rows(columns: int, first: int, valid: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Five rows of logits and their labels, one of which is not among the columns."""
    generator = torch.Generator().manual_seed(columns)
    logits = (4 * torch.randn(5, columns, generator=generator)).to(dtype)
    labels = first + torch.randint(0, max(valid, 1), (5,), generator=generator)
    labels[1] = first - 1
    labels[3] = first + valid
    return logits, labels


def exact_statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """The definition, row by row in fp64."""
    out = torch.zeros(3, len(logits), dtype=torch.float64)
    for row, (values, label) in enumerate(zip(logits.double(), labels.tolist(), strict=True)):
        out[0, row] = values[:valid].max() if valid else -torch.inf
        out[1, row] = (values[:valid] - out[0, row]).exp().sum()
        out[2, row] = values[label - first] if first <= label < first + valid else 0.0
    return out


def exact_gradient(logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, first: int, valid: int) -> Tensor:
    """The definition, row by row in fp64."""
    out = torch.zeros(logits.shape, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        out[row, :valid] = (logits[row, :valid].double() - lse[row].double()).exp()
        if first <= label < first + valid:
            out[row, label - first] -= 1
    return out * scale.double().unsqueeze(-1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("columns", "first", "valid"), SHAPES)
@pytest.mark.parametrize("form", ["C++", "torch"])
def test_statistics(capability: str, form: str, columns: int, first: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels = rows(columns, first, valid, dtype)
    run = torch.ops.megatron_llm.softmax_statistics if form == "C++" else reference.softmax_statistics
    found, exact = run(logits, labels, first, valid), exact_statistics(logits, labels, first, valid)
    assert found.dtype == torch.float32 and found.shape == (3, 5)
    assert torch.equal(found[0].double(), exact[0]) and torch.equal(found[2].double(), exact[2])
    torch.testing.assert_close(found[1].double(), exact[1], rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("columns", "first", "valid"), SHAPES)
@pytest.mark.parametrize("form", ["C++", "torch"])
def test_gradient(capability: str, form: str, columns: int, first: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels = rows(columns, first, valid, dtype)
    lse = logits[:, :valid].double().logsumexp(-1).float() if valid else torch.zeros(5)
    scale = torch.tensor([0.3, 1.0, 0.0, 2.5, 1e-3])
    exact = exact_gradient(logits, labels, lse, scale, first, valid)
    if form == "C++":
        logits[2] = torch.nan  # its scale is 0: not even read
    run = torch.ops.megatron_llm.softmax_gradient_ if form == "C++" else reference.softmax_gradient_
    run(logits, labels, lse, scale, first, valid)
    torch.testing.assert_close(logits.double(), exact, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * 1e-3)
    assert not logits[2].any() and not logits[:, valid:].any()


def test_rows_and_columns_that_lie_apart(capability: str) -> None:
    whole, labels = rows(101, 0, 60, torch.float32)
    lse, scale = whole[:, :60].logsumexp(-1), torch.ones(5)
    wanted = torch.ops.megatron_llm.softmax_statistics(whole[:, :61].contiguous(), labels, 0, 60)
    gradient = whole[:, :61].contiguous()
    torch.ops.megatron_llm.softmax_gradient_(gradient, labels, lse, scale, 0, 60)
    across = whole.t().contiguous().t()  # neighbours in a row lie 5 elements apart
    for logits in (whole, across):
        beyond = logits[:, 61:].clone()
        assert torch.equal(torch.ops.megatron_llm.softmax_statistics(logits[:, :61], labels, 0, 60), wanted)
        torch.ops.megatron_llm.softmax_gradient_(logits[:, :61], labels, lse, scale, 0, 60)
        assert torch.equal(logits[:, :61], gradient) and torch.equal(logits[:, 61:], beyond)


def test_infinite_and_missing_values(capability: str) -> None:
    inf = torch.inf
    logits = torch.full((5, 5000), -inf)
    logits[1, 4000] = 2.0  # the first block of columns has nothing but -inf
    logits[2, 10], logits[3, 10], logits[3, 4000] = inf, 1.0, torch.nan
    statistics = torch.ops.megatron_llm.softmax_statistics(logits, torch.zeros(5, dtype=torch.int64), 0, 5000)
    assert statistics[:2, 0].tolist() == [-inf, 0.0] and statistics[:2, 1].tolist() == [2.0, 1.0]
    assert statistics[0, 2] == inf and statistics[1, 2].isnan() and statistics[1, 3].isnan()


def test_no_rows(capability: str) -> None:
    none, labels = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert torch.ops.megatron_llm.softmax_statistics(none, labels, 0, 7).shape == (3, 0)
    torch.ops.megatron_llm.softmax_gradient_(none, labels, torch.empty(0), torch.empty(0), 0, 7)


def test_the_number_of_threads_changes_nothing(capability: str) -> None:
    logits, labels = torch.randn(33, 20011).bfloat16(), torch.randint(0, 20011, (33,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            copy, statistics = logits.clone(), torch.ops.megatron_llm.softmax_statistics(logits, labels, 0, 20011)
            torch.ops.megatron_llm.softmax_gradient_(copy, labels, statistics[0] + statistics[1].log(), torch.ones(33), 0, 20011)
            results.append((statistics, copy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(4), torch.zeros(4, dtype=torch.int64), 0, 4), "expected \\[rows, columns\\]"),
        ((torch.zeros(4, 3), torch.zeros(4), 0, 3), "expected int64"),
        ((torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64), 0, 3), "for logits of shape"),
        ((torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), 0, 4), "4 valid columns of 3"),
        ((torch.zeros(4, 3).double(), torch.zeros(4, dtype=torch.int64), 0, 3), "expected float32, bfloat16 or float16"),
    ],
)
def test_what_does_not_fit_is_said(loaded: None, arguments: tuple[Tensor, Tensor, int, int], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        torch.ops.megatron_llm.softmax_statistics(*arguments)


def test_operators_are_registered_well(loaded: None) -> None:
    logits, labels = rows(7, 0, 5, torch.float32)
    torch.library.opcheck(torch.ops.megatron_llm.softmax_statistics.default, (logits, labels, 0, 5))
    torch.library.opcheck(torch.ops.megatron_llm.softmax_gradient_.default, (logits, labels, torch.ones(5), torch.ones(5), 0, 5))
