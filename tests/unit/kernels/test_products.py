"""Products by oneDNN equal torch's in fp64, and the layers that multiply with them the plain ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels import products
from megatron_llm.kernels.dispatch import select_kernels, torch_kernels
from megatron_llm.kernels.products import Products
from megatron_llm.parallel.deferred import DeferredGradients, linear

# Rows, steps, columns: one, primes, powers of two, one side much longer than the others.
SIZES = [(1, 1, 1), (13, 7, 31), (16, 4, 32), (29, 512, 64), (101, 67, 53), (7, 600, 1031), (43, 1, 521), (905, 19, 37)]


def operand(rows: int, columns: int, layout: str) -> Tensor:
    """A matrix that lies row by row, column by column, or as part of a larger one with neither side contiguous."""
    if layout == "rows":
        return torch.randn(rows, columns)
    return torch.randn(columns, rows).t() if layout == "columns" else torch.randn(2 * rows + 1, 3 * columns + 1)[1::2, 1::3]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every product counts as a large one; how many went to oneDNN."""
    monkeypatch.setattr(products, "_LARGE", 0)
    made: list[int] = []
    by_onednn = products._by_onednn

    def counted(*arguments: Any) -> Tensor:
        made.append(1)
        return by_onednn(*arguments)

    monkeypatch.setattr(products, "_by_onednn", counted)
    return made


@pytest.mark.parametrize("layouts", [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("part", "part")], ids="-".join)
@pytest.mark.parametrize(("rows", "steps", "columns"), SIZES)
def test_equals_the_product_in_fp64(calls: list[int], rows: int, steps: int, columns: int, layouts: tuple[str, str]) -> None:
    torch.manual_seed(rows)
    a, b = operand(rows, steps, layouts[0]), operand(steps, columns, layouts[1])
    expected, tolerance = a.double() @ b.double(), 5e-6 * steps**0.5
    torch.testing.assert_close(products.multiply(a, b, "onednn").double(), expected, rtol=1e-5, atol=tolerance)
    start = torch.randn(rows, columns + 3)
    whole = start.clone()
    out = whole[:, 1 : columns + 1]
    products.multiply_into(out, a, b, "onednn")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=tolerance)
    products.multiply_into(out, a, b, "onednn", add=True)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-5, atol=2 * tolerance)
    assert torch.equal(whole[:, :1], start[:, :1]) and torch.equal(whole[:, columns + 1 :], start[:, columns + 1 :]), "wrote beside it"
    assert len(calls) == (2 if a.is_contiguous() else 0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_layer_equals_the_plain_one(calls: list[int], frozen: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, shift = torch.randn(7, 3, 37), torch.randn(29, 37), torch.randn(29) if bias else None
    upstream = torch.randn(29, 3, 7).permute(2, 1, 0)
    results = []
    kinds: tuple[Products, ...] = ("torch", "onednn")
    for kind in kinds:
        tensors = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        y = linear(tensors[0], tensors[1], shift, DeferredGradients(), kind)
        y.backward(upstream)
        results.append([y, tensors[0].grad, tensors[1].grad])
    assert len(calls) == 2, "forward and the input's gradient; the weight's is MKL's"
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_small_and_other_products_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_by_onednn", None)  # what calls it fails
    small, bf16 = torch.randn(9, 9), torch.randn(300, 300, dtype=torch.bfloat16)
    assert torch.equal(products.multiply(small, small, "onednn"), small @ small)
    assert torch.equal(products.multiply(bf16, bf16, "onednn"), bf16 @ bf16)
    assert F.linear(small, small).equal(products.forward_product(small, small, None, "onednn"))
    monkeypatch.setattr(products, "_LARGE", 0)
    out = torch.ones(9, 9)
    torch.testing.assert_close(products.multiply_into(out, small, small, "onednn", add=True), torch.ones(9, 9) + small @ small)
    assert F.linear(small, small).equal(products.forward_product(small, small, None, "torch"))


def test_which_products_are_chosen(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_kernels().products == select_kernels("torch", torch.device("cpu")).products == "torch"
    for faster in (True, False):
        monkeypatch.setattr("megatron_llm.kernels.dispatch.onednn_multiplies_faster", lambda faster=faster: faster)
        kernels = select_kernels("fused", torch.device("cpu"))
        assert kernels.products == ("onednn" if faster else "torch") and ("products" in kernels.describe()) == faster


@pytest.mark.parametrize(
    ("maker", "capability", "faster"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, maker: str, capability: str, faster: bool) -> None:
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"processor: 0\nvendor_id: {maker}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.onednn_multiplies_faster() is (faster and torch.backends.mkldnn.is_available())
