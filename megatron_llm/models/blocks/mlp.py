"""The feed-forward part of a block: gated (SwiGLU, GeGLU) or plain (GELU), its width split over the TP ranks."""

from torch import Tensor, nn

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.blocks.context import BuildContext
from megatron_llm.models.family import Architecture
from megatron_llm.parallel.layers import ColumnParallelLinear, ColumnPart, RowParallelLinear


class Mlp(nn.Module):
    """[S or S/tp, B, H] to the same."""

    def __init__(self, build: BuildContext, architecture: Architecture, config: ModelConfig, layer: int, *, output_std: float) -> None:
        super().__init__()
        assert config.ffn_hidden_size is not None, "the model configuration must be resolved"
        tp, name, width, bias = build.parallel.tp.size, f"layers.{layer}.mlp", config.ffn_hidden_size, architecture.mlp_bias
        parts = [ColumnPart(part, width, tp) for part in (("gate", "up") if architecture.gated_mlp else ("",))]
        self.up = ColumnParallelLinear(build.parallel, f"{name}.up", config.hidden_size, parts, bias=bias, std=config.init_method_std)
        self.down = RowParallelLinear(build.parallel, f"{name}.down", width, config.hidden_size, bias=bias, std=output_std)
        self.gated, self.activation, self.kernels = architecture.gated_mlp, architecture.activation, build.kernels

    def forward(self, x: Tensor) -> Tensor:
        """Up, activation, down."""
        wide = self.up(x)
        if not self.gated:
            return self.down(self._activate(wide))
        if self.activation == "silu":
            return self.down(self.kernels.swiglu(wide))
        gate, up = wide.chunk(2, dim=-1)
        return self.down(self._activate(gate) * up)

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return self.kernels.silu(x)
        return self.kernels.gelu(x) if self.activation == "gelu" else self.kernels.gelu_tanh(x)
