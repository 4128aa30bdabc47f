"""The Triton kernels in Triton's interpreter, on the CPU. test_triton.py runs this file in a process of its own:

TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/triton_interpreted.py

The variable decides what Triton's functions are when it is imported, so a process that compiles kernels cannot interpret any.
"""

import pytest
import torch

from megatron_llm.kernels.triton import flat, loss, norm, rotary, swiglu
from tests.unit.kernels import triton_cases as cases


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 7), (5, 3, 64), (1, 1, 3), (2, 41, 129)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cases.check_norms("cpu", dtype, shape)


def test_mixed_norm() -> None:
    cases.check_mixed_norm("cpu")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize(("shape", "batched"), [((3, 2, 3, 8), False), ((2, 3, 5, 6), True), ((1, 1, 1, 2), False)])
def test_rotary(dtype: torch.dtype, shape: tuple[int, ...], batched: bool) -> None:
    cases.check_rotary("cpu", dtype, shape, batched=batched)


def test_learned_tables() -> None:
    cases.check_learned_tables("cpu")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 3, 1030), (1, 1, 1)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cases.check_swiglu("cpu", dtype, shape)


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize(("rows", "columns", "shards"), [(7, 11, 1), (4, 37, 3), (2, 4133, 2)])
def test_cross_entropy(dtype: torch.dtype, rows: int, columns: int, shards: int) -> None:
    cases.check_cross_entropy("cpu", dtype, rows, columns, shards=shards)


def test_statistics_edges() -> None:
    cases.check_statistics_edges("cpu")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("count", [1, 1500])
def test_adamw(dtype: torch.dtype, count: int) -> None:
    cases.check_adamw("cpu", dtype, count)


def test_shards_agree() -> None:
    cases.check_shards_agree("cpu")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("count", [1, 8192, 8197])
def test_sum_of_squares(dtype: torch.dtype, count: int) -> None:
    cases.check_squares("cpu", dtype, count)


def test_empty() -> None:
    cases.check_empty("cpu")


def test_no_kernel_breaks_a_compiled_graph() -> None:
    cases.check_compiled("cpu", "aot_eager")


def test_operators_are_registered_soundly() -> None:
    """torch's own checks: schema, fake tensors, autograd, and tracing with dynamic shapes."""
    x, weight = torch.randn(3, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    table, labels = torch.randn(3, 1, 1, 4), torch.tensor([1, 2, 3])
    check = torch.library.opcheck
    check(norm._norm, (x, None, weight, None, 1e-5))
    check(norm._norm, (x, torch.randn(3, 2, 8, requires_grad=True), weight, torch.randn(8, requires_grad=True), 1e-5))
    check(rotary._rotate, (x.detach().unsqueeze(1).requires_grad_(), table, table, False, False))
    check(swiglu._swiglu, (x, torch.randn(3, 2, 8, requires_grad=True)))
    check(loss._softmax_statistics, (torch.randn(3, 8), labels, 0, 7))
    check(loss._softmax_gradient, (torch.randn(3, 8), labels, torch.randn(3), torch.randn(3), 0, 7))
    check(flat._sum_of_squares, (torch.randn(9),))
    state = [torch.rand(9) for _ in range(4)]
    check(flat._adamw, (*state, torch.zeros(9).bfloat16(), 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 1.0))
