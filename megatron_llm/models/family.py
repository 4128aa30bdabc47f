"""What distinguishes one model family from another: choices of the one decoder, and its Hugging Face names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.mapping import MappingTable


@dataclass(frozen=True)
class Family:
    """One family of decoders.

    `table` maps logical names to Hugging Face tensors, in both directions. `hf_config` gives the content of
    `config.json` for a resolved configuration. `violations` lists what this family cannot do, one sentence each.
    """

    name: str
    norm: Literal["rms", "layer"]
    positions: Literal["rotary", "learned"]
    gated_mlp: bool
    linear_bias: bool
    table: MappingTable
    hf_config: Callable[[ModelConfig], dict[str, Any]]
    violations: Callable[[ModelConfig], list[str]]
