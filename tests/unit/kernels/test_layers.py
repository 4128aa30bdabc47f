"""RMSNorm, rotary and SwiGLU in C++, forward and backward, against the plain form in fp64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_llm.kernels import fused, reference

# Forward: rounded once or twice. Backward: that of sums over a row.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
TYPES = list(ROUNDING)


def compare(run: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], *rest: object) -> None:
    """Outputs and gradients of `run` on the inputs, against `plain` on their fp64 copies; views stay views."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    found, wanted = run(*inputs, *rest), plain(*exact, *rest)
    assert found.dtype == inputs[0].dtype and found.shape == wanted.shape
    # An upstream gradient whose dimensions lie in another order, as attention's do.
    upstream = torch.randn(wanted.shape[::-1]).to(found.dtype).permute(*reversed(range(wanted.dim())))
    gradients = torch.autograd.grad(found, inputs, upstream)
    exact_gradients = torch.autograd.grad(wanted, exact, upstream.double())
    tolerance = ROUNDING[inputs[0].dtype]
    for one, other in zip((found, *gradients), (wanted, *exact_gradients), strict=True):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale * 0.3 + 1e-12)


def exact_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The definition, without conversions."""
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def exact_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split, without conversions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def exact_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours, without conversions."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 197])
def test_rms_norm(capability: str, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    weight = (1 + 0.3 * torch.randn(columns)).to(dtype)
    wide = torch.randn(67, 3, 2 * columns).to(dtype)
    for x in (
        wide[..., :columns].contiguous(),
        wide[..., columns:],
        wide[..., :columns].transpose(0, 1),
        wide[:1, :1, ::2],
        wide[:0, :, ::2],
    ):
        compare(fused.rms_norm, exact_rms_norm, [x, weight], 0.5)  # far from 0, where the gradients of short rows cancel


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [2, 10, 16, 64, 80])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(capability: str, interleaved: bool, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    run = fused.rotary_interleaved if interleaved else fused.rotary
    exact = exact_interleaved if interleaved else exact_rotary
    whole = torch.randn(5, 3, 7, size + 6).to(dtype)
    for batch in (1, 3):
        angles = torch.randn(5, batch, 1, size // 2)
        cos, sin = angles.cos(), angles.sin()
        views = (whole[..., :size].contiguous(), whole[:, :, 2:4, :size], whole[..., 6:].transpose(0, 1).contiguous().transpose(0, 1))
        for x in views:
            compare(partial(run, cos=cos, sin=sin), partial(exact, cos=cos.double(), sin=sin.double()), [x])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 197])
def test_swiglu(capability: str, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    wide = (3 * torch.randn(13, 3, 2 * columns)).to(dtype)
    wide[0, 0, 0] = 60.0 if dtype == torch.float16 else 200.0
    wide[1, 0, 0] = -60.0 if dtype == torch.float16 else -200.0
    apart = torch.stack((wide, wide), -1)[..., 0]
    for x in (wide, wide.transpose(0, 1), apart, wide[:0], wide[:1, 0]):
        compare(fused.swiglu, reference.swiglu, [x])


def test_the_number_of_threads_changes_nothing(capability: str) -> None:
    x, weight, grad = torch.randn(1000, 65), torch.randn(65), torch.randn(1000, 65)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, scale = torch.ops.megatron_llm.rms_norm(x, weight, 1e-6)
            results.append([y, *torch.ops.megatron_llm.rms_norm_backward(grad, x, weight, scale)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


def test_other_types_take_the_plain_form(loaded: None) -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert torch.equal(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(fused.swiglu(x), reference.swiglu(x))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(reference.swiglu(x), gate * gate.sigmoid() * up)


def test_what_does_not_fit_is_said(loaded: None) -> None:
    with pytest.raises(ValueError, match="expected \\[S, B or 1, 1, D / 2\\]"):
        fused.rotary(torch.randn(4, 2, 3, 8), torch.randn(4, 2, 1, 8), torch.randn(4, 2, 1, 8))
    with pytest.raises(ValueError, match="gate \\[3, 8\\], up \\[3, 7\\]"):
        torch.ops.megatron_llm.swiglu(torch.randn(3, 8), torch.randn(3, 7))
    with pytest.raises(ValueError, match="weight \\[7\\]"):
        fused.rms_norm(torch.randn(3, 8), torch.randn(7), 1e-6)


def test_operators_are_registered_well(loaded: None) -> None:
    operators, check = torch.ops.megatron_llm, torch.library.opcheck
    x, weight, scale = torch.randn(6, 2, 8), torch.randn(8), torch.rand(12)
    check(operators.rms_norm.default, (x, weight, 1e-6))
    check(operators.rms_norm_backward.default, (x, x, weight, scale))
    check(operators.rotary.default, (torch.randn(6, 2, 3, 8), torch.randn(6, 1, 1, 4), torch.randn(6, 1, 1, 4), True, False))
    check(operators.swiglu.default, (x, x))
    check(operators.swiglu_backward.default, (x, x, x))
