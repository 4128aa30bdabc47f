"""The inspection tool on everything it knows, and on what it does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_llm.convert.describe import describe, verify_digests
from megatron_llm.convert.hf_folder import list_tensors, read_header
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.utils.errors import UserError
from tests.checkpoints import save_random_model, small_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(single_process_groups(), tmp_path_factory.mktemp("gpt"), small_model("gpt"), torch.bfloat16)


def test_a_checkpoint(checkpoint: Path) -> None:
    text = "\n".join(describe(checkpoint))
    assert "step 7, saved 20" in text and "family gpt, vocabulary 97" in text and "saved under tp 1, dp 1, pp 1" in text
    assert "  transformer.wte.weight  [97, 32]  bfloat16" in text
    assert "exp_avg" not in text and "consumed_samples" not in text
    longer = "\n".join(describe(checkpoint, optimizer=True, state=True))
    assert "optimizer.exp_avg.transformer.h.0.attn.c_attn.weight  [32, 96]  float32" in longer and '"consumed_samples": 0' in longer


def test_a_folder_of_checkpoints(checkpoint: Path) -> None:
    (checkpoint.parent / "step_0000009.tmp").mkdir(exist_ok=True)
    lines = list(describe(checkpoint.parent))
    assert lines[1] == "  step_0000009.tmp: its save was not finished"
    assert lines[2].startswith("  step_0000007: saved ") and lines[2].endswith(" MB")


def test_digests(checkpoint: Path) -> None:
    assert verify_digests(checkpoint) == "all 1 files are as they were written"
    data = (checkpoint / "rank_00000.safetensors").read_bytes()
    (checkpoint / "rank_00000.safetensors").write_bytes(data[:-1] + b"\x55")
    try:
        with pytest.raises(UserError, match="rank_00000.safetensors does not match its digest"):
            verify_digests(checkpoint)
    finally:
        (checkpoint / "rank_00000.safetensors").write_bytes(data)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "vocab_size": 97, "tie_word_embeddings": false}')
    lines = list(describe(tmp_path))
    assert lines[0].endswith("Hugging Face folder, LlamaForCausalLM") and lines[1] == "vocabulary 97, tied embeddings False"
    assert lines[2:] == ["1 tensors with 6 elements in 1 files", "  a.weight  [2, 3]  BF16"]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b.weight": "model.safetensors"}}')
    with pytest.raises(UserError, match=r"does not agree with the files beside it about a.weight, b.weight"):
        list_tensors(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"123", b"\xff" * 20, (4).to_bytes(8, "little") + b"[1]]", (9).to_bytes(8, "little") + b'{"a": 1} ']
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_header(tmp_path / "x")


def test_anything_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint"):
        list(describe(tmp_path))
    (tmp_path / "step_0000001").mkdir()
    with pytest.raises(UserError, match=r"step_0000001 is damaged: manifest.json is missing"):
        list(describe(tmp_path / "step_0000001"))
