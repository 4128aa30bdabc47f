"""The feed-forward part of a block: gated (SwiGLU) or plain (GELU), its width split over the TP ranks."""

from torch import Tensor, nn

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.blocks.context import BuildContext
from megatron_llm.parallel.layers import ColumnParallelLinear, ColumnPart, RowParallelLinear


class Mlp(nn.Module):
    """[S or S/tp, B, H] to the same."""

    def __init__(self, build: BuildContext, config: ModelConfig, layer: int, *, gated: bool, bias: bool, output_std: float) -> None:
        super().__init__()
        assert config.ffn_hidden_size is not None, "the model configuration must be resolved"
        tp, name, width = build.parallel.tp.size, f"layers.{layer}.mlp", config.ffn_hidden_size
        parts = [ColumnPart(part, width, tp) for part in (("gate", "up") if gated else ("",))]
        self.up = ColumnParallelLinear(build.parallel, f"{name}.up", config.hidden_size, parts, bias=bias, std=config.init_method_std)
        self.down = RowParallelLinear(build.parallel, f"{name}.down", width, config.hidden_size, bias=bias, std=output_std)
        self.gated, self.kernels = gated, build.kernels

    def forward(self, x: Tensor) -> Tensor:
        """Up, activation, down."""
        wide = self.up(x)
        active = self.kernels.swiglu(*wide.chunk(2, dim=-1)) if self.gated else self.kernels.gelu(wide)
        return self.down(active)
