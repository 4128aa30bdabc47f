"""Causal attention on the CPU as batched products over blocks of queries with a softmax between them.

torch's CPU kernel for attention works through the keys in tiles, each a product too small to run at full speed. At a
few hundred tokens it is faster to take a block of queries, all keys that it may see, and one batched product: half the
pairs of tokens above the diagonal are then left out as well, and what remains of them in a block is left out by the
softmax. It keeps the weights of all pairs for the backward, so at greater lengths torch's kernel stays.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels import reference

LONGEST = 512  # tokens
_BLOCK = {torch.float32: 64}  # queries; for 16-bit types 128, whose products need to be larger to run at full speed


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`reference.attention`; in blocks where the sequence is short and the attention plainly causal."""
    short = 1 < query.shape[2] <= LONGEST and query.shape[2] == key.shape[2]
    if short and mask is None and dropout == 0.0:
        return causal_attention(query, key, value, _BLOCK.get(query.dtype, 128))
    return reference.attention(query, key, value, mask, dropout)


class _CausalAttention(torch.autograd.Function):
    """Blocks of queries, each with all keys that it may see; the gradients of keys and values are sums over the blocks.

    Everything is written where the model wants it, as [S, B, heads, D] in memory, so that each tensor is copied once.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, block: int) -> Tensor:
        ctx.shapes, ctx.block = (query.shape, key.shape), block
        keys, values = _batched(key), _batched(value)
        out, kept = _like_projection(query, query.shape), []
        for first, last in _blocks(query.shape[2], block):
            rows = _rows(query, key.shape[1], first, last)
            scores = torch.bmm(rows, keys[:, :last].transpose(1, 2))
            weights = torch.ops.megatron_llm.causal_softmax(scores, _scale(query), first, last - first)
            _write_rows(out, torch.bmm(weights, values[:, :last]), first, last)
            kept += [rows, weights]
        ctx.save_for_backward(keys, values, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (keys, values, *kept), (grad,) = ctx.saved_tensors, grads
        query_shape, key_shape = ctx.shapes
        grad_query, grad_keys, grad_values = _like_projection(grad, query_shape), None, None
        for number, (first, last) in reversed(list(enumerate(_blocks(query_shape[2], ctx.block)))):
            rows, weights = kept[2 * number], kept[2 * number + 1]
            grad_rows = _rows(grad, key_shape[1], first, last)
            grad_weights = torch.bmm(grad_rows, values[:, :last].transpose(1, 2))
            grad_scores = torch.ops.megatron_llm.causal_softmax_backward(grad_weights, weights, _scale(grad), first, last - first)
            _write_rows(grad_query, torch.bmm(grad_scores, keys[:, :last]), first, last)
            part_keys = torch.bmm(grad_scores.transpose(1, 2), rows)
            part_values = torch.bmm(weights.transpose(1, 2), grad_rows)
            if grad_keys is None or grad_values is None:  # the last block, which sees all keys
                grad_keys, grad_values = part_keys, part_values
            else:
                grad_keys[:, :last] += part_keys
                grad_values[:, :last] += part_values
        assert grad_keys is not None and grad_values is not None, "a sequence has a block"
        return grad_query, grad_keys.view(key_shape), grad_values.view(key_shape), None


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    return [(first, min(first + block, length)) for first in range(0, length, block)]


def _scale(x: Tensor) -> float:
    return 1.0 / math.sqrt(x.shape[-1])


def _batched(x: Tensor) -> Tensor:
    """[B, kv_heads, S, D] to contiguous [B x kv_heads, S, D]."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _like_projection(x: Tensor, shape: torch.Size) -> Tensor:
    """An empty [B, heads, S, D] that lies as [S, B, heads, D] in memory."""
    batch, heads, length, size = shape
    return x.new_empty((length, batch, heads, size)).permute(1, 2, 0, 3)


def _rows(x: Tensor, kv_heads: int, first: int, last: int) -> Tensor:
    """Positions first .. last - 1 of [B, heads, S, D], those of heads that share a key together: [B x kv_heads, rows, D]."""
    return x[:, :, first:last].reshape(x.shape[0] * kv_heads, -1, x.shape[3])


def _write_rows(target: Tensor, rows: Tensor, first: int, last: int) -> None:
    """The reverse of `_rows`."""
    part = target[:, :, first:last]
    part.copy_(rows.view(part.shape))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, block: int) -> Tensor:
    """Causal attention of query [B, heads, S, D] with key and value [B, kv_heads, S, D], `block` queries at a time.

    The query heads that share a key are rows of one product, so grouped heads are not repeated. Softmax in fp32.
    """
    result: Tensor = _CausalAttention.apply(query, key, value, block)
    return result
