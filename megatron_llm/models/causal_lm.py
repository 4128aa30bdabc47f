"""The one decoder: a causal language model cut into pipeline chunks.

A `ModelChunk` holds a run of layers, with the embedding if it is the first and the final norm, output layer and loss
if it is the last. Its parameters' names are the global logical names, whatever the layout, so two chunks on different
ranks never clash. With one stage the single chunk is the whole model.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_llm.config.schema import ModelConfig
from megatron_llm.kernels.dispatch import Kernels
from megatron_llm.kernels.products import Products
from megatron_llm.models.blocks.block import Block
from megatron_llm.models.blocks.context import BuildContext, ForwardContext, KVCache
from megatron_llm.models.blocks.mask import alibi_slopes, attention_mask
from megatron_llm.models.blocks.norm import Norm
from megatron_llm.models.blocks.rotary import RotaryTables, build_rotary
from megatron_llm.models.family import Architecture, Family
from megatron_llm.models.inputs import MicroBatch, TokenBatch
from megatron_llm.parallel.collectives import sequence_slice
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.layers import (
    ParallelContext,
    VocabParallelEmbedding,
    VocabParallelHead,
    replicated_parameter,
    vocabulary_parameter,
)
from megatron_llm.parallel.linear_loss import linear_cross_entropy
from megatron_llm.parallel.loss import vocab_parallel_cross_entropy
from megatron_llm.parallel.placement import get_placement, set_placement
from megatron_llm.parallel.random import Dropout, DropoutKey, derive_seed


@dataclass(frozen=True)
class ModelOptions:
    """How a model is built and run, apart from its architecture."""

    seed: int
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    compile_mode: str = "default"
    fp8: bool = False


class PositionEmbedding(nn.Module):
    """Learned positions, whole on every TP rank. [S, B] positions to [S, B, H]."""

    def __init__(self, ctx: ParallelContext, positions: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.weight = replicated_parameter(ctx, "embedding.position.weight", (positions, hidden_size), std=std)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Rows of the table."""
        return F.embedding(position_ids, self.weight)


class Embedding(nn.Module):
    """Token embeddings, with learned positions and a norm where the family has them. [B, S] ids to [S or S/tp, B, H]."""

    def __init__(self, build: BuildContext, architecture: Architecture, config: ModelConfig, *, tied_across_stages: bool) -> None:
        super().__init__()
        assert config.vocab_size is not None and config.max_position_embeddings is not None, "the model configuration must be resolved"
        ctx, std, size = build.parallel, config.init_method_std, config.hidden_size
        self.tp, self.shards_sequence, self.scale = ctx.tp, ctx.shards_sequence, architecture.embedding_scale
        self.word = VocabParallelEmbedding(ctx, "embedding.word", config.vocab_size, size, std, tied=tied_across_stages)
        self.position = PositionEmbedding(ctx, config.max_position_embeddings, size, std) if architecture.positions == "learned" else None
        self.norm = Norm(build, "embedding.norm", architecture.norm, size, config.norm_epsilon) if architecture.embedding_norm else None
        self.dropout = Dropout(config.hidden_dropout, -1, "embedding", ctx.tp, sharded=ctx.shards_sequence)

    def forward(self, tokens: Tensor, position_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Token embeddings, scaled, plus positions, normalised."""
        hidden: Tensor = self.word(tokens.t())
        if self.scale != 1.0:
            # The factor is rounded to the activations' type first, as the published models were trained.
            hidden = hidden * torch.tensor(self.scale, dtype=hidden.dtype, device=hidden.device)
        if self.position is not None:
            positions = sequence_slice(position_ids.t(), self.tp) if self.shards_sequence else position_ids.t()
            hidden = hidden + self.position(positions)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.dropout(hidden, ctx.dropout)


class ModelChunk(nn.Module):
    """Layers `layers` of a model, with the embedding when `first` and the head and loss when `last`.

    Positions (tables of the rotary embedding, ALiBi slopes) are made on `positions_device`, by default that of the parameters:
    on a real device while the parameters are on meta, the chunk runs as soon as its parameters have been read.
    """

    def __init__(
        self,
        family: Family,
        config: ModelConfig,
        groups: ParallelGroups,
        kernels: Kernels,
        options: ModelOptions,
        layers: range,
        *,
        first: bool = True,
        last: bool = True,
        positions_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the model configuration must be resolved"
        products: Products = "fp8" if options.fp8 else kernels.products
        ctx = ParallelContext(groups.tp, options.sequence_parallel, groups.device, options.dtype, options.seed, products)
        build = BuildContext(ctx, kernels, recompute_attention=options.recompute == "selective")
        tied, whole = bool(config.tie_word_embeddings), first and last
        self.config, self.family, self.tp, self.options, self.context, self.kernels = config, family, groups.tp, options, ctx, kernels
        self.architecture = architecture = family.architecture(config)
        self.embedding = Embedding(build, architecture, config, tied_across_stages=tied and not whole) if first else None
        self.layers = nn.ModuleDict({str(layer): Block(build, architecture, config, layer) for layer in layers})
        self.final_norm: Norm | None = None
        self.head: VocabParallelHead | None = None
        if last:
            self.final_norm = Norm(
                build, "final_norm", architecture.norm, config.hidden_size, config.norm_epsilon, offset=architecture.norm_offset
            )
            self.head = VocabParallelHead(
                ctx, self._head_weight(ctx, tied=tied), config.vocab_size, normalized=architecture.normalized_head
            )
        self._add_positions(ctx if positions_device is None else replace(ctx, device=positions_device), first=first)
        # One graph of all layers: the compiler fuses across their borders, and the layers of a model are compiled once.
        self._trunk = torch.compile(self._layers, dynamic=False, mode=options.compile_mode) if options.compile else self._layers

    def _head_weight(self, ctx: ParallelContext, *, tied: bool) -> nn.Parameter:
        if tied and self.embedding is not None:
            return self.embedding.word.weight
        name = "embedding.word.weight" if tied else "head.weight"
        vocab_size, hidden, std = self.config.vocab_size, self.config.hidden_size, self.config.init_method_std
        assert vocab_size is not None
        return vocabulary_parameter(ctx, name, vocab_size, hidden, std, tied=tied, tied_copy=tied)

    def _add_positions(self, ctx: ParallelContext, *, first: bool) -> None:
        """Tables of the rotary embedding, or the ALiBi slopes of this rank's heads; neither is a weight, CLEX apart."""
        self.rotary: RotaryTables | None = None
        self.slopes: Tensor | None = None
        if self.architecture.positions == "rotary":
            self.rotary = build_rotary(ctx, self.config, self.architecture.rotary_dim)
            self.clex = self.rotary.clex
            for parameter in () if self.clex is None else self.clex.parameters():
                set_placement(parameter, replace(get_placement(parameter), every_stage=True, tied_copy=not first))
        elif self.architecture.positions == "alibi":
            local = self.config.num_attention_heads // ctx.tp.size
            self.slopes = alibi_slopes(self.config.num_attention_heads).narrow(0, ctx.tp.rank * local, local).to(ctx.device)

    def forward(self, micro_batch: MicroBatch, hidden: Tensor | None) -> Tensor:
        """Hidden states [S or S/tp, B, H] for the next chunk; from the last chunk the weighted loss sum (a scalar)."""
        batch = micro_batch.batch
        ctx = self._forward_context(batch.position_ids, batch.document_ids, micro_batch)
        hidden = self._trunk(self._embed(batch.tokens, batch.position_ids, hidden, ctx), ctx)
        return hidden if self.head is None else self._loss(hidden, batch, micro_batch.loss_weight)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """[B, S] ids to fp32 logits [B, S, vocabulary] on a model of one chunk over one TP rank, continuing `cache`."""
        assert self.embedding is not None and self.head is not None and self.tp.size == 1, "logits need the whole model on one rank"
        past = cache.length if cache is not None else 0
        length = tokens.shape[1]
        positions = torch.arange(past, past + length, device=tokens.device).expand_as(tokens)
        ctx = ForwardContext(self._rotary(positions, None), self._mask(length, tokens.device, past=past), None, cache)
        hidden = self._layers(self._embed(tokens, positions, None, ctx), ctx)
        if cache is not None:
            cache.length = past + length
        return self.head(hidden)[..., : self.head.valid].transpose(0, 1).float()

    def _forward_context(self, position_ids: Tensor, document_ids: Tensor | None, micro_batch: MicroBatch) -> ForwardContext:
        mask = self._mask(position_ids.shape[1], position_ids.device, document_ids=document_ids)
        key = micro_batch.dropout if self.training else None
        return ForwardContext(self._rotary(position_ids, key), mask, key)

    def _mask(self, length: int, device: torch.device, *, past: int = 0, document_ids: Tensor | None = None) -> Tensor | None:
        return attention_mask(
            length,
            past=past,
            document_ids=document_ids,
            window=self.architecture.window,
            slopes=self.slopes,
            dtype=self.options.dtype,
            device=device,
        )

    def _rotary(self, position_ids: Tensor, key: DropoutKey | None) -> tuple[Tensor, Tensor] | None:
        if self.rotary is None:
            return None
        return self.rotary.tables(position_ids, None if key is None else derive_seed(key.seed, key.step))

    def _embed(self, tokens: Tensor, position_ids: Tensor, hidden: Tensor | None, ctx: ForwardContext) -> Tensor:
        if self.embedding is not None:
            return self.embedding(tokens, position_ids, ctx)
        if hidden is None:
            raise ValueError("a chunk without the embedding needs the hidden states of the chunk before it")
        return hidden

    def _layers(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """The blocks, and after the last of the model the final norm."""
        recompute = self.options.recompute == "full" and self.training and torch.is_grad_enabled()
        for block in self.layers.values():
            if recompute:
                hidden = checkpoint(block, hidden, ctx, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden, ctx)
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def _loss(self, hidden: Tensor, batch: TokenBatch, weight: Tensor | float) -> Tensor:
        """Sum of the unmasked tokens' losses times `weight`, an fp32 scalar."""
        assert self.head is not None
        labels, token_weights = batch.labels.t().reshape(-1), batch.loss_mask.t().reshape(-1) * weight
        if self.kernels.fuses_loss:
            return linear_cross_entropy(hidden, self.head.projection(), labels, token_weights, self.head.shard, self.kernels)
        logits = self.head(hidden)
        losses = vocab_parallel_cross_entropy(logits.flatten(0, 1), labels, self.head.first, self.head.valid, self.tp)
        return (losses * token_weights).sum()


def chunk_layers(num_layers: int, virtual_stages: int, stage: int, first: int | None = None, last: int | None = None) -> range:
    """Layers of one virtual stage: runs in order, `first` and `last` of them in the end stages and equally many in the others."""
    ends = {0: first} if first is not None else {}
    if last is not None:
        ends[virtual_stages - 1] = last
    rest, others = num_layers - sum(count for count in ends.values() if count), virtual_stages - len(ends)
    if rest < 0 or (rest % others if others else rest):
        raise ValueError(f"{num_layers} layers do not divide into {virtual_stages} stages with {first} in the first and {last} in the last")
    counts = [ends.get(number) or rest // max(others, 1) for number in range(virtual_stages)]
    start = sum(counts[:stage])
    return range(start, start + counts[stage])


def build_chunks(
    family: Family,
    config: ModelConfig,
    groups: ParallelGroups,
    kernels: Kernels,
    options: ModelOptions,
    *,
    virtual: int = 1,
    first_layers: int | None = None,
    last_layers: int | None = None,
) -> list[ModelChunk]:
    """This rank's chunks, in order: chunk c is virtual stage c x pp + pp rank.

    `first_layers`, `last_layers`: number of layers in the first and in the last stage, by default as many as in the others.
    """
    stages = groups.pp.size * virtual
    chunks = []
    for number in range(virtual):
        stage = number * groups.pp.size + groups.pp.rank
        layers = chunk_layers(config.num_layers, stages, stage, first_layers, last_layers)
        chunks.append(ModelChunk(family, config, groups, kernels, options, layers, first=stage == 0, last=stage == stages - 1))
    return chunks
