"""The fused pass against the model's own: logits, caches and memory; and the models that it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.kernels import native
from megatron_llm.serve import llama_pass as module
from megatron_llm.serve.llama_pass import llama_pass
from tests.families import Case, case, write_folder

KINDS = [
    case("llama"),
    case("llama", num_query_groups=2, kv_channels=12),
    case("llama", num_query_groups=1, tie_word_embeddings=True),
    case("mistral", num_query_groups=2, sliding_window=None),
    case("qwen2", num_query_groups=2),
    case("qwen3", num_query_groups=2, kv_channels=12),
]
OTHERS = [case("mistral", num_query_groups=2, sliding_window=7), case("gemma", num_query_groups=1, kv_channels=16), case("gpt_neox")]


def build(folder: Path, which: Case, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of transformers; norms and biases are not ones and zeros, which would hide a mistake."""
    from transformers import AutoModelForCausalLM

    write_folder(folder, which.config(), dtype=dtype)
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


@pytest.fixture(params=["fused", "plain"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operators in C++ and without."""
    if request.param == "plain":
        monkeypatch.setattr(module.native, "load", lambda: "they are not wanted")
    elif (reason := native.load()) is not None:
        pytest.skip(f"no operators in C++, because {reason}")


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", KINDS, ids=lambda one: one.id)
def test_logits_and_caches_are_the_models_own(tmp_path: Path, which: Case, dtype: torch.dtype) -> None:
    from transformers import DynamicCache

    model, own = build(tmp_path, which, dtype), build(tmp_path, which, dtype)
    fused = llama_pass(model)
    assert fused is not None
    caches = (DynamicCache(), DynamicCache())
    draw = torch.Generator().manual_seed(3)
    pads, seen = torch.tensor([0, 3, 6, 0, 1]), 0
    for new in (7, 1, 1, 5, 1):  # prompts padded on the left, tokens, a further piece of the prompt
        ids = torch.randint(0, 97, (5, new), generator=draw)
        columns = torch.arange(seen + new)
        mask = (columns >= pads[:, None]).long()
        positions = (columns[seen:] - pads[:, None]).clamp(min=0)
        with torch.inference_mode():
            expected = own(input_ids=ids, attention_mask=mask, past_key_values=caches[0], position_ids=positions).logits[:, -1]
            found = fused(ids, caches[1], mask, positions)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=scale * (2e-5 if dtype == torch.float32 else 0.04))
        seen += new
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert mine.keys is not None and theirs.keys is not None and mine.keys.shape == theirs.keys.shape
        close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.1}
        torch.testing.assert_close(mine.keys[pads == 0], theirs.keys[pads == 0], **close)


def test_weights_are_held_once_and_still_the_models(tmp_path: Path) -> None:
    model = build(tmp_path, KINDS[4])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    assert llama_pass(model) is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
    attention = model.model.layers[0].self_attn
    starts = {each.weight.untyped_storage().data_ptr() for each in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(starts) == 1


@pytest.mark.parametrize("which", OTHERS, ids=lambda one: one.id)
def test_models_of_other_kinds_keep_their_own_pass(tmp_path: Path, which: Case) -> None:
    assert llama_pass(build(tmp_path, which)) is None


def test_a_model_that_is_not_what_it_seems_keeps_its_own_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = build(tmp_path, KINDS[0])
    attention = changed.model.layers[1].self_attn
    attention.scaling *= 2
    assert llama_pass(changed) is None and "differs from transformers' own" in caplog.text
    hooked = build(tmp_path, KINDS[0])
    hooked.lm_head.register_forward_hook(lambda module, arguments, output: output * 0.5)
    assert llama_pass(hooked) is None
    odd = build(tmp_path, KINDS[0])
    odd.model.layers[0].mlp.down_proj = torch.nn.Sequential(odd.model.layers[0].mlp.down_proj)
    odd.model.layers[0].mlp.down_proj[0].__class__ = type("Linear8", (torch.nn.Linear,), {})
    assert llama_pass(odd) is None


def test_a_pass_that_gives_nan_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.LlamaPass, "_rms_norm", lambda self, x, norm: x * float("nan"))
    assert llama_pass(build(tmp_path, KINDS[0])) is None


def test_a_served_folder_is_computed_with_it(tmp_path: Path) -> None:
    from megatron_llm.convert.model_folders import Folders
    from megatron_llm.serve.language_model import load_language_model
    from megatron_llm.serve.options import ModelOptions
    from tests.unit.serve.small_models import write_random

    folder = write_random(tmp_path / "model")
    served = load_language_model(ModelOptions(folder), Folders(folder, folder, ()), lambda line: None)
    assert served._fast_pass is not None
