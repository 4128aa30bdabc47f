"""Self-attention with the heads split over the TP ranks; grouped-query (Ainslie et al. 2023) and multi-query heads.

With fewer key/value heads than TP ranks, consecutive ranks hold the same head: each computes the keys its own query
heads need, and the gradients of the shared rows are summed when gradients are synchronised.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_llm.config.schema import ModelConfig
from megatron_llm.models.blocks.context import BuildContext, ForwardContext
from megatron_llm.parallel.layers import ColumnParallelLinear, ColumnPart, RowParallelLinear
from megatron_llm.parallel.random import Dropout


class Attention(nn.Module):
    """[S or S/tp, B, H] to the same; inside, [B, heads/tp, S, D]."""

    def __init__(self, build: BuildContext, config: ModelConfig, layer: int, *, bias: bool, output_std: float) -> None:
        super().__init__()
        assert config.num_query_groups is not None and config.kv_channels is not None, "the model configuration must be resolved"
        tp, name = build.parallel.tp.size, f"layers.{layer}.attention"
        heads, groups, self.head_dim = config.num_attention_heads, config.num_query_groups, config.kv_channels
        parts = [ColumnPart("q", heads * self.head_dim, tp)]
        parts += [ColumnPart(part, groups * self.head_dim, min(tp, groups)) for part in ("k", "v")]
        self.qkv = ColumnParallelLinear(build.parallel, f"{name}.qkv", config.hidden_size, parts, bias=bias, std=config.init_method_std)
        self.out = RowParallelLinear(build.parallel, f"{name}.out", heads * self.head_dim, config.hidden_size, bias=bias, std=output_std)
        self.kernels, self.layer, self.recompute = build.kernels, layer, build.recompute_attention
        self.dropout = Dropout(config.attention_dropout, layer, "attention", build.parallel.tp, sharded=True)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Attention over the sequence, and over the cache when there is one."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([size // self.head_dim for size in self.qkv.splits], dim=2)
        if self.recompute and self.training:
            mixed: Tensor = checkpoint(self._core, query, key, value, ctx, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._core(query, key, value, ctx)
        return self.out(mixed)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext) -> Tensor:
        """[S, B, heads, D] each, to [S, B, heads x D]."""
        if ctx.rotary is not None:
            query, key = self.kernels.rotary(query, *ctx.rotary), self.kernels.rotary(key, *ctx.rotary)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if ctx.cache is not None:
            key, value = ctx.cache.append(self.layer, key, value)
        probability = self.dropout.prepare_default_generator(ctx.dropout, query.device)
        return self.kernels.attention(query, key, value, ctx.mask, probability).permute(2, 0, 1, 3).flatten(2)
