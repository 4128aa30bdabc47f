"""The forward pass of LLaMA-like models on the CPU with fewer and fused operators: what a step of a small batch spends its time on.

A pass of transformers over one layer is some forty operators for a handful of small products. Here the projections that read
the same input are one product, and RMSNorm, rotary embedding and SwiGLU one operator each (csrc/cpu/, or plain torch where
these are not built). The weights are the model's own: its parameters become views of the joined ones, so memory stays as it
is. Whether the results are the model's is tried out before this pass is used; other models keep their own.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_llm.kernels import native, reference

log = logging.getLogger(__name__)
_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest logit


class _Joined(NamedTuple):
    """One product in place of several."""

    weight: Tensor
    bias: Tensor | None


class _Layer(NamedTuple):
    first_norm: Any
    heads: _Joined  # queries, keys and values
    query_norm: Any  # None where there is none
    key_norm: Any
    out: Any
    second_norm: Any
    gate_and_up: _Joined
    down: Any


class _Operators(NamedTuple):
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


class LlamaPass:
    """The pass over one model. Make it with `llama_pass`, which knows for which models it is right."""

    def __init__(self, model: Any) -> None:
        self._embed, self._head, self._norm = model.model.embed_tokens, model.lm_head, model.model.norm
        self._positions = model.model.rotary_emb
        self._fp32 = torch.zeros(1)  # tells `_positions` the type and device of its results
        self._operators = _operators()
        attention = model.model.layers[0].self_attn
        self._width: int = attention.head_dim
        self._queries: int = attention.q_proj.out_features // self._width
        self._keys: int = attention.k_proj.out_features // self._width
        self._layers = [_layer(layer) for layer in model.model.layers]

    def __call__(self, ids: Tensor, cache: Any, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocabulary] behind the last column of ids [rows, new]; arguments as those of `LanguageModel.forward`."""
        rows, new = ids.shape
        allowed = _additive(mask, new, self._embed.weight.dtype)
        cos, sin = (each[..., : self._width // 2].reshape(1, rows * new, 1, -1) for each in self._positions(self._fp32, positions))
        x = functional.embedding(ids, self._embed.weight).view(rows * new, -1)
        for number, layer in enumerate(self._layers):
            y = self._rms_norm(x, layer.first_norm)
            x = x + layer.out(self._attend(y, layer, number, cache, (rows, new), allowed, cos, sin))
            y = functional.linear(self._rms_norm(x, layer.second_norm), *layer.gate_and_up)
            x = x + layer.down(self._operators.swiglu(y))
        logits: Tensor = self._head(self._rms_norm(x.view(rows, new, -1)[:, -1], self._norm))
        return logits

    def _rms_norm(self, x: Tensor, norm: Any) -> Tensor:
        return self._operators.rms_norm(x, norm.weight, norm.variance_epsilon)

    def _attend(
        self, y: Tensor, layer: _Layer, number: int, cache: Any, shape: tuple[int, int], allowed: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attention of the new tokens [rows x new, hidden] to what the cache holds and to themselves, before its last product."""
        (rows, new), queries, keys = shape, self._queries, self._keys
        heads = functional.linear(y, *layer.heads).view(1, rows * new, queries + 2 * keys, self._width)
        turned = heads[:, :, : queries + keys]
        if layer.query_norm is not None:
            parts = turned.split((queries, keys), dim=2)
            norms = (layer.query_norm, layer.key_norm)
            turned = torch.cat([self._rms_norm(part, norm) for part, norm in zip(parts, norms, strict=True)], dim=2)
        turned = self._operators.rotary(turned, cos, sin).view(rows, new, queries + keys, self._width)
        value = heads.view(rows, new, queries + 2 * keys, self._width)[:, :, queries + keys :].transpose(1, 2)
        key, value = cache.update(turned[:, :, queries:].transpose(1, 2), value, number)
        query = turned[:, :, :queries]
        if new == 1:
            # The queries that share keys are rows of one product.
            query = query.view(rows, keys, queries // keys, self._width)
        else:
            query = query.transpose(1, 2)
            key, value = (each if queries == keys else each.repeat_interleave(queries // keys, dim=1) for each in (key, value))
        causal = allowed is None and new > 1
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=causal)
        return (out if new == 1 else out.transpose(1, 2)).reshape(rows * new, queries * self._width)


def llama_pass(model: Any) -> LlamaPass | None:
    """The pass for a model of transformers; None when it is of another kind, or when the results are not the model's."""
    if type(model).__name__ not in _FAMILIES or not type(model).__module__.startswith("transformers.") or not _plain(model):
        return None
    found = LlamaPass(model)
    difference = _difference(model, found)
    if not difference <= _TOLERANCE[model.dtype]:
        log.warning("the fused pass differs from transformers' own by %.2g of the largest logit and is not used", difference)
        return None
    return found


def _plain(model: Any) -> bool:
    """Whether nothing about the model is out of the ordinary: type and place of weights, kinds of layers, windows, hooks."""
    config, parameters = model.config, list(model.parameters())
    linear = [module for module in model.modules() if hasattr(module, "in_features")]
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == model.dtype and not tensor.requires_grad for tensor in parameters)
        and model.dtype in _TOLERANCE
        and all(type(module) is nn.Linear for module in linear)
        and type(model.model.embed_tokens) is nn.Embedding
        and config.hidden_act == "silu"
        and all(getattr(layer.self_attn, "sliding_window", None) is None for layer in model.model.layers)
        and (type(model).__name__ != "MistralForCausalLM" or config.sliding_window is None)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        first_norm=layer.input_layernorm,
        heads=_join([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        out=attention.o_proj,
        second_norm=layer.post_attention_layernorm,
        gate_and_up=_join([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj,
    )


def _join(modules: list[nn.Linear]) -> _Joined:
    """The joined weights and biases of modules, which from now on hold views of them."""
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(module, name) for module in modules]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([part.detach() for part in parts])
        for module, view in zip(modules, whole.split([len(part) for part in parts]), strict=True):
            setattr(module, name, nn.Parameter(view, requires_grad=False))
        joined.append(whole)
    assert joined[0] is not None
    return _Joined(joined[0], joined[1])


def _operators() -> _Operators:
    if native.load() is not None:
        return _Operators(reference.rms_norm, reference.rotary, reference.swiglu)
    operators = torch.ops.megatron_llm
    rms_norm, rotary = operators.rms_norm.default, operators.rotary.default
    return _Operators(
        lambda x, weight, epsilon: rms_norm(x, weight, epsilon)[0],
        lambda x, cos, sin: rotary(x, cos, sin, False, False),
        lambda x: operators.swiglu.default(*x.chunk(2, dim=-1)),
    )


def _additive(mask: Tensor, new: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the weights of attention [rows, 1, new, columns], or None where it is nothing, or causal and no more."""
    columns = mask.shape[1]
    full = bool(mask.all())
    if full and new in (1, columns):
        return None
    allowed = mask[:, None, None, :].bool()
    if new > 1:
        place = torch.arange(columns)
        last = place[columns - new :, None]
        # A padded token sees itself, as a row of nothing but minus infinity has no softmax.
        allowed = (allowed & (place <= last)) | (place == last)
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))


@torch.inference_mode()
def _difference(model: Any, found: LlamaPass) -> float:
    """How far logits are from those of the model's own pass, as a share of the largest: two padded prompts, then a token each."""
    from transformers import DynamicCache

    ids = torch.arange(2, 12).view(2, 5) % found._embed.num_embeddings
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches, worst = (DynamicCache(), DynamicCache()), 0.0
    for _ in range(2):
        own = model(input_ids=ids, attention_mask=mask, past_key_values=caches[0], position_ids=positions, use_cache=True).logits[:, -1]
        new = found(ids, caches[1], mask, positions)
        # Not `max`, which may pass over a NaN.
        worst += float((own - new).abs().max() / own.abs().max())
        ids, mask, positions = own.argmax(-1, keepdim=True), functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
    return worst
