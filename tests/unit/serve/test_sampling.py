"""Choosing a token, against transformers' logits processors and plain frequencies."""

from collections import Counter

import pytest
import torch

from megatron_llm.serve.sampling import Choice, Sampler, SamplingOptions, choose

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.0])


def expected(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities after transformers' own processors."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids, scores = torch.zeros(1, 1, dtype=torch.long), LOGITS[None].clone()
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    scores = TopKLogitsWarper(top_k)(ids, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(ids, scores) if top_p < 1 else scores
    return torch.softmax(scores, dim=-1)[0]


def drawn(sampler: Sampler, logits: torch.Tensor) -> int:
    """One token."""
    found = choose([sampler], logits[None])[0]
    assert found is not None
    return found.token


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.8), (0.9, 4, 0.7), (1.0, 0, 0.01)])
def test_frequencies_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    sampler = Sampler(SamplingOptions(1, temperature, top_p, top_k, seed=5))
    found = Counter(choice.token for choice in choose([sampler] * 6000, LOGITS.expand(6000, -1)) if choice)
    frequencies = torch.tensor([found[token] / 6000 for token in range(len(LOGITS))])
    wanted = expected(temperature, top_k, top_p)
    assert (frequencies - wanted).abs().max() < 0.03
    assert set(found) <= {int(token) for token in wanted.nonzero()}


def test_a_crowd_of_all_kinds_chooses_what_each_chooses_alone() -> None:
    options = [
        SamplingOptions(1, temperature=0),
        SamplingOptions(1, seed=1),
        SamplingOptions(1, 0.7, top_k=3, seed=2),
        SamplingOptions(1, 1.5, top_p=0.6, seed=3, logprobs=2),
        SamplingOptions(1, temperature=0, logit_bias={2: 9.0}, logprobs=0),
        SamplingOptions(1, 2.0, top_k=1 << 31, presence_penalty=1.0, frequency_penalty=-0.5, seed=4),
        SamplingOptions(1, 1e-30, seed=5, logprobs=5),
    ]
    logits = torch.randn(20, len(options), 53, generator=torch.Generator().manual_seed(0))
    together, alone = [Sampler(one) for one in options], [Sampler(one) for one in options]
    for rows in logits:
        crowd = choose(together, rows)
        for choice, sampler, row in zip(crowd, alone, rows, strict=True):
            single = choose([sampler], row[None])[0]
            assert choice is not None and single is not None
            assert choice.token == single.token and [token for token, _ in choice.top] == [token for token, _ in single.top]
            assert choice.logprob == pytest.approx(single.logprob)
        assert crowd[6] is not None and crowd[6].token == rows[6].argmax()


def test_equal_seeds_give_equal_tokens_and_answers_differ() -> None:
    def draw(seed: int | None, number: int = 0) -> list[int]:
        sampler = Sampler(SamplingOptions(1, seed=seed), number)
        return [drawn(sampler, LOGITS) for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8) and draw(7) != draw(7, 1) and draw(7) != draw(-7)
    assert draw(None) != draw(None)


def test_logprobs_are_those_of_the_model() -> None:
    choice = choose([Sampler(SamplingOptions(1, temperature=0, logprobs=3))], LOGITS[None])[0]
    plain = torch.log_softmax(LOGITS, dim=-1)
    assert choice is not None and choice.token == 0 and choice.logprob == pytest.approx(plain[0].item())
    assert [token for token, _ in choice.top] == [0, 3, 6]
    assert [value for _, value in choice.top] == pytest.approx(plain[[0, 3, 6]].tolist())


def test_bias_and_penalties() -> None:
    assert drawn(Sampler(SamplingOptions(1, temperature=0, logit_bias={4: 100.0})), LOGITS) == 4
    sampler = Sampler(SamplingOptions(1, temperature=0, presence_penalty=0.75))
    assert [drawn(sampler, LOGITS) for _ in range(3)] == [0, 3, 0]
    sampler = Sampler(SamplingOptions(1, temperature=0, frequency_penalty=0.75))
    assert [drawn(sampler, LOGITS) for _ in range(4)] == [0, 3, 0, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_numbers_has_no_choice_and_spoils_no_other(value: float) -> None:
    rows = torch.tensor([[1.0, value, 0.0], [0.0, 2.0, float("-inf")], [1.0, 0.0, value]])
    options = SamplingOptions(1, temperature=0)
    assert choose([Sampler(options) for _ in rows], rows) == [None, Choice(1), None]
    assert choose([Sampler(options)], rows[:1]) == [None]


def test_a_draw_never_falls_on_what_cannot_be() -> None:
    """Even where the random number rounds up to the end."""

    class Last(Sampler):
        def uniform(self) -> float:
            return 1 - 2**-53

    rows = torch.tensor([[0.0, 0.0, float("-inf")], [float("-inf"), 5.0, float("-inf")]])
    samplers = [Last(SamplingOptions(1)), Last(SamplingOptions(1))]
    assert choose(samplers, rows) == [Choice(1), Choice(1)]
