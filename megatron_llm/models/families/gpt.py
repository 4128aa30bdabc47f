"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied embeddings.

Hugging Face keeps GPT-2's products as Conv1D, `[in, out]`, with query, key and value fused in one tensor.
"""

from typing import Any

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.family import Family
from megatron_llm.models.mapping import HfTensor, MappingTable, Rule

_LAYER = "transformer.h.{i}"


def _linear(ours: str, theirs: str, parts: tuple[str, ...] = ("",)) -> list[Rule]:
    return [
        Rule(f"layers.{{i}}.{ours}.weight", (HfTensor(f"{_LAYER}.{theirs}.weight", parts, transposed=True),)),
        Rule(f"layers.{{i}}.{ours}.bias", (HfTensor(f"{_LAYER}.{theirs}.bias", parts),)),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.{name}", (HfTensor(f"{theirs}.{name}"),)) for name in ("weight", "bias")]


TABLE = MappingTable(
    [
        Rule("embedding.word.weight", (HfTensor("transformer.wte.weight"),)),
        Rule("embedding.position.weight", (HfTensor("transformer.wpe.weight"),)),
        *_norm("layers.{i}.norm1", f"{_LAYER}.ln_1"),
        *_linear("attention.qkv", "attn.c_attn", ("q", "k", "v")),
        *_linear("attention.out", "attn.c_proj"),
        *_norm("layers.{i}.norm2", f"{_LAYER}.ln_2"),
        *_linear("mlp.up", "mlp.c_fc"),
        *_linear("mlp.down", "mlp.c_proj"),
        *_norm("final_norm", "transformer.ln_f"),
        Rule("head.weight", (HfTensor("lm_head.weight"),)),
    ]
)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `GPT2LMHeadModel`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": config.hidden_size,
        "n_inner": config.ffn_hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        "initializer_range": config.init_method_std,
    }


def violations(config: ModelConfig) -> list[str]:
    """GPT-2's format has neither grouped heads nor a head size of its own, so neither could be exported."""
    found = []
    if config.num_query_groups not in (None, config.num_attention_heads):
        found.append(
            f"the gpt family has one key/value head a query head, got num-query-groups {config.num_query_groups} "
            f"for {config.num_attention_heads} heads: leave num-query-groups out, or use --model llama"
        )
    if config.kv_channels is not None and config.kv_channels * config.num_attention_heads != config.hidden_size:
        found.append(
            f"the gpt family's heads share hidden-size {config.hidden_size} evenly, got {config.num_attention_heads} heads of "
            f"{config.kv_channels}: leave kv-channels out"
        )
    return found


FAMILY = Family(
    name="gpt",
    norm="layer",
    positions="learned",
    gated_mlp=False,
    linear_bias=True,
    table=TABLE,
    hf_config=hf_config,
    violations=violations,
)
