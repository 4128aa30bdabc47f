"""The parts of the benchmark: how each is started, and how the figures in its JSON become comparisons.

A part that writes a list `comparisons` (benchmarks/report.py) needs nothing here but its name; for the others, whose files
hold rows of their own, there is a function that reads them.
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.report import Comparison
from benchmarks.train_step import peers_folder


def kernels(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Each operation beside eager PyTorch and, where it was measured, beside torch.compile."""
    found = []
    for row in rows:
        what = f"{row['name']}, {row['dtype']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        found += [
            Comparison("kernels", what, "ms", f"PyTorch, {kind}", row["ours"], row[kind]) for kind in ("eager", "compiled") if row.get(kind)
        ]
    return found


def collectives(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Each operation over shared memory beside gloo."""
    names = (f"{row['name']}, {row['dtype']}, {row['size']} bytes, {row['ranks']} ranks" for row in rows)
    return [Comparison("collectives", name, "us", "gloo", row["shm"], row["gloo"]) for name, row in zip(names, rows, strict=True)]


def preprocess(document: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Comparison]:
    """MB/s of ours beside each other contender; `ours-library` is ours with another library, no peer."""
    speed = {name: statistics.median(run["megabytes"] / run["seconds"] for run in runs) for name, runs in document.items() if runs}
    peers = ("megatron", "gigatoken", "datasets")
    return [
        Comparison(
            "preprocess",
            "tokens of a jsonl file",
            "MB/s",
            {"megatron": "Megatron's flow", "gigatoken": "gigatoken alone", "datasets": "datasets.map"}[name],
            speed.get("ours"),
            speed.get(name),
            lower_is_better=False,
            not_run=None if name in speed else "it is not installed here",
        )
        for name in peers
    ]


def data_index(document: Mapping[str, Any]) -> list[Comparison]:
    """Each piece of work beside megatron-core; a piece that it could not do says why."""
    return [
        Comparison("data_index", row["what"], "s", "megatron-core", row["ours"], row["core"], not_run=row.get("failure"))
        for row in document["rows"]
    ]


def checkpoint(document: Mapping[str, Any]) -> list[Comparison]:
    """Saves and loads beside the disk's own rate, MB/s; and what a background save keeps the training for, beside a save."""
    found = []

    def beside_disk(what: str, rate: float, row: Mapping[str, Any]) -> Comparison:
        return Comparison("checkpoint", what, "MB/s", "the disk", rate, row["disk"], lower_is_better=False, share=row["ratio"])

    for row in document["saves"]:
        what = f"{row['megabytes']:.0f} MB, {row['layout']}, {row['form']}"
        found.append(beside_disk(f"save {what}", row["megabytes"] / row["save"], row))
        found.append(Comparison("checkpoint", f"stall of a background save, {what}", "s", "a save that waits", row["stall"], row["save"]))
    for row in document["loads"]:
        found.append(beside_disk(f"load {row['megabytes']:.0f} MB, TP 2 x PP 2 into one rank, {row['form']}", row["rate"], row))
    return found


READERS: dict[str, Callable[[Any], list[Comparison]]] = {
    "kernels": kernels,
    "collectives": collectives,
    "preprocess": preprocess,
    "data_index": data_index,
    "checkpoint": checkpoint,
}


def comparisons_in(name: str, document: Any) -> list[Comparison] | None:
    """The comparisons in a part's file; None where there are none and no reader knows it."""
    rows = document.get("comparisons") if isinstance(document, dict) else None
    if rows is not None:
        known = {one.name for one in fields(Comparison)}
        return [Comparison(**{key: value for key, value in row.items() if key in known}) for row in rows]
    return READERS[name](document) if name in READERS else None


@dataclass(frozen=True)
class Launch:
    """How a part is started: its interpreter and options of its own."""

    python: str = sys.executable
    options: tuple[str, ...] = ()

    def command(self, name: str, result: Path, more: Sequence[str]) -> list[str]:
        """The whole command; `result` is where the JSON goes."""
        return [self.python, "-m", f"benchmarks.{name}", "--json", str(result), *self.options, *more]


def launch_of(name: str) -> Launch:
    """How to start a part here: two of them need megatron-core, which may be in the peers' environment only."""
    peer = peers_folder() / "megatron-core" / "bin" / "python"
    if name == "preprocess" and peer.exists():
        return Launch(options=("--peer-python", str(peer)))
    if name == "data_index":
        beside = importlib.util.find_spec("megatron") is not None
        return Launch(python=sys.executable if beside or not peer.exists() else str(peer))
    return Launch()
