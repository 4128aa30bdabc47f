"""Baichuan 7B and 13B, Baichuan 2 (Baichuan Inc. 2023): LLaMA with fused QKV (`trust_remote_code` models).

7B has rotary positions, 13B ALiBi; version 2 scales each row of the output layer to length 1 in every forward pass.
The published `config.json` files say neither, so both are told from what they do have; ours say it in two more entries.
"""

from typing import Any

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.families.common import (
    LAYER,
    LLAMA_NAMES,
    even_heads,
    even_rotary,
    expect,
    fixed_choices,
    llama_choices,
    llama_rules,
    need,
    no_rotary,
    one_group,
    pick,
    stacked,
)
from megatron_llm.models.family import Architecture, Family
from megatron_llm.models.mapping import MappingTable

_QKV = "layers.{i}.attention.qkv.weight"
_VOCABULARY_2 = 125696  # every Baichuan 2 has it, no Baichuan 1

TABLE = MappingTable(
    [
        *(rule for rule in llama_rules() if rule.logical != _QKV),
        *stacked("layers.{i}.attention.qkv", f"{LAYER}.self_attn.W_pack", ("q", "k", "v")),
    ]
)


def _alibi(config: ModelConfig) -> bool:
    return config.position_embedding_type == "alibi"


def architecture(config: ModelConfig) -> Architecture:
    """Rotary positions unless `position_embedding_type` is alibi."""
    normalized = bool(config.normalized_head)
    if _alibi(config):
        return Architecture(positions="alibi", normalized_head=normalized)
    return Architecture(rotary_dim=config.kv_channels or 0, normalized_head=normalized)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` that the published loaders read."""
    length = config.max_position_embeddings
    return {
        "architectures": ["BaichuanForCausalLM" if _alibi(config) or config.normalized_head else "BaiChuanForCausalLM"],
        "model_type": "baichuan",
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA_NAMES.items()},
        **({"model_max_length": length} if _alibi(config) else {"max_position_embeddings": length, "model_max_length": length}),
        **({"z_loss_weight": 0} if config.normalized_head else {}),
        "position_embedding_type": "alibi" if _alibi(config) else "rope",
        "normalized_head": bool(config.normalized_head),
        "hidden_act": "silu",
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """From the published `config.json`, or ours."""
    expect(hf, "baichuan", hidden_act=("silu",), tie_word_embeddings=(False,), position_embedding_type=("rope", "alibi"))
    rotary = hf.get("position_embedding_type", "rope" if "max_position_embeddings" in hf else "alibi") == "rope"
    second = "z_loss_weight" in hf or hf.get("vocab_size") == _VOCABULARY_2
    return {
        **pick(hf, "baichuan", LLAMA_NAMES),
        "max_position_embeddings": need(hf, "baichuan", "max_position_embeddings" if rotary else "model_max_length"),
        "position_embedding_type": "rope" if rotary else "alibi",
        "normalized_head": bool(hf.get("normalized_head", second)),
        "tie_word_embeddings": False,
        "init_method_std": float(hf.get("initializer_range") or 0.02),
    }


def violations(config: ModelConfig) -> list[str]:
    """A format without grouped heads, scaled positions, other rotary bases or a tied output layer."""
    found = one_group(config, "baichuan") + even_heads(config, "baichuan") + no_rotary(config, "baichuan")
    found += fixed_choices(config, "baichuan", rotary_base=10000.0, tie_word_embeddings=False)
    if config.position_embedding_type == "learned_absolute":
        found.append("the baichuan family has position-embedding-type rope or alibi, got learned_absolute: choose one of them")
    if not _alibi(config):
        found += even_rotary(config.kv_channels or 2)
    return found + llama_choices(config, "baichuan", position_embedding_type=True, normalized_head=True)


FAMILY = Family("baichuan", ("baichuan",), architecture, TABLE, hf_config, from_hf, violations)
