"""A training that saves in the background: the checkpoint of each step holds what a save in the foreground would have written."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_llm.checkpoint import checkpointer as checkpointer_module
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.snapshots import Progress, Snapshots
from tests.families import Case, case
from tests.ranks.test_interchange import SAMPLES, config_for, micro_batches

STEPS = 2
PAUSE = 0.3  # longer than a step of these models: without waiting, the copies would be of later weights


def train(groups: ParallelGroups, which: Case, save: str, changes: dict[str, Any]) -> list[bool]:
    """Save after each step; whether the copies had not begun when the saves returned."""
    config = config_for(which, groups, save, None, changes)
    engine = NativeEngine(config, get_family(config.model.model), groups)
    snapshots = Snapshots(config, engine, tokenizer=None, tokenizer_fingerprint=None, report=lambda line: None)
    copied: list[float] = []
    real = checkpointer_module.copy_entries

    def late(*args: Any) -> None:
        time.sleep(PAUSE)
        copied.append(time.monotonic())
        real(*args)

    open_copies = []
    with mock.patch.object(checkpointer_module, "copy_entries", late):
        for step in range(STEPS):
            batches = micro_batches(groups, config.model.vocab_size or 0, step)
            engine.train_step(batches, step=step, first_sample=step * SAMPLES, lr=1e-2)
            snapshots.save(Progress(step + 1, (step + 1) * SAMPLES), {}, None)
            open_copies.append(len(copied) == step)
        engine.train_step(batches, step=STEPS, first_sample=STEPS * SAMPLES, lr=1e-2)
        snapshots.wait()
    return open_copies


@pytest.mark.parametrize(("form", "tp", "dp"), [("sharded", 1, 2), ("hf", 2, 1)])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_each_step_is_saved_as_it_was(tmp_path: Path, form: str, tp: int, dp: int, bf16: bool) -> None:
    which = case("llama", num_query_groups=2, vocab_size=97)
    for async_save in (False, True):
        changes = {"checkpoint_format": form, "async_save": async_save, "bf16": bf16}
        found = run_ranks(train, which, str(tmp_path / str(async_save)), changes, tp=tp, dp=dp)
        assert not async_save or found == [[True] * STEPS] * 2
    written = sorted(path.relative_to(tmp_path / "False") for path in (tmp_path / "False").rglob("*.safetensors"))
    assert {path.parts[0] for path in written} == {f"step_{step:07d}" for step in range(1, STEPS + 1)}
    for path in written:
        assert (tmp_path / "True" / path).read_bytes() == (tmp_path / "False" / path).read_bytes(), path
