"""Causal attention by the C++ operators equals the plain form in fp64, forward and backward, under every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels.attention import LONGEST, attention, causal_attention

operators = torch.ops.megatron_llm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Heads, key heads, tokens, size: grouped and not, shorter than a block, around whole blocks; sizes that are filled up.
SIZES = [
    (4, 4, 19, 32),
    (6, 2, 33, 64),
    (5, 1, 2, 32),
    (2, 2, 95, 96),
    (1, 1, 64, 128),
    (3, 3, 130, 32),
    (2, 1, 1, 32),
    (6, 3, 37, 7),
    (2, 2, 33, 80),
]


def heads(length: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """[S, B, heads, D] seen as [B, heads, S, D], a slice of a wider row, as the model's projections lie."""
    return torch.randn(length, 3, count + 1, size).to(dtype)[:, :, 1:].permute(1, 2, 0, 3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("count", "kv_count", "length", "size"), SIZES)
def test_equals_plain_attention(capability: str, dtype: torch.dtype, count: int, kv_count: int, length: int, size: int) -> None:
    torch.manual_seed(length)
    tensors = [heads(length, number, size, dtype) for number in (count, kv_count, kv_count)]
    own = [tensor.detach().requires_grad_() for tensor in tensors]
    wide = [tensor.double().detach().requires_grad_() for tensor in tensors]
    found = causal_attention(own[0], own[1], own[2])
    expected = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True, enable_gqa=True)
    assert found.permute(2, 0, 1, 3).is_contiguous()
    upstream = torch.randn(expected.shape).to(dtype)  # contiguous, unlike the result
    found.backward(upstream)
    expected.backward(upstream.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(own, wide, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance * 3)


def test_any_strides_and_scores_that_lie_far_apart(capability: str) -> None:
    x = torch.randn(2, 3, 40, 64)
    x[0, 0, 7] *= 1e4
    apart = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert apart.stride(-1) != 1
    expected = F.scaled_dot_product_attention(x.double(), x.double(), x.double(), is_causal=True)
    torch.testing.assert_close(causal_attention(apart, apart, apart).double(), expected, rtol=1e-5, atol=1e-3)
    assert causal_attention(apart * torch.nan, apart, apart).isnan().all()


def test_the_number_of_threads_changes_nothing(capability: str) -> None:
    tensors = [heads(70, 4, 32, torch.float32).requires_grad_() for _ in range(3)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = causal_attention(tensors[0], tensors[1], tensors[2])
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_the_operators_do_not_take_goes_to_torch(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the operators were used")

    monkeypatch.setattr("megatron_llm.kernels.attention.causal_attention", refuse)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    x = torch.randn(1, 2, 6, 32)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, x, x, mask, 0.0), F.scaled_dot_product_attention(x, x, x, is_causal=True))
    attention(x, x, x, None, 0.5)
    for other in (torch.randn(1, 2, LONGEST + 1, 32), torch.randn(1, 1, 6, 32), x.double()):
        attention(other, other, other, None, 0.0)
    with pytest.raises(AssertionError, match="the operators were used"):
        attention(x, x, x, None, 0.0)


@pytest.mark.parametrize(
    ("query", "key", "value", "words"),
    [
        ((2, 6, 32), (2, 6, 32), (2, 6, 32), "expected .batch, heads, tokens, size."),
        ((1, 3, 6, 32), (1, 2, 6, 32), (1, 2, 6, 32), "does not go with key"),
        ((1, 2, 6, 32), (1, 2, 5, 32), (1, 2, 5, 32), "does not go with key"),
        ((1, 2, 6, 32), (1, 2, 6, 32), (1, 2, 6, 64), "key of shape"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(
    loaded: None, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        operators.causal_attention(torch.randn(query), torch.randn(key), torch.randn(value), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_s_checks_of_the_operators(loaded: None, dtype: torch.dtype) -> None:
    query, key, value = heads(9, 4, 32, dtype), heads(9, 2, 32, dtype), heads(9, 2, 32, dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.causal_attention, (query, key, value, 0.5), test_utils=checks)
    out, log_sum_exp = operators.causal_attention(query, key, value, 0.5)
    arguments = (torch.randn_like(out), query, key, value, out, log_sum_exp, 0.5)
    torch.library.opcheck(operators.causal_attention_backward, arguments, test_utils=checks)
