"""The 8-bit linear layer: its three products, its gradients against fp64, and weight gradients that are put off."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llm.kernels.fp8 import E4M3, E5M2, scaled
from megatron_llm.parallel.deferred import DeferredGradients
from megatron_llm.parallel.fp8 import fp8_linear

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [((1, 1), 1, 1), ((7, 3), 5, 11), ((16, 2), 32, 48), ((13, 1), 17, 31)]


def layer(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(outputs)
    return tuple(nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in ((outputs, inputs), (outputs,)))  # type: ignore[return-value]


def activations(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("kind", TYPES)
def test_forward_and_gradients_are_products_of_rounded_operands(rows: tuple[int, int], inputs: int, outputs: int, kind: str) -> None:
    dtype = TYPES[kind]
    (weight, bias), deferred = layer(outputs, inputs, dtype), DeferredGradients()
    x = activations(*rows, inputs, dtype=dtype).requires_grad_()
    upstream = activations(*rows, outputs, dtype=dtype, seed=1)
    y = fp8_linear(x, weight, bias, deferred)
    y.backward(upstream)
    x8, weight8, upstream8 = (scaled(t.detach(), k).wide().double() for t, k in ((x, E4M3), (weight, E4M3), (upstream, E5M2)))
    expected = {
        "y": (y, x8 @ weight8.t() + bias.detach().double()),
        "x": (x.grad, upstream8 @ weight8),
        "weight": (weight.grad, upstream8.flatten(0, 1).t() @ x8.flatten(0, 1)),
        "bias": (bias.grad, upstream.double().sum((0, 1))),
    }
    for name, (got, right) in expected.items():
        assert got is not None and got.dtype == dtype and got.shape == right.shape, name
        torch.testing.assert_close(got.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=2e-2 if kind == "bf16" else 1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_are_close_to_exact_ones(kind: str) -> None:
    dtype = TYPES[kind]
    weight, bias = layer(93, 65, dtype)
    x, upstream = activations(37, 3, 65, dtype=dtype).requires_grad_(), activations(37, 3, 93, dtype=dtype, seed=1)
    fp8_linear(x, weight, bias, DeferredGradients()).backward(upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    F.linear(*exact).backward(upstream.double())
    for got, right, most in zip((x.grad, weight.grad, bias.grad), (t.grad for t in exact), (0.08, 0.08, 0.01), strict=True):
        assert got is not None and right is not None
        assert (got.double() - right).norm() < most * right.norm()


def test_an_expanded_gradient_and_a_strided_input() -> None:
    weight, bias = layer(9, 6, torch.float32)
    base = activations(5, 4, 6, dtype=torch.float32)
    results = []
    for x in (base.transpose(0, 1), base.transpose(0, 1).contiguous()):
        leaf = x.detach().requires_grad_()
        weight.grad = None
        fp8_linear(leaf, weight, bias, DeferredGradients()).sum().backward()
        assert leaf.grad is not None and weight.grad is not None
        results.append((leaf.grad.clone(), weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][1].abs().sum() > 0


def test_a_frozen_weight_keeps_no_input() -> None:
    weight, _ = layer(9, 6, torch.bfloat16)
    x = activations(5, 6, dtype=torch.bfloat16).requires_grad_()
    upstream, grads, kept = activations(5, 9, dtype=torch.bfloat16, seed=1), [], []
    for trained in (True, False):
        weight.requires_grad_(trained)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = fp8_linear(x, weight, None, DeferredGradients())
        kept.append([tuple(tensor.shape) for tensor in saved])
        grads.append(torch.autograd.grad(y, x, upstream)[0])
    assert torch.equal(*grads)
    assert (5, 6) in kept[0] and kept[1] == [(9, 6)]


def test_what_is_kept_is_in_8_bits() -> None:
    weight, _ = layer(9, 6, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_linear(activations(5, 6, dtype=torch.bfloat16), weight, None, DeferredGradients())
    assert [tensor.dtype for tensor in saved if tensor.shape == (5, 6)] == [E4M3]


def test_a_weight_gradient_that_is_put_off_is_the_same() -> None:
    found = []
    for split in (False, True):
        (weight, bias), deferred = layer(9, 6, torch.bfloat16), DeferredGradients()
        deferred.enabled = split
        for micro in range(2):
            x = activations(5, 3, 6, dtype=torch.bfloat16, seed=micro).requires_grad_()
            y = fp8_linear(x, weight, bias, deferred)
            if not split:
                y.square().sum().backward()
                continue
            before = None if weight.grad is None else weight.grad.clone()
            with deferred.collect(micro):
                y.square().sum().backward()
            assert deferred.parameters(micro) == [weight]
            assert weight.grad is None if before is None else torch.equal(weight.grad, before)  # type: ignore[arg-type]
            deferred.run(micro)
        found.append((weight.grad, bias.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other) and one.abs().sum() > 0
