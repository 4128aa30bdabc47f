"""One training step over two processes: the project beside megatron-core and DeepSpeed, taking turns on the same work.

    python -m benchmarks.train_parallel --layout tp2 --json parallel.json

The work is benchmarks/workload.py in bf16 with fp32 main weights, one thread a process, 2,048 tokens a step in all:

    tp2   each layer split over the processes; with sequence parallelism as well
    dp2   half of the batch each; the peers with and without their sharded optimizers
    pp2   half of the layers each, micro-batches of two sequences

Our step in one process with two threads takes turns with the first two. megatron-core runs on the CPU through
benchmarks/peers/cuda_on_cpu.py, over gloo. Each peer's fastest configuration takes turns with ours.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.programs import Program
from benchmarks.report import Comparison, comparison_table, save
from benchmarks.train_step import add_common, at_peak, compare, comparisons, report
from benchmarks.workload import Workload

RANKS = 2
# Our configurations by layout and name: flags of tools/pretrain.py. A new option is one line here.
OURS: dict[str, dict[str, tuple[str, ...]]] = {
    "tp2": {
        "TP2": ("--tensor-model-parallel-size", "2"),
        "TP2 + SP": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    },
    "dp2": {"DP2": ()},
    "pp2": {
        "PP2": ("--pipeline-model-parallel-size", "2"),
        "PP2, 2 layers last": ("--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "2"),
    },
}
# What megatron-core and DeepSpeed are tried with.
MEGATRON: dict[str, dict[str, dict[str, Any]]] = {
    "tp2": {"TP2": {"tp": 2}, "TP2, fused": {"tp": 2, "fused": True}, "TP2 + SP": {"tp": 2, "sequence_parallel": True}},
    "dp2": {
        "DP2": {},
        "DP2, distributed optimizer": {"distributed_optimizer": True},
        "DP2, distributed optimizer, overlap": {"distributed_optimizer": True, "overlap": True},
        "DP2, fused": {"fused": True},
    },
    "pp2": {"PP2": {"pp": 2}, "PP2, fused": {"pp": 2, "fused": True}, "PP2, 2 layers last": {"pp": 2, "last_layers": 2}},
}
DEEPSPEED: dict[str, dict[str, dict[str, Any]]] = {
    "tp2": {},
    "dp2": {"ZeRO-1": {}, "ZeRO-1, overlap": {"overlap": True}, "ZeRO-1, compiled": {"compile": True}},
    "pp2": {},
}
SPLIT_EVENLY = ("tp2", "dp2")  # where no rank waits by design, as in a pipeline
MICRO = {"tp2": 8, "dp2": 4, "pp2": 2}


def ours(layout: str, extra: Sequence[str]) -> list[Program]:
    """The project's programs of a layout; `extra` flags are strings for one more variant each, beside the plain one."""
    made = []
    for (name, flags), more in ((pair, more) for pair in OURS[layout].items() for more in (extra or ("",))):
        settings = {"threads": 1, "flags": ["--bf16", *flags, *shlex.split(more)]}
        made.append(
            Program(f"ours, {name}{' ' + more if more else ''}", sys.executable, "benchmarks.ours", settings, ranks=RANKS, role="ours")
        )
    return made


def one_process(work: Workload) -> Program:
    """The same step in one process with a thread for each rank, which two processes should come near."""
    settings = {"threads": RANKS, "flags": ["--bf16"], "micro": work.sequences}
    return Program("ours, one process of 2 threads", sys.executable, "benchmarks.ours", settings, role="beside")


def peers(layout: str, folder: Path) -> dict[str, list[Program]]:
    """The configurations of each peer."""
    base = {"threads": 1, "precision": "bf16"}
    kinds = (("megatron-core", "megatron_core_gpt", MEGATRON), ("deepspeed", "deepspeed_zero", DEEPSPEED))
    return {
        peer: [
            Program(f"{peer}, {name}", str(folder / peer / "bin" / "python"), f"benchmarks.peers.{module}", {**base, **more}, ranks=RANKS)
            for name, more in configurations[layout].items()
        ]
        for peer, module, configurations in kinds
        if configurations[layout]
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each layout."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layout", nargs="+", choices=tuple(OURS), default=list(OURS), help="default: all")
    add_common(made)
    options = made.parse_args(argv)
    whole = Workload.from_json(options.work)
    compared: list[Comparison] = []
    measured = []
    for layout in options.layout:
        work = replace(whole, micro=min(MICRO[layout], whole.sequences))
        what = f"training step, bf16, {layout.upper()}, {RANKS} processes of 1 thread"
        mine = [*ours(layout, options.ours or ()), at_peak("bf16", RANKS)]
        if layout in SPLIT_EVENLY:
            mine.append(one_process(work))
        groups: dict[str, list[Program]] = {} if options.no_peers else peers(layout, options.peers_dir)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = compare(mine, groups, work, Path(folder), steps=options.steps, rounds=options.rounds)
        compared += comparisons("train_parallel", what, found, work)
        measured.append(report(what, found, work))
    print(f"\n{comparison_table(compared)}")
    if options.json is not None:
        save(options.json, "train_parallel", compared, measured=measured)


if __name__ == "__main__":
    main()
