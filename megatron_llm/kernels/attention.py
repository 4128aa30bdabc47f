"""Causal attention on the CPU by the C++ operators, which compute no pair of tokens above the blocks on the diagonal.

They take sequences of which a block of scores lies in the second cache. Heads are filled up to a multiple of 32 features.
What the operators do not take (a mask, dropout, cached keys, fewer key heads than threads) goes to torch's own attention.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_llm.kernels import reference

LONGEST = 4096  # tokens; beyond, torch's own attention is about as fast without AVX-512
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`reference.attention`; by the C++ operators where the attention is plainly causal and of a size that they take."""
    plain = mask is None and dropout == 0.0 and query.dtype in _TYPES
    fits = 1 < query.shape[2] <= LONGEST and query.shape[2] == key.shape[2]
    if plain and fits and key.shape[0] * key.shape[1] >= torch.get_num_threads():
        return causal_attention(query, key, value)
    return reference.attention(query, key, value, mask, dropout)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor
        out, log_sum_exp = torch.ops.megatron_llm.causal_attention(query, key, value, 1.0 / math.sqrt(query.shape[-1]))
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        query_grad, key_grad, value_grad = torch.ops.megatron_llm.causal_attention_backward(grad, *saved, 1.0 / math.sqrt(grad.shape[-1]))
        return query_grad, key_grad, value_grad


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of query [B, heads, S, D] with key and value [B, kv_heads, S, D].

    The result lies as [S, B, heads, D] in memory, and so do the gradients. Softmax and sums in fp32.
    """
    result: Tensor = _CausalAttention.apply(query, key, value)
    return result
