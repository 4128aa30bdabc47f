"""One training step in one process: the project beside `transformers` and `litgpt`, taking turns on the same work.

    python -m benchmarks.train_step --precision bf16 --threads 1 --json step.json

The work is benchmarks/workload.py: a LLaMA of 58 million parameters, 2,048 tokens, AdamW, gradient clipping. Every
configuration of a peer first runs alone for a few steps; the fastest of each peer and precision then takes turns with
ours, a step each, and the medians of those steps are compared. So does the machine's matrix peak, of which the shares are
(benchmarks/at_peak.py). Peers' environments: benchmarks/peers/install.sh.
"""

import argparse
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.programs import Program, Series, interleave
from benchmarks.report import Comparison, comparison_table, number, save, table
from benchmarks.workload import Workload

# Our configurations by name: flags of tools/pretrain.py beyond the workload's own. A new option is one line here.
OURS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compiled": ("--compile",),
}
# What a peer may do its arithmetic in, where ours does it in fp32 or in bf16 with fp32 main weights.
PRECISIONS = {"fp32": ("fp32",), "bf16": ("bf16", "autocast")}
AT_PEAK = "benchmarks.at_peak"
HEADS = ("program", "median, s", "min, s", "processor, s", "tokens/s", "GFLOP/s", "of peak", "times best peer", "GiB", "first losses")
WORDS = {"fp32": "fp32", "bf16": "bf16 weights alone", "autocast": "bf16 autocast, fp32 weights"}


def peers_folder() -> Path:
    """Where benchmarks/peers/install.sh puts the peers' environments."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEERS_DIR") or Path(cache) / "megatron_llm-bench")


def ours(precision: str, threads: int, variants: Iterable[tuple[str, Sequence[str]]], **more: Any) -> list[Program]:
    """The project's own programs."""
    kind = ["--bf16"] if precision == "bf16" else []
    return [
        Program(f"ours, {name}", sys.executable, "benchmarks.ours", {"threads": threads, "flags": [*kind, *flags]}, role="ours", **more)
        for name, flags in variants
    ]


def at_peak(precision: str, threads: int) -> Program:
    """The machine's matrix peak, in turns with the others."""
    settings = {"threads": threads, "precision": precision}
    return Program("matrix products alone", sys.executable, AT_PEAK, settings, role="beside")


def peak_of(found: Sequence[Series]) -> float | None:
    """FLOP/s of the machine's matrix peak in the rounds of the others, by its median turn; None when it did not run."""
    return next((series.about["flops"] / series.median for series in found if series.program.module == AT_PEAK and series.seconds), None)


def peer_configurations(precision: str, threads: int, folder: Path, *, everything: bool) -> dict[str, list[Program]]:
    """The configurations of each peer and kind of precision that are tried; `everything` adds those that rarely win."""
    groups: dict[str, list[Program]] = {}
    for kind, compiled in itertools.product(PRECISIONS[precision], (True, False)):
        base = {"threads": threads, "precision": kind, "compile": compiled, "optimizer": "fused"}
        words = "compiled" if compiled else "eager"
        for attention in ("sdpa", "eager") if everything else ("sdpa",):
            name = f"transformers, {words}, {attention}, {WORDS[kind]}"
            python = str(folder / "transformers" / "bin" / "python")
            program = Program(name, python, "benchmarks.peers.transformers_llama", {**base, "attention": attention})
            groups.setdefault(f"transformers, {WORDS[kind]}", []).append(program)
        for loss in ("plain", "chunked") if everything else ("plain",):
            name = f"litgpt, {words}, {loss} loss, {WORDS[kind]}"
            python = str(folder / "litgpt" / "bin" / "python")
            program = Program(name, python, "benchmarks.peers.litgpt_model", {**base, "loss": loss})
            groups.setdefault(f"litgpt, {WORDS[kind]}", []).append(program)
    return groups


def qualify(groups: dict[str, list[Program]], work: Workload, folder: Path, steps: int) -> list[Series]:
    """Each configuration alone for a few steps. One a peer and precision goes on: the fastest, or the failure when none ran."""
    best = []
    for name, programs in groups.items():
        tried = [interleave([program], work, rounds=steps, warmup=2, folder=folder, say=say)[0] for program in programs]
        for series in tried:
            say(f"{series.program.name}: {number(series.best)} s" if series.failure is None else f"{name}: {series.failure}")
        best.append(min(tried, key=lambda series: series.best))
    return best


def compare(
    mine: Sequence[Program], groups: dict[str, list[Program]], work: Workload, folder: Path, *, steps: int, rounds: int
) -> list[Series]:
    """Ours and the best configuration of each peer, taking turns; the peers that did not run come last."""
    chosen = qualify(groups, work, folder, steps)
    programs = [*mine, *(series.program for series in chosen if series.failure is None)]
    ran = interleave(programs, work, rounds=rounds, warmup=3, folder=folder, say=say)
    found = [*ran, *(series for series in chosen if series.failure is not None)]
    require_equal_models(found, work)
    return found


def comparisons(part: str, what: str, found: Sequence[Series], work: Workload) -> list[Comparison]:
    """Our fastest beside each peer, and beside what else of ours is the work in another way."""
    mine, peak = min((series for series in found if series.program.role == "ours"), key=lambda series: series.median), peak_of(found)
    share = work.flops / mine.median / peak if peak and mine.seconds else None
    return [
        Comparison(
            part=part,
            what=f"{what} ({mine.program.name})",
            unit="s a step",
            peer=series.program.name,
            ours=mine.median if mine.seconds else None,
            theirs=series.median if series.seconds else None,
            share=share,
            not_run=series.failure or mine.failure,
        )
        for series in found
        if series.program.role != "ours" and series.program.module != AT_PEAK
    ]


def series_table(found: Sequence[Series], work: Workload) -> str:
    """Every program: median, fastest, processor time, speed, share of the peak, memory, losses."""
    peak = peak_of(found)
    best = min((series.median for series in found if series.program.role == "peer"), default=float("inf"))
    rows = []
    for series in found:
        if series.failure is not None:
            rows.append([series.program.name, f"not run: {series.failure}", *[""] * 8])
            continue
        rate = series.about.get("flops", work.flops) / series.median
        losses = ", ".join(f"{loss:.2f}" for loss in series.first_losses if loss is not None)
        cells = [series.median, min(series.seconds), min(series.cpu), work.tokens / series.median, rate / 1e9]
        rows.append([series.program.name, *map(number, cells), f"{rate / peak:.0%}" if peak else "-"])
        rows[-1] += [number(best / series.median), number((series.peak_memory or 0) / 2**30), losses]
    return table(HEADS, rows)


def require_equal_models(found: Sequence[Series], work: Workload) -> None:
    """ValueError when a program built a model of another size: its times would mean nothing."""
    for series in found:
        count = series.about.get("parameters", work.parameters)
        if count != work.parameters:
            raise ValueError(f"{series.program.name} has {count:,} parameters, the workload {work.parameters:,}")


def say(line: str) -> None:
    """How far the benchmark is, on standard error, so that the tables stay clean."""
    print(line, file=sys.stderr, flush=True)


def add_common(made: argparse.ArgumentParser) -> None:
    """Options of every benchmark of training steps."""
    made.add_argument("--rounds", type=int, default=5, help="measured steps of each program (default: 5)")
    made.add_argument("--steps", type=int, default=2, help="steps that choose a peer's configuration (default: 2)")
    made.add_argument("--ours", action="append", metavar="FLAGS", help="flags of tools/pretrain.py for a program of ours; may be repeated")
    made.add_argument("--peers-dir", type=Path, default=peers_folder(), help="environments of the peers")
    made.add_argument("--no-peers", action="store_true", help="ours alone")
    made.add_argument("--work", default="{}", metavar="JSON", help="other sizes, for example '{\"layers\": 2}'")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each precision and number of threads."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS), help="default: both")
    made.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="threads of a process (default: 1 2)")
    made.add_argument("--everything", action="store_true", help="try configurations of peers that rarely win")
    add_common(made)
    options = made.parse_args(argv)
    work = Workload.from_json(options.work)
    variants = [(flags or "no flags", shlex.split(flags)) for flags in options.ours] if options.ours else list(OURS.items())
    compared: list[Comparison] = []
    measured = []
    for precision, threads in itertools.product(options.precision, options.threads):
        what = f"training step, {precision}, {threads} thread{'s' if threads > 1 else ''}"
        peers = {} if options.no_peers else peer_configurations(precision, threads, options.peers_dir, everything=options.everything)
        mine = [*ours(precision, threads, variants), at_peak(precision, threads)]
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = compare(mine, peers, work, Path(folder), steps=options.steps, rounds=options.rounds)
        compared += comparisons("train_step", what, found, work)
        measured.append(report(what, found, work))
    print(f"\n{comparison_table(compared)}")
    if options.json is not None:
        save(options.json, "train_step", compared, measured=measured)


def report(what: str, found: Sequence[Series], work: Workload) -> dict[str, Any]:
    """Print the table of one case, and give what the JSON file holds of it."""
    peak = peak_of(found)
    moment = next((series.about["fastest_flops_per_s"] for series in found if series.program.module == AT_PEAK and series.about), 0.0)
    words = f"peak {number(peak and peak / 1e9)} GFLOP/s in the same rounds and {number(moment / 1e9)} at its best moment before"
    print(f"\n### {what}; {words}, {work.flops / 1e9:.0f} GFLOP a step\n")
    print(series_table(found, work), flush=True)
    return {
        "what": what,
        "peak_flops": peak,
        "peak_flops_at_best": moment,
        "step_flops": work.flops,
        "series": [series.as_json() for series in found],
    }


if __name__ == "__main__":
    main()
