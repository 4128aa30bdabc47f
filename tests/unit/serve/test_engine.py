"""The engine against `generate` of transformers: the same tokens, alone or among others that come and go."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.serve.engine import PROMPT_CHUNK, Engine, Failed, Piece
from megatron_llm.serve.language_model import LanguageModel
from megatron_llm.serve.metrics import Metrics
from megatron_llm.serve.options import Limits
from megatron_llm.serve.refusals import Refusal
from megatron_llm.serve.sampling import SamplingOptions
from tests.families import CASES, Case, case, write_folder
from tests.unit.serve.small_models import write_tokenizer

FAMILIES = [
    case("llama", num_query_groups=2),
    case("gpt"),
    case("bloom"),
    case("mistral", num_query_groups=2, sliding_window=7),
    case("gpt_neox", rotary_percent=0.25),
    case("gemma", num_query_groups=1, kv_channels=16),
    case("qwen3", num_query_groups=2, kv_channels=12),
    case("glm", num_query_groups=2, kv_channels=16),
]
PROMPTS = [[5, 9, 30], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [60, 61], [33, 2, 96, 15, 77]]
LENGTHS = [9, 13, 6, 12, 8]


class Answers:
    """Collects what an engine delivers for one job."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Piece | Failed] = queue.Queue()

    def tokens(self, answers: int = 1) -> list[list[int]]:
        """The tokens of all answers, when all have ended."""
        found: list[list[int]] = [[] for _ in range(answers)]
        left = answers
        while left:
            piece = self.queue.get(timeout=60)
            assert isinstance(piece, Piece), piece.refusal.message
            found[piece.number] += [choice.token for choice in piece.choices]
            left -= piece.finish is not None
        return found

    def refusal(self) -> Refusal:
        """Why it failed; earlier pieces are passed over."""
        while True:
            piece = self.queue.get(timeout=60)
            if isinstance(piece, Failed):
                return piece.refusal


def load(folder: Path, which: Case) -> tuple[Any, LanguageModel]:
    """A family's model for generate and for the engine."""
    from transformers import AutoModelForCausalLM

    write_folder(folder, which.config())
    tokenizer = write_tokenizer(folder / "tokenizer")
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder).eval().requires_grad_(False)
    served = LanguageModel("m", model, tokenizer)
    served.context = None
    return model, served


@pytest.fixture
def engine_of() -> Iterator[Any]:
    """Makes engines that are closed at the end."""
    made: list[Engine] = []

    def make(model: LanguageModel, **limits: Any) -> Engine:
        made.append(Engine(model, Limits(**limits), Metrics()))
        return made[-1]

    yield make
    for engine in made:
        if engine.alive:
            engine.close()


@pytest.mark.parametrize("which", FAMILIES, ids=lambda one: one.id)
def test_a_crowd_gets_what_each_gets_alone(tmp_path: Path, which: Case, engine_of: Any) -> None:
    """More answers than places, of different lengths, so that they join and leave in the middle of others."""
    assert which.family in {one.family for one in CASES}
    model, served = load(tmp_path, which)
    engine = engine_of(served, running=3)
    collected = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        collected.append(Answers())
        engine.submit([prompt], 1, SamplingOptions(length, temperature=0, ignore_eos=True), collected[-1].queue.put)
    for prompt, length, answers in zip(PROMPTS, LENGTHS, collected, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert answers.tokens() == [alone[0, len(prompt) :].tolist()]


def test_logprobs_and_several_answers(tmp_path: Path, engine_of: Any) -> None:
    model, served = load(tmp_path, FAMILIES[0])
    answers = Answers()
    options = SamplingOptions(5, seed=3, logprobs=2, ignore_eos=True)
    engine_of(served).submit(PROMPTS[:2], 2, options, answers.queue.put)
    pieces: list[Piece] = [answers.queue.get(timeout=60) for _ in range(20)]  # type: ignore[misc]
    for index in range(4):
        prompt, mine = PROMPTS[index // 2], [choice for piece in pieces if piece.number == index for choice in piece.choices]
        tokens = [choice.token for choice in mine]
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        plain = torch.log_softmax(logits.float(), dim=-1)
        assert [choice.logprob for choice in mine] == pytest.approx([plain[i, t].item() for i, t in enumerate(tokens)], abs=1e-4)
    texts = [tuple(choice.token for piece in pieces if piece.number == index for choice in piece.choices) for index in range(4)]
    assert len(set(texts)) == 4


@pytest.mark.parametrize("which", FAMILIES, ids=lambda one: one.id)
def test_prompts_that_are_read_together_and_told_at_the_end(tmp_path: Path, which: Case, engine_of: Any, monkeypatch: Any) -> None:
    model, served = load(tmp_path, which)
    shapes, sound = [], LanguageModel.forward

    def forward(self: LanguageModel, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        logits: torch.Tensor = sound(self, ids, *rest)
        return logits

    monkeypatch.setattr(LanguageModel, "forward", forward)
    answers = Answers()
    options = SamplingOptions(7, temperature=0, ignore_eos=True)
    engine_of(served).submit(PROMPTS[:1] + PROMPTS[3:], 2, options, answers.queue.put, whole=True)
    tokens = answers.tokens(6)
    assert answers.queue.empty() and shapes == [(3, 5)] + [(6, 1)] * 6
    for number, prompt in enumerate(PROMPTS[:1] + PROMPTS[3:]):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert tokens[2 * number] == tokens[2 * number + 1] == alone[0, len(prompt) :].tolist()


def test_a_long_prompt_is_read_in_chunks_and_equals_generate(tmp_path: Path, engine_of: Any) -> None:
    which = case("llama", num_query_groups=2, max_position_embeddings=2048)
    model, served = load(tmp_path, which)
    prompt = torch.randint(0, 97, (1, 2 * PROMPT_CHUNK + 17), generator=torch.Generator().manual_seed(1))
    answers = Answers()
    engine_of(served).submit([prompt[0].tolist()], 1, SamplingOptions(6, temperature=0, ignore_eos=True), answers.queue.put)
    alone = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert answers.tokens() == [alone[0, prompt.shape[1] :].tolist()]


def test_the_queue_has_an_end_and_a_place_that_is_freed_is_used(tmp_path: Path, engine_of: Any) -> None:
    engine = engine_of(load(tmp_path, FAMILIES[0])[1], running=1, waiting=1)
    endless = SamplingOptions(10**6, temperature=0, ignore_eos=True)
    first, second = Answers(), Answers()
    running = engine.submit([[5]], 1, endless, first.queue.put)
    first.queue.get(timeout=60)
    engine.submit([[6]], 1, SamplingOptions(3, temperature=0, ignore_eos=True), second.queue.put)
    with pytest.raises(Refusal, match="1 answers wait already") as refused:
        engine.submit([[7]], 1, endless, second.queue.put)
    assert refused.value.status == 429 and refused.value.headers["Retry-After"]
    engine.cancel(running)
    assert len(second.tokens()[0]) == 3


def test_time_is_up_and_closing_ends_all(tmp_path: Path, engine_of: Any) -> None:
    served = load(tmp_path, FAMILIES[0])[1]
    endless = SamplingOptions(10**6, temperature=0, ignore_eos=True)
    late = Answers()
    engine_of(served, seconds=0.2).submit([[5]], 1, endless, late.queue.put)
    assert (refusal := late.refusal()).status == 504 and "0.2 s" in refusal.message
    engine, cut = engine_of(served), Answers()
    engine.submit([[5]], 1, endless, cut.queue.put)
    cut.queue.get(timeout=60)
    engine.close()
    assert cut.refusal().status == 503 and not engine.alive
    with pytest.raises(Refusal, match="shutting down"):
        engine.submit([[5]], 1, endless, cut.queue.put)


def test_a_failing_computation_fails_its_answers_and_not_the_engine(tmp_path: Path, engine_of: Any, monkeypatch: Any) -> None:
    served = load(tmp_path, FAMILIES[0])[1]
    engine, sound = engine_of(served), LanguageModel.forward
    broken = threading.Event()

    def forward(self: LanguageModel, *arguments: Any) -> torch.Tensor:
        if broken.is_set():
            raise RuntimeError("told to fail")
        logits: torch.Tensor = sound(self, *arguments)
        return logits

    monkeypatch.setattr(LanguageModel, "forward", forward)
    broken.set()
    failed, later = Answers(), Answers()
    engine.submit([[5]], 1, SamplingOptions(4), failed.queue.put)
    assert failed.refusal().status == 500
    broken.clear()
    engine.submit([[5]], 1, SamplingOptions(4, ignore_eos=True), later.queue.put)
    assert len(later.tokens()[0]) == 4 and engine.alive


def test_weights_that_give_nan_are_told(tmp_path: Path, engine_of: Any) -> None:
    model, served = load(tmp_path, FAMILIES[0])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    answers = Answers()
    engine = engine_of(served)
    engine.submit([[5]], 1, SamplingOptions(4), answers.queue.put)
    assert answers.refusal().code == "not_finite"
    time.sleep(0.05)
    assert "running_answers 0" in engine.metrics.text()
