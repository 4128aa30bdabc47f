"""What indices of samples, blends and reading samples cost here and in megatron-core, on the same data.

example:
  python benchmarks/data_index.py --parts index blend reads --repeats 5

Both sides do the same work in turn, A B A B; shown are the medians of the wall time and of the processor time, and the
ratios. Results are compared, and a difference is an error. Needs megatron-core (requirements/test-no-deps.txt).

`large` is one epoch of a corpus of 100 million documents, once, each side in a process of its own: about a minute, 4 GB of
memory and 2 GB of disk. What a side cannot do is a row that says why.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.config.schema import DataConfig
from megatron_llm.data.blend import BlendedDataset
from megatron_llm.data.build import SampleCounts, build_datasets
from megatron_llm.data.index_backend import load_backend
from megatron_llm.data.index_cache import IndexCache
from megatron_llm.data.indexed_writer import write_indexed_dataset
from megatron_llm.data.sample_index import EpochPlan, build_sample_index, plan_epochs

PARTS = ("index", "blend", "reads", "large")
SEED, CORPORA, EOD = 1234, 16, 0
PIECE = 1 << 20  # documents looked at together
RESETS = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}


@dataclass(frozen=True)
class Row:
    """Medians in seconds (wall time, processor time) of both sides, and the memory at its peak in bytes where it was measured.

    Where megatron-core could not do the work its figures are None, and `failure` says why.
    """

    what: str
    ours: float
    core: float | None
    ours_cpu: float
    core_cpu: float | None
    ours_peak: int | None = None
    core_peak: int | None = None
    failure: str | None = None

    def table(self) -> str:
        """One row of the table."""
        cells = [self.what, _short(self.ours), _short(self.core), _ratio(self.core, self.ours)]
        cells += [_short(self.ours_cpu), _short(self.core_cpu), _ratio(self.core_cpu, self.ours_cpu)]
        peaks = " / ".join(f"{peak / 1e9:.2f}" if peak else "-" for peak in (self.ours_peak, self.core_peak))
        cells += [peaks if self.ours_peak else "", self.failure or ""]
        return f"| {' | '.join(cells)} |"


_COLUMNS = ("work", "here", "megatron-core", "ratio", "CPU here", "CPU core", "ratio", "peak GB here / core", "not run")
HEADER = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


def _short(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e6 * seconds:.0f} us" if seconds < 0.001 else f"{seconds:.3f} s"


def _ratio(core: float | None, ours: float) -> str:
    return f"{core / ours:.1f}" if core is not None else "-"


def in_turn(what: str, ours: Callable[[], Any], core: Callable[[], Any], repeats: int, *, share: int = 1) -> Row:
    """The medians of both, called in turn after one call each; times are divided by `share` (units of work in a call)."""
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(repeats + 1):
        for side, work in enumerate((ours, core)):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if repeat:
                times[side].append(((time.perf_counter() - wall) / share, (time.process_time() - cpu) / share))
    (our_wall, our_cpu), (core_wall, core_cpu) = ((statistics.median(kind) for kind in zip(*side, strict=True)) for side in times)
    return Row(what, our_wall, core_wall, our_cpu, core_cpu)


def core_parts() -> SimpleNamespace:
    """The modules of megatron-core; ImportError without it."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron.core.datasets import blended_dataset, blended_megatron_dataset_builder, gpt_dataset, helpers

    return SimpleNamespace(gpt=gpt_dataset, helpers=helpers, builder=blended_megatron_dataset_builder, blended=blended_dataset)


def document_lengths(documents: int) -> NDArray[np.int32]:
    """Lengths of documents in tokens, about 600 each: most are short, some are very long."""
    random, lengths = np.random.default_rng(0), np.empty(documents, np.int32)
    for start in range(0, documents, PIECE):  # as floating-point numbers a hundred million would take many times their room
        piece = lengths[start : start + PIECE]
        piece[:] = np.clip(random.lognormal(6.0, 0.9, len(piece)), 1, 100_000)
    return lengths


def our_index(lengths: NDArray[np.int32], plan: EpochPlan, folder: Path) -> Any:
    """Build the three arrays into a cache and map them."""
    backend = load_backend()

    def build() -> Any:
        return build_sample_index(lengths, range(len(lengths)), plan, seed=SEED, backend=backend)

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        return IndexCache(Path(cache), say=lambda _: None).get("corpus", {}, build)


def core_index(parts: SimpleNamespace, lengths: NDArray[np.int32], plan: EpochPlan, folder: Path) -> list[NDArray[Any]]:
    """What GPTDataset does between knowing the lengths and having the three arrays mapped, with its own functions."""
    random = np.random.RandomState(SEED)
    once = np.arange(len(lengths), dtype=np.int32)
    documents = parts.gpt._build_document_index(once, plan.epochs, random, plan.separate_last_epoch)
    args = (plan.seq_length, plan.epochs, plan.tokens_per_epoch, True, True)
    samples = parts.helpers.build_sample_idx(lengths.copy(), documents, *args)
    shuffle = parts.gpt._build_shuffle_index(plan.samples, plan.samples, random)
    mapped = []
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        for number, array in enumerate((documents, samples, shuffle)):
            np.save(Path(cache) / f"{number}.npy", array, allow_pickle=True)
            mapped.append(np.load(Path(cache) / f"{number}.npy", allow_pickle=True, mmap_mode="r"))
    return mapped


def index_rows(parts: SimpleNamespace, documents: int, epochs: int, seq_length: int, repeats: int, folder: Path) -> list[Row]:
    """The index of one corpus."""
    lengths = document_lengths(documents)
    tokens = int(lengths.sum(dtype=np.int64))
    plan = plan_epochs(tokens, seq_length, (epochs * tokens - 1) // seq_length)
    ours = our_index(lengths, plan, folder)
    for name, theirs in zip(("document_index", "sample_index", "shuffle_index"), core_index(parts, lengths, plan, folder), strict=True):
        same(name, ours[name], theirs)
    what = f"index of {documents:,} documents, {epochs} epochs, {plan.samples:,} samples of {seq_length}, written and mapped"
    return [in_turn(what, lambda: our_index(lengths, plan, folder), lambda: core_index(parts, lengths, plan, folder), repeats)]


class _Sized:
    """As many samples as asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def blend_rows(parts: SimpleNamespace, samples: int, repeats: int) -> list[Row]:
    """A blend of corpora of uneven weights, from the weights to arrays that were checked against the corpora's sizes."""
    raw = np.random.default_rng(0).random(CORPORA)
    weights = raw / raw.sum()
    datasets = [_Sized(samples)] * CORPORA
    backend = load_backend()
    found: dict[str, Any] = {}

    def ours() -> None:
        found.pop("ours", None)  # a blend of 160 million samples takes 1.6 GB
        arrays = dict(zip(("dataset_index", "sample_index"), backend.blend_index(weights, samples), strict=True))
        found["ours"] = BlendedDataset(datasets, arrays).index  # type: ignore[arg-type]

    def core() -> None:
        found.pop("core", None)
        blended = parts.blended.BlendedDataset.__new__(parts.blended.BlendedDataset)
        blended.datasets, blended.weights, blended.size = datasets, weights.tolist(), samples
        blended.split = SimpleNamespace(name="train")
        blended.config = SimpleNamespace(defer_npy_index_mmap=False, path_to_cache=None, fast_cache_load=False)
        found["core"] = blended._build_indices()

    row = in_turn(f"blend of {CORPORA} corpora, {samples:,} samples", ours, core, repeats)
    same("dataset_index", found["ours"]["dataset_index"], found["core"][0])
    same("sample_index", found["ours"]["sample_index"], found["core"][1])
    return [row]


class _Tokenizer:
    """What megatron-core's datasets ask of a tokenizer."""

    vocab_size, eod = 50_000, EOD
    unique_identifiers = {"class": "benchmark"}  # noqa: RUF012


def reads_rows(parts: SimpleNamespace, seq_length: int, reads: int, repeats: int, folder: Path) -> list[Row]:
    """Random samples of one corpus that is in memory."""
    random = np.random.default_rng(0)
    documents = [np.append(random.integers(1, 50_000, length), EOD) for length in document_lengths(20_000).tolist()]
    prefix = str(folder / "corpus")
    write_indexed_dataset(prefix, documents, 50_000)
    rows = []
    for what, options, count in (("default options", {}, reads), ("resets and eod_mask_loss", RESETS, max(1, reads // 40))):
        ours, core = open_corpus(parts, prefix, seq_length, options)
        assert len(ours) == len(core), "the datasets differ in length"
        numbers = random.integers(0, len(core), count).tolist()
        for number in numbers[:20]:
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                same(name, getattr(ours[number], name), core[number][name].numpy())
        for number in np.unique(numbers).tolist():
            ours.text(number)  # the corpus is read once before it is timed

        def read(dataset: Any, chosen: Sequence[int] = numbers) -> None:
            for number in chosen:
                dataset[number]

        label = f"a random sample of {seq_length} tokens, {what}"
        rows.append(in_turn(label, lambda a=ours, r=read: r(a), lambda b=core, r=read: r(b), repeats, share=count))  # type: ignore[misc]
    return rows


def open_corpus(parts: SimpleNamespace, prefix: str, seq_length: int, options: dict[str, bool]) -> tuple[Any, Any]:
    """The same corpus as a dataset of this project and as megatron-core's."""
    config = DataConfig(data_path=[prefix], split="100,0,0", **options)  # type: ignore[arg-type]
    ours = build_datasets(config, SampleCounts(None), seq_length=seq_length, seed=SEED, eod_id=EOD, say=lambda _: None).train
    values = dict.fromkeys(RESETS, False) | options
    core_config = parts.gpt.GPTDatasetConfig(
        blend=([prefix], None), split="100,0,0", tokenizer=_Tokenizer(), random_seed=SEED, sequence_length=seq_length, **values
    )
    builder = parts.builder.BlendedMegatronDatasetBuilder(parts.gpt.GPTDataset, [None, 0, 0], lambda: True, core_config)
    return ours, builder.build()[0]


@dataclass(frozen=True)
class _Large:
    """What one side of the large index took, and a digest of each of its arrays (of their numbers, whatever their type)."""

    wall: float
    cpu: float
    peak: int
    digests: dict[str, str]


def large_rows(documents: int, seq_length: int, folder: Path) -> list[Row]:
    """One epoch of a large corpus, each side in a process of its own for its memory; once, for it takes long."""
    ours = _alone("ours", documents, seq_length, folder)
    what = f"index of {documents:,} documents, 1 epoch, written and mapped; memory without the lengths"
    try:
        core = _alone("core", documents, seq_length, folder)
    except (MemoryError, OverflowError, BrokenProcessPool) as error:
        failure = f"megatron-core ended with {type(error).__name__}: {error}"
        return [Row(what, ours.wall, None, ours.cpu, None, ours.peak, failure=failure)]
    for name, digest in ours.digests.items():
        if core.digests[name] != digest:
            raise SystemExit(f"error: {name} of {documents:,} documents differs from megatron-core's")
    return [Row(what, ours.wall, core.wall, ours.cpu, core.cpu, ours.peak, core.peak)]


def _alone(side: str, documents: int, seq_length: int, folder: Path) -> _Large:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_large, side, documents, seq_length, str(folder)).result()


def _large(side: str, documents: int, seq_length: int, folder: str) -> _Large:
    parts = core_parts()
    lengths = document_lengths(documents)
    plan = plan_epochs(int(lengths.sum(dtype=np.int64)), seq_length, None)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    before = _memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    if side == "ours":
        arrays: Mapping[str, NDArray[Any]] = our_index(lengths, plan, Path(folder))
    else:
        names = ("document_index", "sample_index", "shuffle_index")
        arrays = dict(zip(names, core_index(parts, lengths, plan, Path(folder)), strict=True))
    wall, cpu, peak = time.perf_counter() - wall, time.process_time() - cpu, _memory("VmHWM") - before
    return _Large(wall, cpu, peak, {name: _digest(array) for name, array in arrays.items()})


def _digest(array: NDArray[Any]) -> str:
    """SHA-256 of the numbers of an array as 64-bit ones."""
    digest, flat = hashlib.sha256(), array.reshape(-1)
    for start in range(0, flat.size, PIECE):
        digest.update(flat[start : start + PIECE].astype(np.int64).data)
    return digest.hexdigest()


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None, "this system has no /proc"
    return int(match[1]) * 1024


def same(name: str, ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    """Nothing when the arrays are equal, else an error."""
    if not np.array_equal(ours, theirs):
        raise SystemExit(f"error: {name} differs from megatron-core's")


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the index (default: 10 million)")
    parser.add_argument("--epochs", type=int, default=3, help="of the index (default: 3)")
    parser.add_argument("--large-documents", type=int, default=100_000_000, help="of the large index (default: 100 million)")
    parser.add_argument("--blend-samples", type=int, default=10_000_000, help="of each of the 16 corpora, about (default: 10 million)")
    parser.add_argument("--reads", type=int, default=2000, help="samples read in one repeat (default: 2000)")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5, help="of each, after one that warms up (default: 5)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder, removed at the end)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    parts, rows = core_parts(), []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "index" in options.parts:
            rows += index_rows(parts, options.documents, options.epochs, options.seq_length, options.repeats, folder)
        if "blend" in options.parts:
            rows += blend_rows(parts, CORPORA * options.blend_samples, options.repeats)
        if "reads" in options.parts:
            rows += reads_rows(parts, options.seq_length, options.reads, options.repeats, folder)
        if "large" in options.parts:
            rows += large_rows(options.large_documents, options.seq_length, folder)
    backend = load_backend()
    print(f"{backend.describe()}, {backend.threads} thread(s)\n\n{HEADER}")
    for row in rows:
        print(row.table())
    if options.json is not None:
        document = {"backend": backend.name, "threads": backend.threads, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
