"""Blocks of causal attention and the softmax between their products equal the plain forms in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels.attention import LONGEST, attention, causal_attention

operators = torch.ops.megatron_llm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain_softmax(scores: Tensor, scale: float, first: int, period: int) -> Tensor:
    """Mask, scale and softmax one after the other."""
    positions = first + torch.arange(scores.shape[-2]) % period
    hidden = positions.unsqueeze(1) < torch.arange(scores.shape[-1])
    return (scores * scale).masked_fill(hidden, -math.inf).softmax(-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "first", "period"), [(5, 5, 0, 5), (6, 37, 30, 3), (1, 1, 0, 1), (4, 1500, 1490, 4), (7, 64, 3, 7), (3, 16, 40, 3)]
)
def test_softmax_equals_mask_scale_softmax(capability: str, dtype: torch.dtype, rows: int, columns: int, first: int, period: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    scores = (torch.randn(2, rows, columns, generator=generator) * 5).to(dtype)
    upstream = torch.randn(2, rows, columns, generator=generator).to(dtype)
    wide = scores.double().requires_grad_()
    expected = plain_softmax(wide, 0.3, first, period)
    expected.backward(upstream.double())
    assert wide.grad is not None
    found = operators.causal_softmax(scores, 0.3, first, period)
    gradient = operators.causal_softmax_backward(upstream, expected.detach().to(dtype), 0.3, first, period)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=tolerance, atol=tolerance * 3)


def test_softmax_takes_slices_and_extreme_scores(capability: str) -> None:
    whole = torch.randn(3, 8, 11).mul_(3)
    whole[0, 2, :3] = torch.tensor([-1e30, 1e30, -math.inf])
    torch.testing.assert_close(operators.causal_softmax(whole[:, ::2, :9], 0.5, 2, 4), plain_softmax(whole[:, ::2, :9], 0.5, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "length", "block"), [(4, 4, 19, 8), (6, 2, 33, 16), (5, 1, 16, 64), (2, 2, 2, 1)])
def test_blocks_equal_attention(loaded: None, dtype: torch.dtype, heads: int, kv_heads: int, length: int, block: int) -> None:
    # [S, B, heads, D] seen as [B, heads, S, D], as the model's projections lie.
    tensors = [torch.randn(length, 3, count, 8).to(dtype).permute(1, 2, 0, 3) for count in (heads, kv_heads, kv_heads)]
    own = [tensor.detach().requires_grad_() for tensor in tensors]
    wide = [tensor.double().detach().requires_grad_() for tensor in tensors]
    found = causal_attention(own[0], own[1], own[2], block)
    expected = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True, enable_gqa=True)
    upstream = torch.randn(expected.shape).to(dtype)
    found.backward(upstream)
    expected.backward(upstream.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(own, wide, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance * 3)


def test_what_is_not_short_and_causal_goes_to_torch(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("blocks were used")

    monkeypatch.setattr("megatron_llm.kernels.attention.causal_attention", refuse)
    x = torch.randn(1, 2, 6, 4)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, x, x, mask, 0.0), F.scaled_dot_product_attention(x, x, x, is_causal=True))
    attention(x, x, x, None, 0.5)
    long = torch.randn(1, 1, LONGEST + 1, 4)
    attention(long, long, long, None, 0.0)
    with pytest.raises(AssertionError, match="blocks were used"):
        attention(x, x, x, None, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_s_checks_of_the_operators(loaded: None, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 6, 9).to(dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.causal_softmax, (scores, 0.5, 3, 3), test_utils=checks)
    weights = operators.causal_softmax(scores, 0.5, 3, 3)
    torch.library.opcheck(operators.causal_softmax_backward, (scores, weights, 0.5, 3, 3), test_utils=checks)
