"""The next tokens from rows of logits: penalties, temperature, top-k, top-p, seed, log-probabilities.

All answers of a step are chosen together: one operation over all rows costs about as much as over one. Only penalties and
biases, which few requests have, go row by row. Tokens are drawn by inverting the cumulative distribution, so that an answer
needs one random number a token and its stream of them does not depend on who else is in the batch.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_COLDEST = 1e-6  # temperature below which the largest logit alone is left anyway, and dividing would overflow


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is chosen. Penalties, bias, n and stop as in OpenAI's interface, top_k (0: all) as in vLLM's.

    `logprobs` is the number of likeliest tokens to report at each place (0: only the chosen one; None: nothing).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False


class Choice(NamedTuple):
    """A chosen token, its log-probability under the model itself, and the likeliest tokens there, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """How the tokens of one answer are chosen, and its random stream.

    `number` tells the n answers to one request apart: each has its own stream.
    """

    def __init__(self, options: SamplingOptions, number: int = 0) -> None:
        self.options = options
        self.greedy = options.temperature == 0
        self.filtered = options.top_k > 0 or options.top_p < 1.0
        self.adjusts = bool(options.logit_bias or options.presence_penalty or options.frequency_penalty)
        self._random = random.Random(None if options.seed is None else (options.seed * 1_000_003 + number) % 2**64)
        self._seen: Counter[int] = Counter()

    def uniform(self) -> float:
        """The next number of the answer's random stream, from 0 up to, not including, 1."""
        return self._random.random()

    def saw(self, token: int) -> None:
        """Count a chosen token for the penalties."""
        if self.adjusts:
            self._seen[token] += 1

    def adjust(self, row: Tensor) -> None:
        """Add bias and penalties to a row of logits [vocabulary], in place."""
        options = self.options
        for token, bias in options.logit_bias.items():
            row[token] += bias
        for token, count in self._seen.items():
            row[token] -= options.presence_penalty + count * options.frequency_penalty


def choose(samplers: Sequence[Sampler], logits: Tensor) -> list[Choice | None]:
    """The next token of each answer from its row of logits [rows, vocabulary], fp32; counted for the penalties.

    None stands where a row holds a NaN or an infinity, so that nothing can be chosen.
    """
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()  # a NaN anywhere is the maximum
    if not all(finite):
        sound = [row for row, whole in enumerate(finite) if whole]
        found = iter(choose([samplers[row] for row in sound], logits[sound]) if sound else [])
        return [next(found) if whole else None for whole in finite]
    adjusted = _adjusted(samplers, logits)
    tokens = [0] * len(samplers)
    for group, draw in (
        ([row for row, sampler in enumerate(samplers) if sampler.greedy], _likeliest),
        ([row for row, sampler in enumerate(samplers) if not sampler.greedy and not sampler.filtered], _draw_from_all),
        ([row for row, sampler in enumerate(samplers) if not sampler.greedy and sampler.filtered], _draw_from_filtered),
    ):
        if group:
            rows = adjusted if len(group) == len(samplers) else adjusted[group]
            for row, token in zip(group, draw(rows, [samplers[row] for row in group]), strict=True):
                tokens[row] = token
                samplers[row].saw(token)
    return _with_logprobs(samplers, logits, tokens)


def _adjusted(samplers: Sequence[Sampler], logits: Tensor) -> Tensor:
    changed = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if changed:
        logits = logits.clone()
        for row in changed:
            samplers[row].adjust(logits[row])
    return logits


def _likeliest(rows: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    found: list[int] = rows.argmax(dim=-1).tolist()
    return found


def _draw_from_all(rows: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    probabilities = torch.softmax(_scaled(rows, rows.amax(dim=-1, keepdim=True), samplers), dim=-1)
    found: list[int] = _invert(probabilities, samplers).tolist()
    return found


def _draw_from_filtered(rows: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    size = rows.shape[-1]
    counts = [min(sampler.options.top_k or size, size) for sampler in samplers]
    values, ids = rows.topk(max(counts))  # best first
    scaled = _scaled(values, values[:, :1], samplers)
    outside = torch.arange(max(counts), device=rows.device) >= torch.tensor(counts, device=rows.device)[:, None]
    probabilities = torch.softmax(scaled.masked_fill(outside, float("-inf")), dim=-1)
    # A token stays when those before it do not yet make up top_p; the likeliest always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = torch.tensor([sampler.options.top_p for sampler in samplers], device=rows.device)[:, None]
    kept = probabilities * (before < top_p)
    kept[:, 0] = probabilities[:, 0]
    found: list[int] = ids.gather(1, _invert(kept, samplers)[:, None])[:, 0].tolist()
    return found


def _scaled(rows: Tensor, largest: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits over the temperature, the largest at 0."""
    temperatures = [max(sampler.options.temperature, _COLDEST) for sampler in samplers]
    return (rows - largest) / torch.tensor(temperatures, device=rows.device)[:, None]


def _invert(weights: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """A column of each row of `weights` [rows, columns], drawn in proportion to them."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    uniform = torch.tensor([sampler.uniform() for sampler in samplers], dtype=torch.float64, device=weights.device)[:, None]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))  # a product may round up to the total
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _with_logprobs(samplers: Sequence[Sampler], logits: Tensor, tokens: list[int]) -> list[Choice | None]:
    choices: list[Choice | None] = [Choice(token) for token in tokens]
    asked = [(row, count) for row, sampler in enumerate(samplers) if (count := sampler.options.logprobs) is not None]
    if asked:
        rows = [row for row, _ in asked]
        logprobs = torch.log_softmax(logits[rows], dim=-1)
        chosen = logprobs.gather(1, torch.tensor([tokens[row] for row in rows], device=logits.device)[:, None])[:, 0].tolist()
        values, ids = logprobs.topk(min(max(count for _, count in asked), logits.shape[-1]))
        for (row, count), logprob, best, which in zip(asked, chosen, values.tolist(), ids.tolist(), strict=True):
            choices[row] = Choice(tokens[row], logprob, tuple(zip(which[:count], best[:count], strict=True)))
    return choices
