"""Keys and values of many answers against those of each alone: joining, leaving, growing, and nothing left over from others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.serve import kv_batch
from megatron_llm.serve.kv_batch import KeyValueBatch
from megatron_llm.serve.language_model import LanguageModel
from tests.unit.serve.small_models import llama_config, write_tokenizer


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """A random LLaMA."""
    from transformers import LlamaForCausalLM

    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(5)
    return LanguageModel("m", LlamaForCausalLM(llama_config(len(tokenizer))).to(request.param).eval().requires_grad_(False), tokenizer)


def prompt_of(model: LanguageModel, prompts: list[list[int]]) -> Any:
    """The cache of prompts, read together."""
    cache, longest = model.new_cache(), max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    model.forward(ids, cache, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    return cache


def alone(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Logits [vocabulary] behind ids, without a cache from before."""
    return model.forward(torch.tensor([ids]), model.new_cache(), torch.ones(1, len(ids)), torch.arange(len(ids))[None])[0]


@pytest.mark.parametrize("room", [1, 64])
def test_answers_that_come_and_go_have_the_logits_that_each_has_alone(
    model: LanguageModel, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is the list of its ids. With room for one token the buffers are copied at every step."""
    monkeypatch.setattr(kv_batch, "_LEAST_ROOM", room)
    monkeypatch.setattr(kv_batch, "_MOST_ROOM", room)
    draw = torch.Generator().manual_seed(1)
    batch: KeyValueBatch[list[int]] = KeyValueBatch(model)
    exact = model.dtype == torch.float32
    joined = 0
    for step in range(21):
        if step % 3 == 0 or not batch.owners:
            lengths = [1, 17, 5, 2, 40, 3][joined % 6 : joined % 6 + 1 + step % 2]
            prompts = [torch.randint(0, 97, (length,), generator=draw).tolist() for length in lengths]
            batch.add(prompt_of(model, prompts), [[[*prompt] for _ in range(1 + joined % 3)] for prompt in prompts], lengths)
            joined += 1
        tokens = [(7 * row + step) % 97 for row in range(len(batch.owners))]
        logits = batch.step(tokens)
        for ids, token, row in zip(batch.owners, tokens, logits, strict=True):
            ids.append(token)
            torch.testing.assert_close(row, alone(model, ids), rtol=0, atol=2e-5 if exact else 0.08)
        batch.drop([row for row, ids in enumerate(batch.owners) if (len(ids) + row) % 5 == 0 or len(batch.owners) - row > 14])
    assert joined >= 7


def test_what_a_broken_answer_left_reaches_nobody_else(model: LanguageModel) -> None:
    batch: KeyValueBatch[str] = KeyValueBatch(model)
    batch.add(prompt_of(model, [[1, 2, 3, 4, 5, 6, 7, 8]]), [["sound"]], [8])
    batch.add(prompt_of(model, [[5] * 8]), [["broken"]], [8])
    for layer in batch._layers:
        layer.keys[1] = layer.values[1] = float("nan")
    assert torch.isfinite(batch.step([3, 3])[0]).all()
    batch.drop([1])
    batch.add(prompt_of(model, [[9, 4]]), [["new"]], [2])
    logits = batch.step([4, 4])
    torch.testing.assert_close(logits[1], alone(model, [9, 4, 4]), rtol=0, atol=2e-5 if model.dtype == torch.float32 else 0.08)
    assert batch.owners == ["sound", "new"]


def test_the_buffers_are_no_larger_than_needed(model: LanguageModel) -> None:
    batch: KeyValueBatch[int] = KeyValueBatch(model)
    batch.add(prompt_of(model, [[1] * 200] * 9), [[number] for number in range(9)], [200] * 9)
    batch.drop(range(1, 9))
    for _ in range(600):
        batch.step([1])
        rows, columns = batch._mask.shape
        assert columns <= batch._lengths[0] + 256 and batch._layers[0].keys.shape[::2] == (rows, columns)
    assert rows == 8
    batch.drop([0])
    assert not batch._layers and not batch.owners
