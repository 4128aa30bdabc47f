"""What a model chunk is given: the batch's tensors by name, and what belongs to this micro-batch alone."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_llm.parallel.random import DropoutKey


class TokenBatch(Protocol):
    """Tensors of one micro-batch, all [B, S]; ids int64, loss_mask fp32. `document_ids` None is plain causal attention."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def document_ids(self) -> Tensor | None: ...


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on its way through the stages.

    `loss_weight` multiplies the summed loss before the backward: the loss scale over the global count of unmasked
    tokens, so that sums over micro-batches and replicas are the global mean. `dropout` None turns dropout off.
    """

    batch: TokenBatch
    loss_weight: Tensor | float = 1.0
    dropout: DropoutKey | None = None
