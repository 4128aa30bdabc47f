"""Streamed models compute what whole ones do, with all kinds of pieces: rows of ids, blocks of the output layer, modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.checkpoint.load import CheckpointReader
from megatron_llm.checkpoint.streamed import meta_parameters, stream_weights
from megatron_llm.checkpoint.whole_model import load_whole_model
from megatron_llm.convert.checked import RoundedWeights
from megatron_llm.convert.evaluate import our_logits, transformers_logits
from megatron_llm.convert.native_source import NativeSource
from megatron_llm.convert.raw_tensors import TensorFolder, read_json
from megatron_llm.convert.verify import fixed_ids
from megatron_llm.testing.ranks import run_ranks
from tests.checkpoints import save_random_model, small_model
from tests.families import CASES, Case, folder_logits, write_folder


class Toy(nn.Module):
    """An embedding with a padding index, a middle, an output layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8, padding_idx=49)
        self.middle = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False))
        self.output = nn.Linear(8, 50)
        self.register_buffer("scale", torch.full((), 3.0))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S] to [B, S, 50]."""
        logits: Tensor = self.output(self.middle(self.embedding(ids)) * self.scale)
        return logits


@pytest.mark.parametrize(("small", "large"), [(0, 24), (0, 10**6), (60, 24), (10**6, 10**6)])
def test_a_streamed_module_computes_the_same(small: int, large: int) -> None:
    whole = Toy()
    weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    with meta_parameters():
        streamed = Toy()
    assert all(parameter.is_meta for parameter in streamed.parameters()) and not streamed.scale.is_meta
    asked: list[tuple[str, int]] = []

    def fill(name: str, first: int, last: int, target: Tensor) -> None:
        asked.append((name, last - first))
        target.copy_(weights[name][first:last])

    ids = torch.tensor([[3, 3, 49], [0, 1, 3]])
    with torch.no_grad():
        stream_weights(streamed, fill, small=small, large=large)
        for _ in range(2):  # what was let go of is read again
            assert torch.allclose(streamed(ids), whole(ids), rtol=0.0, atol=1e-6)
    if small < 400:
        assert [rows for name, rows in asked if name == "embedding.weight"] == [1] * 8, "each id's row once a pass"
        assert all(parameter.is_meta for name, parameter in streamed.named_parameters() if parameter.dim() == 2)
    if (small, large) == (60, 24):
        assert max(rows for name, rows in asked if name == "output.weight") == 3


def test_real_parameters_and_skipped_modules_are_left_alone_and_small_ones_read_again() -> None:
    with meta_parameters():
        streamed = Toy()
    streamed.output = nn.Linear(8, 50)
    kept = streamed.output.weight
    factor = 1.0

    def fill(name: str, first: int, last: int, target: Tensor) -> None:
        assert name.startswith(("embedding", "middle.1"))
        target.fill_(factor)

    refresh = stream_weights(streamed, fill, {streamed.middle[0], streamed.middle[2]}, small=20)
    assert streamed.output.weight is kept and streamed.middle[0].weight.is_meta and streamed.middle[2].weight.is_meta
    assert streamed.middle[1].weight.eq(1).all() and streamed.embedding.weight.is_meta
    factor = 2.0
    refresh()
    assert streamed.middle[1].weight.eq(2).all() and streamed.embedding(torch.tensor([3])).eq(2).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_our_model_and_transformers_streamed_equal_the_reference(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_weights, "__kwdefaults__", {"small": 10, "large": 1000})
    config = case.config()
    write_folder(tmp_path, config)
    stored: Any = TensorFolder(tmp_path)
    assert config.vocab_size is not None and config.max_position_embeddings is not None
    ids = fixed_ids(config.vocab_size, config.max_position_embeddings)
    expected = folder_logits(tmp_path, ids)
    weights = RoundedWeights(stored, None)
    assert torch.allclose(our_logits(config, weights, ids), expected, rtol=0.0, atol=1e-4)
    if case.native:
        assert torch.allclose(transformers_logits(read_json(tmp_path / "config.json"), weights, ids), expected, rtol=0.0, atol=1e-5)


def test_a_checkpoint_of_four_ranks_is_read_by_rows(tmp_path: Path) -> None:
    config = small_model("llama")
    path = run_ranks(save_random_model, str(tmp_path), config, tp=2, pp=2)[0]
    source, ids = NativeSource(path), fixed_ids(97, 48)
    with CheckpointReader(path) as reader:
        for key, info in source.tensors.items():
            whole = reader.read(key)
            assert torch.equal(source.read(key), whole)
            first, last = info.shape[0] // 3, info.shape[0] // 2 + 1
            assert torch.equal(source.read_rows(key, first, last), whole[first:last])
    assert torch.allclose(our_logits(config, RoundedWeights(source, None), ids), load_whole_model(path).logits(ids), rtol=0.0, atol=1e-6)
