"""The three golden runs: small, fixed trainings whose losses are kept in `losses.json`.

Renew them, after a change that is meant to change numbers, with

    python -m tests.golden.renew
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_llm.data.batch import Batch
from megatron_llm.models.registry import get_family
from megatron_llm.optim.lr_schedule import learning_rate
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine

FILE = Path(__file__).with_name("losses.json")
STEPS, LENGTH, BATCH, VOCAB = 12, 32, 16, 97


@dataclass(frozen=True)
class GoldenRun:
    """A configuration and how far its losses may be from the stored ones (other processors round differently)."""

    config: RunConfig
    tolerance: float


def _config(model: ModelConfig, parallel: ParallelConfig, **train: object) -> RunConfig:
    base = TrainConfig(micro_batch_size=4, global_batch_size=BATCH, seq_length=LENGTH, train_iters=STEPS, seed=3)
    optimizer = OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=3)
    return RunConfig(model, parallel, optimizer, replace(base, **train), DataConfig(mock_data=True))  # type: ignore[arg-type]


def golden_runs() -> dict[str, GoldenRun]:
    """Name to run: one plain, one with everything of the layout and dropout, one in bf16 with sharded optimizer state."""
    small = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=VOCAB)
    cpu = ParallelConfig(device="cpu")
    return {
        "llama-grouped-tp1": GoldenRun(_config(replace(small, num_query_groups=2), cpu), 1e-4),
        "gpt-dropout-tp2-pp2-sp": GoldenRun(
            _config(
                replace(small, model="gpt", hidden_dropout=0.1, attention_dropout=0.1),
                replace(cpu, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
            ),
            1e-4,
        ),
        "llama-bf16-dp2-full-recompute": GoldenRun(
            _config(replace(small, num_query_groups=1, tie_word_embeddings=True), cpu, bf16=True, recompute_granularity="full"), 1e-2
        ),
    }


def layout_of(name: str) -> dict[str, int]:
    """Ranks of a run."""
    return {"llama-grouped-tp1": {}, "gpt-dropout-tp2-pp2-sp": {"tp": 2, "pp": 2}, "llama-bf16-dp2-full-recompute": {"dp": 2}}[name]


def text(step: int) -> torch.Tensor:
    """[BATCH, LENGTH + 1] ids that can be learned: arithmetic progressions modulo the vocabulary."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(0, limit, (BATCH, 1), generator=generator) for limit in (VOCAB, 5))
    return (start + stride * torch.arange(LENGTH + 1)) % VOCAB


def train_rank(groups: ParallelGroups, name: str, schedule: str) -> list[float | None]:
    """Losses of a golden run on this rank."""
    config = golden_runs()[name].config
    config = resolve(replace(config, parallel=replace(config.parallel, pipeline_schedule=schedule)), groups.world.size)
    engine = NativeEngine(config, get_family(config.model.model), groups)
    losses = []
    for step in range(STEPS):
        ids, micro, width = text(step), config.train.micro_batch_size, config.train.micro_batch_size * groups.dp.size
        mine = [ids[first : first + micro] for first in range(groups.dp.rank * micro, BATCH, width)]
        positions = torch.arange(LENGTH).expand(micro, LENGTH)
        batches = [Batch(rows[:, :-1], rows[:, 1:], torch.ones(micro, LENGTH), positions) for rows in mine]
        lr = learning_rate(config.optimizer, step, STEPS)
        losses.append(engine.train_step(batches, step=step, first_sample=step * BATCH, lr=lr).loss)
    return losses


def train(name: str, schedule: str = "auto") -> list[float | None]:
    """Losses of a golden run, under the pipeline schedule `schedule`."""
    losses: list[float | None] = run_ranks(train_rank, name, schedule, timeout=120, **layout_of(name))[0]
    return losses


def stored() -> dict[str, list[float]]:
    """The losses on file."""
    values: dict[str, list[float]] = json.loads(FILE.read_text())["losses"]
    return values
