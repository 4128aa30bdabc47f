"""LLaMA (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases, grouped or multi-query heads."""

from typing import Any

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.family import Family
from megatron_llm.models.mapping import HfTensor, MappingTable, Rule

_LAYER = "model.layers.{i}"

TABLE = MappingTable(
    [
        Rule("embedding.word.weight", (HfTensor("model.embed_tokens.weight"),)),
        Rule("layers.{i}.norm1.weight", (HfTensor(f"{_LAYER}.input_layernorm.weight"),)),
        Rule(
            "layers.{i}.attention.qkv.weight",
            tuple(HfTensor(f"{_LAYER}.self_attn.{part}_proj.weight", (part,)) for part in ("q", "k", "v")),
        ),
        Rule("layers.{i}.attention.out.weight", (HfTensor(f"{_LAYER}.self_attn.o_proj.weight"),)),
        Rule("layers.{i}.norm2.weight", (HfTensor(f"{_LAYER}.post_attention_layernorm.weight"),)),
        Rule("layers.{i}.mlp.up.weight", tuple(HfTensor(f"{_LAYER}.mlp.{part}_proj.weight", (part,)) for part in ("gate", "up"))),
        Rule("layers.{i}.mlp.down.weight", (HfTensor(f"{_LAYER}.mlp.down_proj.weight"),)),
        Rule("final_norm.weight", (HfTensor("model.norm.weight"),)),
        Rule("head.weight", (HfTensor("lm_head.weight"),)),
    ]
)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `LlamaForCausalLM`; both spellings of the rotary base are written, for older and newer readers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
    }


def violations(config: ModelConfig) -> list[str]:
    """The rotary embedding turns pairs of channels, so a head needs an even number of them."""
    if config.kv_channels is not None and config.kv_channels % 2:
        return [
            f"rotary positions need an even head size, got {config.kv_channels}: change hidden-size, num-attention-heads or kv-channels"
        ]
    return []


FAMILY = Family(
    name="llama",
    norm="rms",
    positions="rotary",
    gated_mlp=True,
    linear_bias=False,
    table=TABLE,
    hf_config=hf_config,
    violations=violations,
)
