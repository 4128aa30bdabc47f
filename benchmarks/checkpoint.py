"""What checkpoints cost beside the disk they lie on: a save, the stall of a background save, and a load under another layout.

    python -m benchmarks.checkpoint --megabytes 2000

A random LLaMA in bf16 with its optimizer state (14 bytes a parameter) is trained, and saved, under one rank and under
TP 2 x PP 2 on this machine, in both forms, and what the four ranks saved is loaded by one, digests compared. Before and
after each save the disk is measured too: as many bytes written to a new file and flushed, and read again, one request of
8 MiB after the other, past the page cache or through it, whichever the first round found faster. The first round warms up;
shown are the medians of the others, and the stall of the first save by itself.

The stall of a background save is what a training waits for it: until `save` returns, and before the next update for what
is left of the copy. What the copy and the writing take from the steps beside them shows in the time of these steps, and
all of it together in what the training lost until the checkpoint was on the disk.
"""

import argparse
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.hf_documents import model_documents, token_ids
from megatron_llm.checkpoint.load import load_entries
from megatron_llm.checkpoint.model_state import model_entries, optimizer_entries
from megatron_llm.config.resolve import resolve, with_defaults
from megatron_llm.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_llm.config.serialize import to_dict
from megatron_llm.data.batch import Batch
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.comm import all_reduce, barrier
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.session import Launch, tune_process

LAYERS, HEADS, VOCAB = 8, 8, 16000
LAYOUTS = ((1, 1), (2, 2))
Form = Literal["sharded", "hf"]
FORMS: tuple[Form, ...] = ("sharded", "hf")
_BLOCK = 8 * 1024 * 1024
_PATIENCE = 300.0
_LENGTH, _SEQUENCES = 128, 2  # of a training step: tokens of a sequence, and micro-batches of one each
_STEPS = 2  # of the training measured alone in each round


@dataclass(frozen=True)
class Cost:
    """Seconds, medians of the rounds; megabytes of a checkpoint; megabytes a second of the disk in the same rounds.

    save         until a checkpoint is on the disk
    stall        what a training waits for a background save, of every round but the first; `first`: of that one
    background   until its checkpoint is on the disk, while the training goes on
    step_alone, step_beside   a step of the training without the stall, without and with a background save beside it
    lost         by how much the steps until then took longer than as many steps alone, the stall included
    ratio, stall_ratio        of the save's rate to the disk's; of the stall to the save; medians of each round's own
    """

    layout: str
    form: Form
    megabytes: float
    save: float
    first: float
    stall: float
    background: float
    step_alone: float
    step_beside: float
    lost: float
    disk: float
    ratio: float
    stall_ratio: float


@dataclass(frozen=True)
class Reading:
    """Seconds of a load by one rank of what four saved, its rate, the disk's in the same rounds, and the ratio; medians."""

    form: Form
    megabytes: float
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
    return next(model for model in sizes if model_bytes(model) >= megabytes * 1e6)


def model_bytes(model: ModelConfig) -> float:
    """About the size of a checkpoint."""
    matrices = LAYERS * (4 * model.hidden_size**2 + 3 * model.hidden_size * (model.ffn_hidden_size or 0))
    return 14.0 * (2 * VOCAB * model.hidden_size + matrices)


class Training:
    """A training of one model on random tokens, and what it would save."""

    def __init__(self, groups: ParallelGroups, model: ModelConfig, seed: int) -> None:
        layout = ParallelConfig(tensor_model_parallel_size=groups.tp.size, pipeline_model_parallel_size=groups.pp.size, device="cpu")
        work = TrainConfig(micro_batch_size=1, global_batch_size=_SEQUENCES, seq_length=_LENGTH, train_iters=1000, seed=seed, bf16=True)
        self.config = resolve(RunConfig(model=model, parallel=layout, train=work, data=DataConfig(mock_data=True)), groups.world.size)
        tune_process(self.config, Launch(groups.rank, groups.world.size, groups.rank, groups.world.size), groups.device)
        self.engine = NativeEngine(self.config, get_family(model.model), groups)
        tokens = torch.randint(0, VOCAB, (_SEQUENCES, _LENGTH + 1), generator=torch.Generator().manual_seed(seed))
        positions, ones = torch.arange(_LENGTH)[None], torch.ones(1, _LENGTH)
        self._batches = [Batch(row[None, :-1], row[None, 1:], ones, positions, None) for row in tokens]
        self._steps = 0

    def entries(self) -> list[Entry]:
        """What a checkpoint of it holds."""
        engine = self.engine
        state = optimizer_entries(engine.optimizer.segments(), engine.family, engine.groups.dp, sharded=engine.grad_sync.shard)
        return model_entries(engine.chunks, engine.family, engine.groups.dp) + state

    def step(self, saver: Checkpointer | None = None) -> tuple[float, float]:
        """Seconds of the next step without what it waited for `saver`, and those."""
        waited = 0.0

        def settle() -> None:
            nonlocal waited
            if saver is not None:
                begin = time.perf_counter()
                saver.settle()
                waited = time.perf_counter() - begin

        self.engine.before_update = settle
        begin = time.perf_counter()
        self.engine.train_step(self._batches, step=self._steps, first_sample=self._steps * _SEQUENCES, lr=1e-5)
        self._steps += 1
        return time.perf_counter() - begin - waited, waited


def measure_saves(groups: ParallelGroups, root: str, model: ModelConfig, form: Form, rounds: int) -> Cost:
    """The cost of one form. Everything is measured once in each round, so that all meet the same machine."""
    training = Training(groups, model, 1)
    savers = [Checkpointer(f"{root}/{kind}", groups, keep_last=1, async_save=kind == "async", form=form) for kind in ("sync", "async")]
    savers[1].reserve(training.entries())
    state = {"config": to_dict(training.config)}
    documents = model_documents(model, "bfloat16", token_ids(None, model)) if form == "hf" else {}
    probe, size = DiskWrite(Path(root) / "probe"), round(model_bytes(model))
    found: list[dict[str, float]] = []
    for number in range(rounds + 1):
        before = measure_disk(probe, size, groups)
        begin = time.perf_counter()
        path = savers[0].save(number, training.entries(), state, documents=documents)
        save = time.perf_counter() - begin
        savers[0].wait()  # it still removes the one before: not while the disk is measured
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        disk = (before + measure_disk(probe, size, groups)) / 2
        alone = statistics.median(training.step()[0] for _ in range(_STEPS))
        barrier(groups.world)
        row = {"disk": disk, "save": save, "ratio": size / 1e6 / save / disk if disk else 0.0, "step_alone": alone}
        row |= save_beside(groups, training, lambda n=number: savers[1].save(n, training.entries(), state, documents=documents), savers[1])
        found.append({**row, "stall_ratio": row["stall"] / save, "lost": row["elapsed"] - row["steps"] * alone})
    names = ("save", "stall", "background", "step_alone", "step_beside", "lost", "disk", "ratio", "stall_ratio")
    middle = {name: statistics.median(row[name] for row in found[1:]) for name in names}
    return Cost(layout=_layout(groups), form=form, megabytes=size / 1e6, first=found[0]["stall"], **middle)


def save_beside(groups: ParallelGroups, training: Training, save: Callable[[], Path], saver: Checkpointer) -> dict[str, float]:
    """Save in the background and train on until the checkpoint is there."""
    begin = time.perf_counter()
    path = save()
    stall = time.perf_counter() - begin
    seen = Watch(path)
    steps = []
    while True:
        seconds, waited = training.step(saver)
        steps.append(seconds)
        stall += waited
        there = torch.tensor(int(path.exists() or time.perf_counter() - begin > _PATIENCE))  # `wait` says what went wrong
        if all_reduce(there, groups.world, op="min").item():
            break
    elapsed = time.perf_counter() - begin
    saver.wait()
    background = seen.moment() - begin
    return {
        "stall": stall,
        "background": background,
        "elapsed": elapsed,
        "steps": len(steps),
        "step_beside": statistics.median(steps),
    }


class Watch:
    """Notes, on a thread, the moment at which a path appears."""

    def __init__(self, path: Path) -> None:
        self._path, self._moment = path, 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._path.exists():
            time.sleep(0.002)
        self._moment = time.perf_counter()

    def moment(self) -> float:
        """On the clock of `time.perf_counter`; waits for it."""
        self._thread.join()
        return self._moment


def _layout(groups: ParallelGroups) -> str:
    return f"TP {groups.tp.size} x PP {groups.pp.size}"


def save_once(groups: ParallelGroups, root: str, model: ModelConfig, form: Form) -> str:
    """A checkpoint to load; its folder."""
    documents = model_documents(model, "bfloat16", token_ids(None, model)) if form == "hf" else {}
    training = Training(groups, model, 1)
    state = {"config": to_dict(training.config)}
    return str(Checkpointer(root, groups, form=form).save(1, training.entries(), state, documents=documents))


def measure_load(groups: ParallelGroups, path: str, model: ModelConfig, form: Form, rounds: int) -> Reading:
    """Load a checkpoint, none of it in the page cache, into a model that holds other values."""
    entries = Training(groups, model, 2).entries()
    files = sorted(Path(path).rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e6
    seconds, disk = [], []
    rates = {direct: disk_read(files, direct=direct) for direct in (False, True)}
    direct = rates[True] > rates[False]
    for _ in range(rounds + 1):
        before = disk_read(files, direct=direct)
        drop_cache(files)
        begin = time.perf_counter()
        load_entries(path, entries, groups, complete=("",), verify=True)
        seconds.append(time.perf_counter() - begin)
        disk.append((before + disk_read(files, direct=direct)) / 2)
    loads = [size / value for value in seconds[1:]]
    ratios = [rate / limit for rate, limit in zip(loads, disk[1:], strict=True)]
    middle = [statistics.median(values) for values in (seconds[1:], loads, disk[1:], ratios)]
    return Reading(form, size, *middle)


class DiskWrite:
    """Measures the disk: a new file, flushed at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._direct = path, False
        self._block = mmap.mmap(-1, _BLOCK)
        self._block[:] = os.urandom(_BLOCK)
        self._chosen = False

    def rate(self, size: int) -> float:
        """Megabytes a second of `size` bytes; the first time both ways are tried, then the faster one."""
        if not self._chosen:
            rates = {direct: self._write(size, direct=direct) for direct in (False, True)}
            self._direct, self._chosen = rates[True] > rates[False], True
        return self._write(size, direct=self._direct)

    def _write(self, size: int, *, direct: bool) -> float:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0))
        try:
            begin = time.perf_counter()
            count = -(-size // _BLOCK)
            for _ in range(count):
                os.write(file, self._block)
            os.fsync(file)
            return count * _BLOCK / 1e6 / (time.perf_counter() - begin)
        finally:
            os.close(file)
            self._path.unlink()


def measure_disk(probe: DiskWrite, size: int, groups: ParallelGroups) -> float:
    """The disk's rate, measured by rank 0 while the others wait; 0 there."""
    barrier(groups.world)
    rate = probe.rate(size) if groups.rank == 0 else 0.0
    barrier(groups.world)
    return rate


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
    names = ("save", "first", "stall", "stall_ratio", "background", "step_alone", "step_beside", "lost")
    return replace(costs[0], **{name: max(getattr(cost, name) for cost in costs) for name in names})


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2000, help="size of a checkpoint, about (default: 2000)")
    parser.add_argument("--load-megabytes", type=float, nargs="+", help="of the checkpoints to load (default: as --megabytes)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds measured in each case (default: 4)")
    parser.add_argument("--measure", nargs="+", choices=("saves", "loads"), default=("saves", "loads"), help="default: both")
    parser.add_argument("--folder", help="where to write (default: a temporary folder, removed at the end)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    options = parser.parse_args()
    costs = report_saves(model_of(options.megabytes), options.rounds, options.folder) if "saves" in options.measure else []
    sizes = options.load_megabytes or [options.megabytes]
    readings = report_loads([model_of(size) for size in sizes], options.rounds, options.folder) if "loads" in options.measure else []
    if options.json is not None:
        content = {"megabytes": options.megabytes, "saves": [asdict(cost) for cost in costs], "loads": [asdict(one) for one in readings]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def report_saves(model: ModelConfig, rounds: int, folder: str | None) -> list[Cost]:
    """Measure all layouts and forms; a row of a table for each."""
    costs = []
    print(
        "| layout | form | MB | save, s | disk, MB/s | save / disk | stall, s | stall / save | first stall, s | background, s "
        "| step, ms | beside, ms | lost, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for tp, pp in LAYOUTS:
        for form in FORMS:
            with tempfile.TemporaryDirectory(dir=folder) as root:
                cost = slowest(run_ranks(measure_saves, root, model, form, rounds, tp=tp, pp=pp, timeout=3600))
            costs.append(cost)
            print(
                f"| {cost.layout} | {form} | {cost.megabytes:.0f} | {cost.save:.2f} | {cost.disk:.0f} | {100 * cost.ratio:.0f} % "
                f"| {cost.stall:.3f} | {100 * cost.stall_ratio:.1f} % | {cost.first:.3f} | {cost.background:.2f} "
                f"| {1e3 * cost.step_alone:.0f} | {1e3 * cost.step_beside:.0f} | {cost.lost:.2f} |",
                flush=True,
            )
    return costs


def report_loads(models: list[ModelConfig], rounds: int, folder: str | None) -> list[Reading]:
    """The same for loads."""
    readings = []
    print("\n| TP 2 x PP 2 loaded by one rank | MB | seconds | MB/s | disk, MB/s | load / disk |\n|---|---|---|---|---|---|")
    for model, form in product(models, FORMS):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            path = run_ranks(save_once, root, model, form, tp=2, pp=2, timeout=3600)[0]
            one = run_ranks(measure_load, path, model, form, rounds, tp=1, timeout=3600)[0]
        readings.append(one)
        row = f"| {form} | {one.megabytes:.0f} | {one.seconds:.2f} | {one.rate:.0f} | {one.disk:.0f} | {100 * one.ratio:.0f} % |"
        print(row, flush=True)
    return readings


if __name__ == "__main__":
    main()
