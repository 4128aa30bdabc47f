"""LayerNorm and RMSNorm with their weights whole on every TP rank."""

from typing import Literal

from torch import Tensor, nn

from megatron_llm.models.blocks.context import BuildContext
from megatron_llm.parallel.layers import replicated_parameter


class Norm(nn.Module):
    """Normalisation over the last dimension; `kind` rms has a weight, layer a weight and a bias."""

    def __init__(self, build: BuildContext, logical_name: str, kind: Literal["rms", "layer"], size: int, epsilon: float) -> None:
        super().__init__()
        self.kernels, self.epsilon = build.kernels, epsilon
        self.weight = replicated_parameter(build.parallel, f"{logical_name}.weight", (size,), fill=1.0)
        self.bias = replicated_parameter(build.parallel, f"{logical_name}.bias", (size,)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]."""
        if self.bias is None:
            return self.kernels.rms_norm(x, self.weight, self.epsilon)
        return self.kernels.layer_norm(x, self.weight, self.bias, self.epsilon)
