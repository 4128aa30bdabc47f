"""Causal attention reaches a fused kernel on a GPU: the plain form, which keeps all scores, is forbidden and it still runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_llm.kernels.reference import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def inputs(length: int, heads: int, kv_heads: int, channels: int) -> list[torch.Tensor]:
    """Query, key and value as the model makes them: [S, B, heads, D] seen as [B, heads, S, D]."""
    make = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(length, 2, count, channels) for count in (heads, kv_heads, kv_heads)]
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=make).permute(1, 2, 0, 3).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(8, 8, 128), (8, 2, 128), (8, 2, 64)])
def test_causal_attention_is_eligible(backend: SDPBackend, heads: int, kv_heads: int, channels: int) -> None:
    """Forward and backward by this backend alone equal fp32 attention written out, grouped heads included."""
    query, key, value = inputs(257, heads, kv_heads, channels)
    with sdpa_kernel(backend):
        mixed = attention(query, key, value, None, 0.0)
        mixed.backward(torch.ones_like(mixed))
    q, k, v = (t.detach().float().requires_grad_() for t in (query, key, value))
    repeat = heads // kv_heads
    scores = q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) / channels**0.5
    hidden = torch.ones(257, 257, dtype=torch.bool, device="cuda").triu(1)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 1)
    expected.backward(torch.ones_like(expected))
    assert torch.allclose(mixed.float(), expected, atol=2e-2)
    for got, wanted in zip((query, key, value), (q, k, v), strict=True):
        assert got.grad is not None and wanted.grad is not None
        assert (got.grad.float() - wanted.grad).abs().max() <= 2e-2 * wanted.grad.abs().max()
