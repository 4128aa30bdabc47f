"""Every part of the benchmark in order, its figures in one table and one picture: what `make bench` runs.

    python -m benchmarks.run                                  all parts, into bench_results/
    python -m benchmarks.run --parts limits train_step        some
    python -m benchmarks.run --parts train_step -- --precision bf16 --threads 1    with options for that part
    python -m benchmarks.run --keep                           all parts, but not those whose figures lie in bench_results/ already

Each part is a program of its own (`python -m benchmarks.PART --help`) that writes a JSON file; they are called one after
the other, so that nothing else runs while one measures, and their files are merged. A part or a peer that does not run
is a line that says why. The exit status is 1 when a part failed; a peer that is not installed is no failure.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.parts import comparisons_in, launch_of
from benchmarks.report import ROOT, Comparison, comparison_table, plot, stamp, stamp_lines
from megatron_llm.utils.atomic import write_json, write_text
from megatron_llm.utils.errors import UserError, run_command
from megatron_llm.utils.progress import Progress

PARTS = (
    "limits",
    "train_step",
    "train_parallel",
    "kernels",
    "collectives",
    "pipeline",
    "preprocess",
    "data_index",
    "checkpoint",
    "startup",
)


@dataclass
class Part:
    """What one part left: its comparisons, its JSON, what it printed, and why it failed where it did."""

    name: str
    comparisons: list[Comparison] = field(default_factory=list)
    document: Any = None
    printed: str = ""
    failure: str | None = None


def run_part(name: str, folder: Path, options: Sequence[str], *, keep: bool) -> Part:
    """Run one part to its end; what it prints is shown as it comes and kept in FOLDER/NAME.txt. `keep`: unless it has run."""
    if not (ROOT / "benchmarks" / f"{name}.py").exists():
        return Part(name, failure="benchmarks has no such file here")
    result, text = folder / f"{name}.json", folder / f"{name}.txt"
    if keep and result.exists() and text.exists():
        return read_part(name, json.loads(result.read_text(encoding="utf-8")), text.read_text(encoding="utf-8"))
    result.unlink(missing_ok=True)
    launch, lines = launch_of(name), []
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = launch.command(name, result.resolve(), options)
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None, "made with a pipe"
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    printed = "".join(lines)
    write_text(text, printed)
    if process.returncode != 0:
        return Part(name, printed=printed, failure=f"it ended with exit status {process.returncode}; what it said is above")
    if not result.exists():
        return Part(name, printed=printed, failure="it wrote no JSON file")
    return read_part(name, json.loads(result.read_text(encoding="utf-8")), printed)


def read_part(name: str, document: Any, printed: str) -> Part:
    """The comparisons in a part's JSON; a part whose file has none that are known did not take part, and a line says so."""
    found = comparisons_in(name, document)
    if found is None:
        return Part(name, document=document, printed=printed, failure="its file has no list of comparisons")
    return Part(name, found, document, printed)


def markdown(parts: Sequence[Part], stamped: dict[str, Any], picture: str | None) -> str:
    """The whole report."""
    compared = [one for part in parts for one in part.comparisons]
    failed = [f"- {part.name}: not run: {part.failure}" for part in parts if part.failure is not None]
    pieces = ["# Benchmark", stamp_lines(stamped)]
    if compared:
        pieces += ["## Beside the peers", "Above 1 ours is ahead, below 1 it is behind.", comparison_table(compared)]
    pieces += [f"![ratios]({picture})"] if picture else []
    pieces += ["## Not run", "\n".join(failed)] if failed else []
    for part in parts:
        if part.printed.strip():
            fenced = part.printed if part.printed.lstrip().startswith(("#", "|", "- ")) else f"```text\n{part.printed.rstrip()}\n```"
            pieces += [f"## {part.name}", fenced.strip()]
    return "\n\n".join(pieces) + "\n"


def write_results(folder: Path, parts: Sequence[Part], stamped: dict[str, Any]) -> None:
    """bench.json, bench.png and bench.md in the folder."""
    compared = [one for part in parts for one in part.comparisons]
    rows = [one.as_json() for one in compared]
    documents = {part.name: part.document if part.failure is None else {"not_run": part.failure} for part in parts}
    write_json(folder / "bench.json", {"stamp": stamped, "comparisons": rows, "parts": documents})
    title = f"{stamped['cpu']}, {stamped['cores']} cores, torch {stamped['torch']}, {stamped['commit']}"
    (folder / "bench.png").unlink(missing_ok=True)  # of an earlier run, perhaps of other parts
    drawn = plot(compared, folder / "bench.png", title)
    write_text(folder / "bench.md", markdown(parts, stamped, "bench.png" if drawn else None))


def main() -> None:
    """Run, merge, write; results so far are written after each part."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    made.add_argument("--output", type=Path, default=ROOT / "bench_results", help="folder of the results (default: bench_results)")
    made.add_argument("--keep", action="store_true", help="take the figures of parts that have run before from the folder of the results")
    made.add_argument("options", nargs="*", help="after --: options of the part, when there is only one")
    chosen = made.parse_args()
    if chosen.options and len(chosen.parts) > 1:
        raise UserError(f"options {' '.join(chosen.options)} were given for {len(chosen.parts)} parts: name the one with --parts")
    chosen.output.mkdir(parents=True, exist_ok=True)
    stamped = stamp()
    parts: list[Part] = []
    with Progress("benchmark", len(chosen.parts), unit="parts") as progress:
        for name in chosen.parts:
            print(f"\n# {name}\n", flush=True)
            parts.append(run_part(name, chosen.output, chosen.options, keep=chosen.keep))
            write_results(chosen.output, parts, stamped)
            progress.advance()
    compared = [one for part in parts for one in part.comparisons]
    if compared:
        print(f"\n# beside the peers\n\n{comparison_table(compared)}")
    print(f"\nwritten: {chosen.output / 'bench.md'}")
    failed = [part for part in parts if part.failure is not None]
    if failed:
        raise UserError("; ".join(f"{part.name} did not run: {part.failure}" for part in failed))


if __name__ == "__main__":
    run_command(main)
