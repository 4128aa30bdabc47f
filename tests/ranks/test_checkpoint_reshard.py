"""A checkpoint does not remember its layout: saved under any TP x PP x DP, every layout restores the same bits.

Each element of each tensor is set from its key and its global position, by the rank that holds it. So what another
layout must find after loading is known without asking the layout that saved.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch

from megatron_llm.checkpoint import assemble
from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.find import choose_checkpoint
from megatron_llm.checkpoint.load import CheckpointReader, load_entries, load_state
from megatron_llm.checkpoint.manifest import read_manifest
from megatron_llm.checkpoint.model_state import across_precisions, model_entries, optimizer_entries
from megatron_llm.config.resolve import with_defaults
from megatron_llm.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megatron_llm.kernels.dispatch import torch_kernels
from megatron_llm.models.causal_lm import ModelOptions, build_chunks
from megatron_llm.models.registry import get_family
from megatron_llm.optim.optimizer import DistributedOptimizer
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks

Layout = dict[str, int]
Form = Literal["sharded", "hf"]
MODELS = {
    "llama": ModelConfig(model="llama", num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=97),
    "gpt": ModelConfig(model="gpt", num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=97),
}


class Held:
    """A model and an optimizer on one rank, and the entries they make."""

    def __init__(self, groups: ParallelGroups, name: str, dtype: torch.dtype, virtual: int, shard: bool) -> None:
        model = with_defaults(replace(RunConfig(), model=MODELS[name]), 1).model
        family = get_family(name)
        options = ModelOptions(seed=1, dtype=dtype)
        self.chunks = build_chunks(family, model, groups, torch_kernels(), options, virtual=virtual)
        sync = GradSync(self.chunks, groups, shard=shard, overlap=False, bucket_size=20_000)
        self.optimizer = DistributedOptimizer(sync, OptimizerConfig(), groups)
        self.weights = model_entries(self.chunks, family, groups.dp)
        self.state = optimizer_entries(self.optimizer.segments(), family, groups.dp, sharded=sync.shard)


def expected(entry: Entry) -> torch.Tensor:
    """What an entry must hold: a function of its key and global position alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(entry.key.encode()))
    whole = torch.randn(entry.global_shape, generator=generator)
    return whole[tuple(slice(a, a + n) for a, n in zip(entry.start, entry.shape, strict=True))].to(entry.tensor.dtype)


def save(groups: ParallelGroups, root: str, name: str, dtype: torch.dtype, virtual: int, shard: bool, form: Form = "sharded") -> int:
    """Fill model and optimizer with the expected values and save them; returns the bytes of weights this rank wrote."""
    held = Held(groups, name, dtype, virtual, shard)
    entries = held.weights + held.state
    with torch.no_grad():
        for entry in entries:
            entry.tensor.copy_(expected(entry))
    state = {"config": {"model": {"model": name, "vocab_size": 97}}, "consumed_samples": 24}
    path = Checkpointer(root, groups, form=form).save(3, entries, state)
    files = sorted(file for file in path.glob("*.safetensors"))
    return files[groups.rank].stat().st_size if groups.rank < len(files) else 0


def wrong_after_load(groups: ParallelGroups, root: str, name: str, dtype: torch.dtype, virtual: int, shard: bool) -> list[str]:
    """Load into a fresh model and optimizer; returns the keys of entries that do not hold what they must."""
    held = Held(groups, name, dtype, virtual, shard)
    path = choose_checkpoint(root, groups)
    assert path is not None and load_state(path)["consumed_samples"] == 24
    load_entries(path, held.weights + held.state, groups, complete=[""])
    wrong = [entry.key for entry in held.weights + held.state if not torch.equal(entry.tensor, expected(entry))]
    for chunk in held.chunks:
        embedding = getattr(chunk.embedding, "word", None) if chunk.embedding is not None else None
        if embedding is not None and groups.tp.rank == groups.tp.size - 1:
            rows = next(entry for entry in held.weights if entry.key.endswith(("embed_tokens.weight", "wte.weight"))).shape[0]
            wrong += ["padding"] if embedding.weight[rows:].any() else []
    return wrong


def layout_id(value: object) -> str:
    return "-".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else ""


MOVES: list[tuple[Layout, Layout]] = [
    ({"tp": 2, "pp": 2, "dp": 1}, {"tp": 1, "pp": 2, "dp": 2}),
    ({"tp": 1, "pp": 2, "dp": 2}, {"tp": 4, "pp": 1, "dp": 1}),
    ({"tp": 4, "pp": 1, "dp": 1}, {"tp": 1, "pp": 1, "dp": 4}),
    ({"tp": 1, "pp": 1, "dp": 3}, {"tp": 2, "pp": 2, "dp": 1}),
    ({"tp": 1, "pp": 4, "dp": 1}, {"tp": 1, "pp": 1, "dp": 1}),
]


@pytest.mark.parametrize("form", ["sharded", "hf"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("source", "target"), MOVES, ids=layout_id)
def test_any_layout_restores_the_same_bits(tmp_path: Path, name: str, source: Layout, target: Layout, form: Form) -> None:
    run_ranks(save, str(tmp_path), name, torch.float32, 1, True, form, **source)
    wrong = run_ranks(wrong_after_load, str(tmp_path), name, torch.float32, 1, True, **target)
    assert wrong == [[]] * len(wrong)


def save_in_rounds(groups: ParallelGroups, root: str, limit: int) -> None:
    with mock.patch.object(assemble, "ROUND", limit):
        save(groups, root, "gpt", torch.bfloat16, 1, True, "hf")


def test_weights_are_put_together_in_rounds_of_any_size(tmp_path: Path) -> None:
    """One weight at a time, some, all at once: the same files."""
    found = []
    for limit in (1, 9000, assemble.ROUND):
        run_ranks(save_in_rounds, str(tmp_path / str(limit)), limit, tp=2, dp=2)
        folder = tmp_path / str(limit) / "step_0000003"
        found.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]


@pytest.mark.parametrize("form", ["sharded", "hf"])
@pytest.mark.parametrize("name", MODELS)
def test_bf16_with_main_copies_virtual_stages_and_a_replicated_optimizer(tmp_path: Path, name: str, form: Form) -> None:
    run_ranks(save, str(tmp_path), name, torch.bfloat16, 2, True, form, tp=2, pp=2, dp=1)
    wrong = run_ranks(wrong_after_load, str(tmp_path), name, torch.bfloat16, 1, False, tp=1, pp=2, dp=2)
    assert wrong == [[]] * 4
    run_ranks(save, str(tmp_path / "replicated"), name, torch.bfloat16, 1, False, form, tp=1, pp=1, dp=3)
    wrong = run_ranks(wrong_after_load, str(tmp_path / "replicated"), name, torch.bfloat16, 2, True, tp=1, pp=2, dp=2)
    assert wrong == [[]] * 4


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    run_ranks(save, str(tmp_path), name, torch.float32, 1, True, tp=2, pp=2, dp=1)
    model = with_defaults(replace(RunConfig(), model=MODELS[name]), 1).model
    hf = get_family(name).hf_config(model)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.named_parameters()}
    weights = read_manifest(tmp_path / "step_0000003").weights
    assert {key: record.shape for key, record in weights.items()} == shapes


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    for shard in (True, False):
        sizes = run_ranks(save, str(tmp_path / str(shard)), "llama", torch.float32, 1, shard, tp=1, pp=1, dp=4)
        assert max(sizes) < 1.5 * min(sizes)


def test_whole_weights_are_written_by_all_ranks_alike(tmp_path: Path) -> None:
    sizes = run_ranks(save, str(tmp_path), "llama", torch.float32, 1, True, "hf", tp=2, pp=1, dp=2)
    assert max(sizes) < 1.2 * min(sizes)
    assert sorted(path.name for path in (tmp_path / "step_0000003").glob("*.safetensors")) == [
        f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)
    ]


def load_other_precision(groups: ParallelGroups, root: str, dtype: torch.dtype) -> list[str]:
    held = Held(groups, "llama", dtype, 1, True)
    path = choose_checkpoint(root, groups)
    assert path is not None
    entries = held.weights + held.state
    with CheckpointReader(path) as reader:
        adapted = across_precisions(entries, reader.manifest)
        load_entries(path, adapted, groups, cast=True)
        return [entry.key for entry in entries if not torch.equal(entry.tensor, _in_full(reader, entry).to(entry.tensor.dtype))]


def _in_full(reader: CheckpointReader, entry: Entry) -> torch.Tensor:
    """The most precise values the checkpoint has for an entry."""
    bare = entry.key.removeprefix("optimizer.main.")
    found = next(key for key in (f"optimizer.main.{bare}", bare) if key in reader.manifest.tensors)
    return reader.read(found)[tuple(slice(a, a + n) for a, n in zip(entry.start, entry.shape, strict=True))]


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_another_precision_loses_nothing(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    run_ranks(save, str(tmp_path), "llama", saved, 1, True, tp=2, pp=1, dp=1)
    assert run_ranks(load_other_precision, str(tmp_path), loaded, tp=1, pp=1, dp=2) == [[], []]


def error_of_load(groups: ParallelGroups, root: str) -> str:
    """A model with another width on rank 1's part of the job only: every rank must hear of it."""
    tensor = torch.zeros(5 if groups.rank == 1 else 4)
    try:
        load_entries(Path(root) / "step_0000001", [Entry("w", (tensor.numel(),), (0,), tensor)], groups)
    except Exception as error:  # noqa: BLE001 - the test compares what each rank raised
        return f"{type(error).__name__}: {error}"
    return ""


def save_one(groups: ParallelGroups, root: str) -> None:
    Checkpointer(root, groups).save(1, [Entry("w", (4,), (0,), torch.ones(4), owned=groups.rank == 0)], {})


def test_a_mismatch_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks(save_one, str(tmp_path), tp=3)
    errors: Sequence[str] = run_ranks(error_of_load, str(tmp_path), tp=3)
    assert len(set(errors)) == 1 and errors[0].startswith("UserError") and "w has shape [4] in the checkpoint, [5] here" in errors[0]
