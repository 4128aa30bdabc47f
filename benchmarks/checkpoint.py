"""What checkpoints cost beside the disk they lie on: a save, the stall of a background save, and a load under another layout.

    python benchmarks/checkpoint.py --megabytes 500

A random LLaMA in bf16 with its optimizer state (14 bytes a parameter) is saved under one rank and under TP 2 x PP 2 on
this machine, in both forms, and what the four ranks saved is loaded by one, digests compared. In each round the disk is
measured too: as many bytes written to a new file and flushed, and read again, one request of 8 MiB after the other, past
the page cache and through it, the faster of the two. The first round warms up; shown are the medians of the others.
"""

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.hf_documents import model_documents, token_ids
from megatron_llm.checkpoint.load import load_entries
from megatron_llm.checkpoint.model_state import model_entries, optimizer_entries
from megatron_llm.config.resolve import with_defaults
from megatron_llm.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megatron_llm.config.serialize import to_dict
from megatron_llm.kernels.dispatch import torch_kernels
from megatron_llm.models.causal_lm import ModelOptions, build_chunks
from megatron_llm.models.registry import get_family
from megatron_llm.optim.optimizer import DistributedOptimizer
from megatron_llm.parallel.comm import barrier
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks

LAYERS, HEADS, VOCAB = 8, 8, 16000
LAYOUTS = ((1, 1), (2, 2))
Form = Literal["sharded", "hf"]
FORMS: tuple[Form, ...] = ("sharded", "hf")
_BLOCK = 8 * 1024 * 1024
_PATIENCE = 300.0
_WORK = 384  # side of the matrices that a step multiplies


@dataclass(frozen=True)
class Cost:
    """Seconds, medians of the rounds; megabytes of a checkpoint; megabytes a second of the disk in the same rounds.

    save         until a checkpoint is on the disk
    stall        until a background save returns to the training
    background   from then until its checkpoint is on the disk, while the training goes on
    step_alone, step_beside   a step of a training, without and with a background save beside it
    ratio, stall_ratio        of the save's rate to the disk's; of the stall to the save; medians of each round's own
    """

    layout: str
    form: Form
    megabytes: float
    save: float
    stall: float
    background: float
    step_alone: float
    step_beside: float
    disk: float
    ratio: float
    stall_ratio: float


@dataclass(frozen=True)
class Reading:
    """Seconds of a load by one rank of what four saved, its rate, the disk's in the same rounds, and the ratio; medians."""

    form: Form
    seconds: float
    rate: float
    disk: float
    ratio: float


def model_of(megabytes: float) -> ModelConfig:
    """A LLaMA whose checkpoint has about this size."""
    sizes = (
        with_defaults(
            RunConfig(model=ModelConfig(num_layers=LAYERS, hidden_size=width, num_attention_heads=HEADS, vocab_size=VOCAB)), 1
        ).model
        for width in range(64, 8192, 64)
    )
    return next(model for model in sizes if 14 * _parameters(model) >= megabytes * 1e6)


def _parameters(model: ModelConfig) -> int:
    return 2 * VOCAB * model.hidden_size + LAYERS * (4 * model.hidden_size**2 + 3 * model.hidden_size * (model.ffn_hidden_size or 0))


def state_of(groups: ParallelGroups, model: ModelConfig, seed: int) -> list[Entry]:
    """What a training with this model would save."""
    torch.set_num_threads(1)
    family = get_family(model.model)
    chunks = build_chunks(family, model, groups, torch_kernels(), ModelOptions(seed=seed, dtype=torch.bfloat16))
    sync = GradSync(chunks, groups, shard=True, overlap=False, bucket_size=40_000_000)
    optimizer = DistributedOptimizer(sync, OptimizerConfig(), groups)
    return model_entries(chunks, family, groups.dp) + optimizer_entries(optimizer.segments(), family, groups.dp, sharded=True)


def measure_saves(groups: ParallelGroups, root: str, model: ModelConfig, form: Form, rounds: int) -> Cost:
    """The cost of one form. Everything is measured once in each round, so that all meet the same machine."""
    entries, state = state_of(groups, model, 1), {"config": to_dict(replace(RunConfig(), model=model))}
    documents = model_documents(model, "bfloat16", token_ids(None, model)) if form == "hf" else {}
    savers = [Checkpointer(f"{root}/{kind}", groups, keep_last=1, async_save=kind == "async", form=form) for kind in ("sync", "async")]
    savers[1].reserve(entries)
    found: dict[str, list[float]] = {}
    size = 0
    for number in range(rounds + 1):
        barrier(groups.world)
        disk = disk_write(Path(root) / "probe", size or round(model_bytes(model))) if groups.rank == 0 else 0.0
        barrier(groups.world)
        begin = time.perf_counter()
        path = savers[0].save(number, entries, state, documents=documents)
        save = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        alone = [step_seconds() for _ in range(20)]
        barrier(groups.world)
        begin = time.perf_counter()
        path = savers[1].save(number, entries, state, documents=documents)
        stall = time.perf_counter() - begin
        beside = []
        while not path.exists() and time.perf_counter() - begin < _PATIENCE:  # `wait` says what went wrong
            beside.append(step_seconds())
        background = time.perf_counter() - begin - stall
        savers[1].wait()
        row = {"disk": disk, "save": save, "stall": stall, "background": background, "stall_ratio": stall / save}
        row |= {"ratio": size / 1e6 / save / disk if disk else 0.0}
        row |= {"step_alone": statistics.median(alone), "step_beside": statistics.median(beside or alone)}
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    middle = {name: statistics.median(values[1:]) for name, values in found.items()}
    return Cost(layout=_layout(groups), form=form, megabytes=size / 1e6, **middle)


def model_bytes(model: ModelConfig) -> float:
    """About the size of a checkpoint."""
    return 14.0 * _parameters(model)


def _layout(groups: ParallelGroups) -> str:
    return f"TP {groups.tp.size} x PP {groups.pp.size}"


def save_once(groups: ParallelGroups, root: str, model: ModelConfig, form: Form) -> str:
    """A checkpoint to load; its folder."""
    documents = model_documents(model, "bfloat16", token_ids(None, model)) if form == "hf" else {}
    state = {"config": to_dict(replace(RunConfig(), model=model))}
    return str(Checkpointer(root, groups, form=form).save(1, state_of(groups, model, 1), state, documents=documents))


def measure_load(groups: ParallelGroups, path: str, model: ModelConfig, form: Form, rounds: int) -> Reading:
    """Load a checkpoint, none of it in the page cache, into a model that holds other values."""
    entries = state_of(groups, model, 2)
    files = sorted(Path(path).rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e6
    seconds, disk = [], []
    for _ in range(rounds + 1):
        disk.append(max(disk_read(files, direct=direct) for direct in (False, True)))
        drop_cache(files)
        begin = time.perf_counter()
        load_entries(path, entries, groups, complete=("",), verify=True)
        seconds.append(time.perf_counter() - begin)
    rates = [size / value for value in seconds[1:]]
    ratios = [rate / limit for rate, limit in zip(rates, disk[1:], strict=True)]
    return Reading(form, statistics.median(seconds[1:]), statistics.median(rates), statistics.median(disk[1:]), statistics.median(ratios))


def step_seconds() -> float:
    """Seconds of a piece of work of a few milliseconds that keeps one processor busy, as a training step would."""
    matrix = torch.ones(_WORK, _WORK)
    begin = time.perf_counter()
    for _ in range(4):
        torch.mm(matrix, matrix)
    return time.perf_counter() - begin


def disk_write(path: Path, size: int) -> float:
    """Megabytes a second of `size` bytes to a new file, flushed at the end; the faster of past and through the page cache."""
    block = mmap.mmap(-1, _BLOCK)
    block[:] = os.urandom(_BLOCK)

    def write(direct: bool) -> float:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0))
        try:
            begin = time.perf_counter()
            count = -(-size // _BLOCK)
            for _ in range(count):
                os.write(file, block)
            os.fsync(file)
            return count * _BLOCK / 1e6 / (time.perf_counter() - begin)
        finally:
            os.close(file)
            path.unlink()

    return max(write(direct=False), write(direct=True))


def disk_read(files: list[Path], *, direct: bool) -> float:
    """Megabytes a second of reading files one after the other, none of them in the page cache."""
    drop_cache(files)
    block = mmap.mmap(-1, _BLOCK)
    begin, total = time.perf_counter(), 0
    for path in files:
        file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            while count := os.readv(file, [block]):
                total += count
                if count < _BLOCK:
                    break
        finally:
            os.close(file)
    return total / 1e6 / (time.perf_counter() - begin)


def drop_cache(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def slowest(costs: list[Cost]) -> Cost:
    """One rank's view for all: what takes longest counts; the disk was measured by rank 0."""
    worst = {name: max(getattr(cost, name) for cost in costs) for name in ("save", "stall", "background", "step_alone", "step_beside")}
    return replace(costs[0], stall_ratio=max(cost.stall_ratio for cost in costs), **worst)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500, help="size of a checkpoint, about (default: 500)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured in each case (default: 5)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder, removed at the end)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    options = parser.parse_args()
    model = model_of(options.megabytes)
    costs: list[Cost] = []
    readings: list[Reading] = []
    print("| layout | form | MB | save, s | disk, MB/s | save / disk | stall, s | stall / save | background, s | step, ms | beside, ms |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for tp, pp in LAYOUTS:
        for form in FORMS:
            with tempfile.TemporaryDirectory(dir=options.folder) as root:
                cost = slowest(run_ranks(measure_saves, root, model, form, options.rounds, tp=tp, pp=pp, timeout=3600))
            costs.append(cost)
            print(
                f"| {cost.layout} | {form} | {cost.megabytes:.0f} | {cost.save:.2f} | {cost.disk:.0f} | {100 * cost.ratio:.0f} % "
                f"| {cost.stall:.3f} | {100 * cost.stall_ratio:.0f} % | {cost.background:.2f} "
                f"| {1e3 * cost.step_alone:.1f} | {1e3 * cost.step_beside:.1f} |",
                flush=True,
            )
    print("\n| TP 2 x PP 2 loaded by one rank | seconds | MB/s | disk, MB/s | load, % of disk |\n|---|---|---|---|---|")
    for form in FORMS:
        with tempfile.TemporaryDirectory(dir=options.folder) as root:
            path = run_ranks(save_once, root, model, form, tp=2, pp=2, timeout=3600)[0]
            reading = run_ranks(measure_load, path, model, form, options.rounds, tp=1, timeout=3600)[0]
        readings.append(reading)
        print(f"| {form} | {reading.seconds:.2f} | {reading.rate:.0f} | {reading.disk:.0f} | {100 * reading.ratio:.0f} % |", flush=True)
    if options.json is not None:
        content = {"megabytes": options.megabytes, "saves": [asdict(cost) for cost in costs], "loads": [asdict(one) for one in readings]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
