"""Saved under one layout, resumed under another: weights and optimizer state bit for bit, and the same samples next."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llm.checkpoint.find import find_latest
from megatron_llm.checkpoint.load import CheckpointReader
from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_llm.data.indexed_writer import write_indexed_dataset
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.inputs import Inputs, identify
from megatron_llm.training.snapshots import Progress, Snapshots
from megatron_llm.utils.errors import UserError

VOCAB, BATCH, LENGTH = 97, 8, 16
Layout = tuple[int, int, int]


def config_for(layout: Layout, root: Path, *, save: str, load: str | None, family: str = "llama", **train: object) -> RunConfig:
    tp, pp, dp = layout
    config = RunConfig(
        model=ModelConfig(
            model=family,
            num_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2 if family == "llama" else None,
            vocab_size=VOCAB,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_schedule="zero-bubble" if pp > 1 and dp > 1 else "auto",
            device="cpu",
            ddp_bucket_size=3000,
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        train=replace(
            TrainConfig(micro_batch_size=2, global_batch_size=BATCH, seq_length=LENGTH, train_iters=20, seed=5),
            **train,  # type: ignore[arg-type]
        ),
        data=DataConfig(data_path=[str(root / "corpus")], split="1,0,0"),
        checkpoint=CheckpointConfig(save=str(root / save), load=None if load is None else str(root / load)),
    )
    return resolve(config, tp * pp * dp)


def train_some(groups: ParallelGroups, config: RunConfig, steps: int) -> tuple[list[float | None], list[list[list[int]]], str]:
    """Restore, take some steps, save: losses, the tokens this replica saw at each step, what was said."""
    said: list[str] = []
    engine = NativeEngine(config, get_family(config.model.model), groups)
    snapshots = Snapshots(config, engine, tokenizer=None, tokenizer_fingerprint=None, report=said.append)
    progress, _ = snapshots.restore()
    inputs = Inputs(config, identify(config), groups, lambda line: None)
    said += snapshots.changes(progress, inputs.order)
    batches = inputs.train_batches(progress.consumed_samples)
    losses, seen = [], []
    for _ in range(steps):
        micro_batches = next(batches)
        seen.append([row for batch in micro_batches for row in batch.tokens.tolist()])
        outcome = engine.train_step(micro_batches, step=progress.step, first_sample=progress.consumed_samples, lr=1e-2)
        losses.append(outcome.loss)
        progress = Progress(progress.step + 1, progress.consumed_samples + BATCH)
    progress.data_order = inputs.order
    snapshots.save(progress, {}, None)
    return losses, seen, "\n".join(said)


def all_tensors(root: Path) -> dict[str, torch.Tensor]:
    path = find_latest(root, lambda line: None)
    assert path is not None
    with CheckpointReader(path) as reader:
        return {key: reader.read(key) for key in reader.manifest.tensors}


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), f"{key} differs"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a small corpus of random documents."""
    random = np.random.default_rng(0)
    write_indexed_dataset(tmp_path / "corpus", [random.integers(0, VOCAB, 50) for _ in range(200)], VOCAB)
    return tmp_path


def in_sample_order(results: list[tuple[list[float | None], list[list[list[int]]], str]], layout: Layout) -> list[list[list[int]]]:
    """Rows of each step in the order of their sample numbers, put together from the replicas."""
    tp, _, dp = layout
    steps = []
    for step in range(len(results[0][1])):
        rows = [results[replica * tp][1][step] for replica in range(dp)]
        steps.append([row for start in range(0, BATCH // dp, 2) for replica in rows for row in replica[start : start + 2]])
    return steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_three_layouts_in_a_row(root: Path, family: str, precision: str) -> None:
    """tp2 pp2 dp1 -> tp1 pp2 dp2 -> tp4: restored state bit-equal, next samples those of a run that never changed."""
    layouts: list[Layout] = [(2, 2, 1), (1, 2, 2), (4, 1, 1)]
    options = {"family": family, "bf16": precision == "bf16"}
    straight = run_ranks(train_some, config_for((1, 1, 1), root, save="straight", load=None, **options), 3)  # type: ignore[arg-type]
    seen, before = [], None
    for number, layout in enumerate(layouts):
        tp, pp, dp = layout
        load = f"after{number - 1}" if number else None
        if load is not None:
            again = config_for(layout, root, save=f"again{number}", load=load, **options)  # type: ignore[arg-type]
            said = run_ranks(train_some, again, 0, tp=tp, pp=pp, dp=dp)[0][2]
            assert f"loading {root / load}" in said
            assert_bit_equal(all_tensors(root / f"again{number}"), before or {})
        results = run_ranks(
            train_some,
            config_for(layout, root, save=f"after{number}", load=load, **options),  # type: ignore[arg-type]
            1,
            tp=tp,
            pp=pp,
            dp=dp,
        )
        seen += in_sample_order(results, layout)
        assert results[0][0][0] == pytest.approx(straight[0][0][number], rel=1e-5 if precision == "fp32" else 2e-2)
        before = all_tensors(root / f"after{number}")
        assert any(key.startswith("optimizer.exp_avg.") for key in before)
        assert all(tensor.shape[0] in (VOCAB,) for key, tensor in before.items() if "embed_tokens" in key or "wte" in key)
    assert seen == in_sample_order(straight, (1, 1, 1))


def test_same_layout_is_bit_exact_with_dropout(root: Path) -> None:
    """Four steps straight equal two, resume, two; dropout, moments, loss and weights included."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

    def config(save: str, load: str | None) -> RunConfig:
        plain = config_for((2, 1, 2), root, save=save, load=load)
        return replace(plain, model=replace(plain.model, **dropout))

    straight = run_ranks(train_some, config("straight", None), 4, tp=2, dp=2)
    first = run_ranks(train_some, config("half", None), 2, tp=2, dp=2)
    second = run_ranks(train_some, config("whole", "half"), 2, tp=2, dp=2)
    assert first[0][0] + second[0][0] == straight[0][0]
    assert_bit_equal(all_tensors(root / "whole"), all_tensors(root / "straight"))


def test_precision_can_change_on_resume(root: Path) -> None:
    """bf16 to fp32 takes the fp32 main copies; nothing is lost, and back again the bf16 weights are their rounding."""
    run_ranks(train_some, config_for((1, 1, 1), root, save="bf16", load=None, bf16=True), 2)
    run_ranks(train_some, config_for((1, 1, 1), root, save="fp32", load="bf16"), 0)
    half, full = all_tensors(root / "bf16"), all_tensors(root / "fp32")
    for key, tensor in full.items():
        expected = half[key] if key.startswith("optimizer.") else half[f"optimizer.main.{key}"]
        assert torch.equal(tensor, expected), key


def test_finetune_takes_weights_only(root: Path) -> None:
    run_ranks(train_some, config_for((1, 1, 1), root, save="base", load=None), 2)
    base = config_for((2, 1, 1), root, save="tuned", load="base")
    run_ranks(train_some, replace(base, checkpoint=replace(base.checkpoint, finetune=True)), 0, tp=2)
    tuned, trained = all_tensors(root / "tuned"), all_tensors(root / "base")
    path = find_latest(root / "tuned", lambda line: None)
    assert path is not None and path.name == "step_0000000"
    for key, tensor in tuned.items():
        if key.startswith("optimizer."):
            assert not tensor.any(), f"{key} should start fresh"
        else:
            assert torch.equal(tensor, trained[key]), key


def refused(groups: ParallelGroups, config: RunConfig) -> str:
    try:
        train_some(groups, config, 0)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def test_what_does_not_belong_together_is_refused_with_both_values(root: Path) -> None:
    run_ranks(train_some, config_for((1, 1, 1), root, save="base", load=None), 1)
    base = config_for((1, 1, 1), root, save="other", load="base")
    cases = {
        "model family llama, this run gpt": replace(base, model=replace(base.model, model="gpt", num_query_groups=4)),
        "vocabulary size 97, this run 98": replace(base, model=replace(base.model, vocab_size=98)),
        "sequences of 16 tokens, this run cuts sequences of 8": replace(base, train=replace(base.train, seq_length=8)),
        "is not in the checkpoint": replace(base, model=replace(base.model, num_layers=5)),
        "give --load a checkpoint": replace(base, checkpoint=replace(base.checkpoint, load=str(root / "nowhere"))),
    }
    for sentence, config in cases.items():
        said = run_ranks(refused, config)[0]
        assert sentence in said, said


def test_what_changes_on_resume_is_said(root: Path) -> None:
    """More steps stretch the learning-rate curve, and may take more epochs and so another order of the samples."""
    run_ranks(train_some, config_for((1, 1, 1), root, save="base", load=None), 1)
    same = run_ranks(train_some, config_for((1, 1, 1), root, save="same", load="base"), 0)[0][2]
    assert "learning rate" not in same and "another order" not in same
    longer = run_ranks(train_some, config_for((1, 1, 1), root, save="longer", load="base", train_iters=400), 0)[0][2]
    assert "the learning rate of step 2 was to be" in longer and "--lr-decay-iters 20" in longer
    assert "some of the first 8 may be seen again" in longer
