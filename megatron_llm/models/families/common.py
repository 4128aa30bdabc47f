"""What the families' files share: pieces of mapping tables and the reading of `config.json`."""

from collections.abc import Mapping
from typing import Any

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.mapping import HfTensor, Rule
from megatron_llm.utils.errors import UserError

LAYER = "model.layers.{i}"
LLAMA_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
}


def plain(ours: str, theirs: str, *names: str) -> list[Rule]:
    """One tensor to one tensor: the weight, or the attributes `names`."""
    return [Rule(f"{ours}.{name}", (HfTensor(f"{theirs}.{name}"),)) for name in names or ("weight",)]


def stacked(ours: str, theirs: str, parts: tuple[str, ...], *names: str, interleaved: bool = False) -> list[Rule]:
    """Parts of ours stacked in one tensor of theirs, one after the other or head by head."""
    return [Rule(f"{ours}.{name}", (HfTensor(f"{theirs}.{name}", parts, interleaved=interleaved),)) for name in names or ("weight",)]


def separate(ours: str, theirs: str, parts: tuple[str, ...], *names: str) -> list[Rule]:
    """Parts of ours that are tensors of their own; `{part}` in `theirs` stands for the part."""
    return [
        Rule(f"{ours}.{name}", tuple(HfTensor(f"{theirs.replace('{part}', part)}.{name}", (part,)) for part in parts))
        for name in names or ("weight",)
    ]


# The learned scaling of rotary positions; our own keys, since transformers does not know it.
CLEX = (*plain("clex.up", "model.clex.up"), *plain("clex.down", "model.clex.down"))


def llama_rules(*, gate_up: str | None = None) -> list[Rule]:
    """LLaMA's names, which many families took over, with biases and query/key norms where a family has them.

    `gate_up` is the name of a tensor that stacks gate and up, where they are not tensors of their own.
    """
    up = f"{LAYER}.mlp.{gate_up}" if gate_up else f"{LAYER}.mlp.{{part}}_proj"
    return [
        *plain("embedding.word", "model.embed_tokens"),
        *plain("layers.{i}.norm1", f"{LAYER}.input_layernorm"),
        *separate("layers.{i}.attention.qkv", f"{LAYER}.self_attn.{{part}}_proj", ("q", "k", "v"), "weight", "bias"),
        *plain("layers.{i}.attention.q_norm", f"{LAYER}.self_attn.q_norm"),
        *plain("layers.{i}.attention.k_norm", f"{LAYER}.self_attn.k_norm"),
        *plain("layers.{i}.attention.out", f"{LAYER}.self_attn.o_proj", "weight", "bias"),
        *plain("layers.{i}.norm2", f"{LAYER}.post_attention_layernorm"),
        *(stacked if gate_up else separate)("layers.{i}.mlp.up", up, ("gate", "up")),
        *plain("layers.{i}.mlp.down", f"{LAYER}.mlp.down_proj"),
        *plain("final_norm", "model.norm"),
        *plain("head", "lm_head"),
        *CLEX,
    ]


def llama_hf_config(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The entries of `config.json` that LLaMA-like families of transformers share, rotary settings apart."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "hidden_act": "silu",
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
    }


def llama_fields(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Fields of ModelConfig from a LLaMA-like `config.json`, rotary settings apart."""
    expect(hf, family, hidden_act=("silu",))
    found = pick(hf, family, LLAMA_NAMES)
    heads = found["num_attention_heads"]
    return found | {
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or found["hidden_size"] // heads,
        "max_position_embeddings": need(hf, family, "max_position_embeddings"),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "attention_dropout": float(hf.get("attention_dropout") or 0.0),
        "init_method_std": float(hf.get("initializer_range") or 0.02),
    }


def need(hf: Mapping[str, Any], family: str, key: str) -> Any:
    """`hf[key]`; UserError when `config.json` does not have it."""
    if hf.get(key) is None:
        raise UserError(f"config.json has no {key}, which a {family} model needs: it is incomplete, take the original file")
    return hf[key]


def pick(hf: Mapping[str, Any], family: str, names: Mapping[str, str]) -> dict[str, Any]:
    """Our names with the values of theirs; UserError for one that is missing."""
    return {ours: need(hf, family, theirs) for ours, theirs in names.items()}


def expect(hf: Mapping[str, Any], family: str, **allowed: tuple[Any, ...]) -> None:
    """UserError when an entry of `config.json` is given and has another value than those the family's decoder computes."""
    for key, values in allowed.items():
        if key in hf and hf[key] not in values:
            choices = " or ".join(repr(value) for value in values)
            raise UserError(
                f"config.json has {key} {hf[key]!r}; the {family} family supports {choices} only, so the model would be another"
            )


def even_rotary(rotary_dim: int) -> list[str]:
    """A sentence when channels cannot be turned in pairs."""
    if rotary_dim > 0 and rotary_dim % 2 == 0:
        return []
    return [f"rotary positions turn pairs of channels, got {rotary_dim} of them: change hidden-size, num-attention-heads or kv-channels"]


def fixed_choices(config: ModelConfig, family: str, **fixed: Any) -> list[str]:
    """A sentence for each setting that is given and that this family has not to choose."""
    return [
        f"the {family} family has {name.replace('_', '-')} {value}, got {getattr(config, name)}: leave it out or choose another --model"
        for name, value in fixed.items()
        if getattr(config, name) not in (None, value)
    ]


def llama_choices(config: ModelConfig, family: str, **free: bool) -> list[str]:
    """`fixed_choices` of a plain LLaMA-like family; name the settings that are free."""
    fixed = {
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "sliding_window": None,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "parallel_residual": False,
        "normalized_head": False,
    }
    return fixed_choices(config, family, **{name: value for name, value in fixed.items() if name not in free})


def rotary_channels(config: ModelConfig, default_percent: float = 1.0) -> int:
    """Channels of a head that are rotated."""
    percent = default_percent if config.rotary_percent is None else config.rotary_percent
    return int((config.kv_channels or 0) * percent)


def one_group(config: ModelConfig, family: str) -> list[str]:
    """A sentence when a format without grouped heads is asked for them."""
    if config.num_query_groups in (None, config.num_attention_heads):
        return []
    return [
        f"the {family} family has one key/value head a query head, got num-query-groups {config.num_query_groups} "
        f"for {config.num_attention_heads} heads: leave num-query-groups out, or use --model llama"
    ]


def even_heads(config: ModelConfig, family: str) -> list[str]:
    """A sentence when a format without a head size of its own is asked for one."""
    if config.kv_channels is None or config.kv_channels * config.num_attention_heads == config.hidden_size:
        return []
    return [
        f"the {family} family's heads share hidden-size {config.hidden_size} evenly, got {config.num_attention_heads} heads of "
        f"{config.kv_channels}: leave kv-channels out"
    ]


def plain_mlp(config: ModelConfig, family: str) -> list[str]:
    """A sentence when a format whose MLP is always 4 x hidden is asked for another."""
    if config.ffn_hidden_size in (None, 4 * config.hidden_size):
        return []
    return [f"the {family} family's MLP is 4 x hidden-size = {4 * config.hidden_size} wide, got {config.ffn_hidden_size}: leave it out"]


def no_rotary(config: ModelConfig, family: str) -> list[str]:
    """A sentence when rotary scaling is asked of a family without rotary positions."""
    if config.rope_scaling_type == "none":
        return []
    return [f"rope-scaling-type {config.rope_scaling_type} needs rotary positions, which the {family} family does not have here"]
