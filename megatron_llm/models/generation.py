"""Sampling from a model on one device, one token at a time with a key/value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.models.blocks.context import KVCache
from megatron_llm.models.causal_lm import ModelChunk
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most likely one; top_k 0 and top_p 1 keep all candidates."""

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        problems = [
            (self.max_new_tokens < 1, f"max-new-tokens must be at least 1, got {self.max_new_tokens}"),
            (self.temperature < 0, f"temperature must be 0 or more, got {self.temperature}"),
            (self.top_k < 0, f"top-k must be 0 (all) or more, got {self.top_k}"),
            (not 0 < self.top_p <= 1, f"top-p must be above 0 and at most 1, got {self.top_p}"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise UserError(sentence)


def candidate_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [V] divided by the temperature, with everything outside top-k and top-p (Holtzman et al. 2020) at -inf.

    top-p keeps the fewest most likely tokens whose probabilities reach p, at least one.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        floor = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1.0:
        probabilities, order = logits.softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.index_fill(0, order[before >= sampling.top_p], float("-inf"))
    return logits


def generate(model: ModelChunk, prompt: list[int], sampling: Sampling, stop_id: int | None = None) -> Iterator[int]:
    """Yield new token ids until `stop_id` (not yielded), `max_new_tokens`, or the model's longest sequence.

    `model` holds the whole model on one rank. UserError for a prompt that is empty or leaves no room.
    """
    limit = model.config.max_position_embeddings
    assert limit is not None, "the model configuration must be resolved"
    if not prompt:
        raise UserError("the prompt has no tokens: give at least one character with --prompt")
    if len(prompt) >= limit:
        raise UserError(f"the prompt has {len(prompt)} tokens and the model's longest sequence is {limit}: shorten the prompt")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache()
    ids = torch.tensor([prompt], device=device)
    for _ in range(min(sampling.max_new_tokens, limit - len(prompt))):
        logits = model.logits(ids, cache)[0, -1].cpu()
        if sampling.temperature == 0.0:
            token = int(logits.argmax().item())
        else:
            token = int(torch.multinomial(candidate_logits(logits, sampling).softmax(-1), 1, generator=generator).item())
        if token == stop_id:
            return
        yield token
        ids = torch.tensor([[token]], device=device)
