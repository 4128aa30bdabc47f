"""A model of transformers with its adapters: merged or beside the weights, a larger vocabulary, and what cannot be loaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.lora.loaded import apply_adapter, choose_device, context_length, load_with_adapters
from megatron_llm.utils.errors import UserError
from tests.unit.evaluate.small import write_model

peft = pytest.importorskip("peft", reason="peft is not installed: it comes with the extra finetune")
IDS = torch.arange(4, 15)[None]
FP32 = {"dtype": torch.float32}


def open_plain(folder: Path) -> Any:
    """The model as transformers alone opens it."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32)


def save_adapter(base: Path, folder: Path, *, more_tokens: int = 0, **settings: Any) -> torch.Tensor:
    """Save an adapter whose factors are not zero; the logits of the model that has it."""
    torch.manual_seed(1)
    model = open_plain(base)
    if more_tokens:
        model.resize_token_embeddings(model.config.vocab_size + more_tokens, mean_resizing=False)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    logits: torch.Tensor = adapted(IDS).logits
    return logits


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("more_tokens", [0, 5])
def test_a_model_with_an_adapter_computes_what_peft_does(merge: bool, more_tokens: int, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]} if more_tokens else {}
    expected = save_adapter(base, tmp_path / "lora", more_tokens=more_tokens, **whole)
    model, tokenizer = load_with_adapters(base, base, [tmp_path / "lora"], settings=FP32, merge=merge)
    assert any("lora_A" in name for name, _ in model.named_parameters()) != merge
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + more_tokens
    torch.testing.assert_close(model.eval()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected[..., : len(tokenizer)] - open_plain(base)(IDS).logits).abs().max() > 1e-3


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    save_adapter(base, tmp_path / "lora")
    for name, content, sentence in (("cut", b"\xff" * 20, "cannot be read"), ("none", None, "holds no adapter_model.safetensors")):
        shutil.copytree(tmp_path / "lora", tmp_path / name)
        (tmp_path / name / "adapter_model.safetensors").unlink()
        if content is not None:
            (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            apply_adapter(open_plain(base), tmp_path / name)
    with pytest.raises(UserError, match="does not belong to this model"):
        load_with_adapters(write_model(tmp_path / "other", "gpt2"), base, [tmp_path / "lora"], settings=FP32)
    model = open_plain(base)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.raises(UserError, match=r"lacking lacks weights of the model .*layers\.1\.mlp\.up_proj"):
        load_with_adapters(tmp_path / "lacking", base, [], settings=FP32)
    (tmp_path / "lacking" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="lacking cannot be loaded by transformers"):
        load_with_adapters(tmp_path / "lacking", base, [], settings=FP32)


def test_the_context_and_the_device() -> None:
    from transformers import GPT2Config, LlamaConfig

    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(LlamaConfig(max_position_embeddings=99)) == 99
    assert context_length(object()) is None
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"^--device cuda:77 cannot be used here: \S"):
        choose_device("cuda:77")
