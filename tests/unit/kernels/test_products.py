"""The C++ matrix product equals torch's in fp64 under every instruction set, and the layers that multiply with it the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels import products
from megatron_llm.kernels.dispatch import select_kernels, torch_kernels
from megatron_llm.kernels.products import Products
from megatron_llm.parallel.deferred import DeferredGradients, linear

operators = torch.ops.megatron_llm

# Rows, steps, columns: one, primes, whole tiles, more steps and columns than are copied at a time.
SIZES = [(1, 1, 1), (13, 7, 31), (14, 3, 32), (15, 257, 33), (29, 512, 64), (101, 67, 53), (7, 600, 1031), (43, 1, 521), (905, 19, 37)]


def operand(rows: int, columns: int, layout: str) -> Tensor:
    """A matrix that lies row by row, column by column, or as part of a larger one with neither side contiguous."""
    if layout == "rows":
        return torch.randn(rows, columns)
    return torch.randn(columns, rows).t() if layout == "columns" else torch.randn(2 * rows + 1, 3 * columns + 1)[1::2, 1::3]


@pytest.mark.parametrize("layouts", [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("part", "part")], ids="-".join)
@pytest.mark.parametrize(("rows", "steps", "columns"), SIZES)
def test_equals_the_product_in_fp64(capability: str, rows: int, steps: int, columns: int, layouts: tuple[str, str]) -> None:
    torch.manual_seed(rows)
    a, b = operand(rows, steps, layouts[0]), operand(steps, columns, layouts[1])
    start = torch.randn(rows, columns + 3)
    whole = start.clone()
    out = whole[:, 1 : columns + 1]
    expected = a.double() @ b.double()
    operators.matrix_product_(out, a, b, False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 * steps**0.5 * 5)
    operators.matrix_product_(out, a, b, True)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-5, atol=2e-6 * steps**0.5 * 5)
    assert torch.equal(whole[:, :1], start[:, :1]) and torch.equal(whole[:, columns + 1 :], start[:, columns + 1 :]), "wrote beside it"


@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_the_number_of_threads_changes_nothing(capability: str, threads: int) -> None:
    a, b, before = torch.randn(95, 300), torch.randn(300, 130), torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(torch.full((95, 130), torch.nan))
            operators.matrix_product_(found[-1], a, b, False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_nothing_to_sum_and_nothing_to_write(capability: str) -> None:
    out = torch.ones(3, 2)
    operators.matrix_product_(out, torch.empty(3, 0), torch.empty(0, 2), True)
    assert torch.equal(out, torch.ones(3, 2))
    operators.matrix_product_(out, torch.empty(3, 0), torch.empty(0, 2), False)
    assert torch.equal(out, torch.zeros(3, 2))
    operators.matrix_product_(torch.empty(0, 2), torch.empty(0, 5), torch.ones(5, 2), False)


def test_infinities_and_nan_stay(capability: str) -> None:
    a, b = torch.ones(20, 40), torch.ones(40, 50)
    a[3, 5], a[4, 6] = torch.inf, torch.nan
    out = torch.empty(20, 50)
    operators.matrix_product_(out, a, b, False)
    assert out[3].isinf().all() and out[4].isnan().all() and out[5:].eq(40).all()


def test_bad_input_is_refused(loaded: None) -> None:
    a, b, out = torch.ones(3, 4), torch.ones(4, 5), torch.empty(3, 5)
    with pytest.raises(ValueError, match="do not go together"):
        operators.matrix_product_(out, a, torch.ones(5, 5), False)
    with pytest.raises(TypeError, match="expected float32"):
        operators.matrix_product_(out, a.double(), b, False)
    with pytest.raises(ValueError, match="rows that are contiguous"):
        operators.matrix_product_(torch.empty(5, 3).t(), a, b, False)


def test_passes_opcheck(loaded: None) -> None:
    torch.library.opcheck(operators.matrix_product_.default, (torch.zeros(3, 5), torch.ones(3, 4), torch.ones(4, 5), True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_layer_equals_the_plain_one(loaded: None, monkeypatch: pytest.MonkeyPatch, frozen: bool, bias: bool) -> None:
    monkeypatch.setattr(products, "_LARGE", 0)
    calls = []
    own = operators.matrix_product_
    monkeypatch.setattr(operators, "matrix_product_", lambda *arguments: (calls.append(1), own(*arguments)))
    torch.manual_seed(0)
    x, weight, shift = torch.randn(7, 3, 37), torch.randn(29, 37), torch.randn(29) if bias else None
    upstream = torch.randn(29, 3, 7).permute(2, 1, 0)
    results = []
    kinds: tuple[Products, ...] = ("torch", "fused")
    for kind in kinds:
        tensors = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        y = linear(tensors[0], tensors[1], shift, DeferredGradients(), kind)
        y.backward(upstream)
        results.append([y, tensors[0].grad, tensors[1].grad])
    assert len(calls) == (2 if frozen else 3)
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_small_and_other_products_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "matrix_product_", None)  # what calls it fails
    small, bf16 = torch.randn(9, 9), torch.randn(300, 300, dtype=torch.bfloat16)
    assert torch.equal(products.multiply(small, small, "fused"), small @ small)
    assert torch.equal(products.multiply(bf16, bf16, "fused"), bf16 @ bf16)
    out = torch.ones(9, 9)
    torch.testing.assert_close(products.multiply_into(out, small, small, "fused", add=True), torch.ones(9, 9) + small @ small)
    assert F.linear(small, small).equal(products.forward_product(small, small, None, "torch"))


def test_which_products_are_chosen(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_kernels().products == select_kernels("torch", torch.device("cpu")).products == "torch"
    for faster in (True, False):
        monkeypatch.setattr("megatron_llm.kernels.native.multiplies_faster", lambda faster=faster: faster)
        kernels = select_kernels("fused", torch.device("cpu"))
        assert kernels.products == ("fused" if faster else "torch") and ("products" in kernels.describe()) == faster
