"""Collectives between the CPU ranks of one host: the project's shared-memory backend against gloo.

Example: python benchmarks/collectives.py --ranks 2 4 --json /tmp/collectives.json

Both backends live in the same processes and take turns, round by round. A round runs an operation several times in a row;
a round's time is the slowest rank's, for one operation. Shown are the median over the rounds and the best round, which
other work on the machine disturbs least, and gloo's time over ours for both. On a machine that others use, `--realtime`
(as root) keeps the cores for the ranks while they measure.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel import shm
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.utils.errors import UserError, run_command

KIB, MIB = 1 << 10, 1 << 20
SMALL_BYTES, SMALL_REPEATS = 64 * KIB, 50  # operations in a round, up to this size; larger ones in proportion
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One operation on so many bytes (of the whole tensor, for a gather or scatter)."""

    name: str
    size: int
    dtype: str = "fp32"

    def repeats(self) -> int:
        """Operations in one round."""
        return max(1, SMALL_REPEATS * SMALL_BYTES // max(self.size, SMALL_BYTES))


@dataclass(frozen=True)
class Row:
    """Microseconds of one operation on each backend."""

    name: str
    dtype: str
    size: int
    ranks: int
    shm: float
    gloo: float
    shm_best: float
    gloo_best: float


CASES = [
    Case("barrier", 0),
    *(Case("all_reduce", size) for size in (1 * KIB, 64 * KIB, 2 * MIB, 64 * MIB)),
    *(Case("all_reduce", size, "bf16") for size in (1 * MIB, 32 * MIB)),
    *(Case("reduce_scatter", size) for size in (2 * MIB, 64 * MIB)),
    *(Case("all_gather", size) for size in (2 * MIB, 64 * MIB)),
    Case("broadcast", 2 * MIB),
    *(Case("send_recv", size) for size in (1 * KIB, 2 * MIB)),
]


def operation(case: Case, group: dist.ProcessGroup) -> Callable[[], object]:
    """The call of one case; `send_recv` is there and back."""
    ranks, rank = group.size(), group.rank()
    whole = torch.ones(max(1, case.size // DTYPES[case.dtype].itemsize) // ranks * ranks or ranks, dtype=DTYPES[case.dtype])
    part = whole[: whole.numel() // ranks].clone()
    if case.name == "barrier":
        return lambda: dist.barrier(group=group)
    if case.name == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if case.name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    if case.name == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if case.name == "broadcast":
        return lambda: dist.broadcast(whole, src=0, group=group)
    return lambda: there_and_back(whole, rank, group)


def there_and_back(tensor: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Rank 0 sends to rank 1 and receives the same back; the others do nothing."""
    if rank == 0:
        dist.send(tensor, 1, group=group)
        dist.recv(tensor, 1, group=group)
    elif rank == 1:
        dist.recv(tensor, 0, group=group)
        dist.send(tensor, 0, group=group)


def measure(groups: ParallelGroups, cases: list[Case], rounds: int, realtime: bool = False) -> list[tuple[float, float, float, float]]:
    """Seconds of one operation, the slowest rank's, for each case: median of shm and of gloo, best of shm and of gloo."""
    if realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    shm.register()
    named = {name: dist.new_group(backend=name) for name in ("shm", "gloo")}
    found = []
    for case in cases:
        seconds: dict[str, list[float]] = {name: [] for name in named}
        calls = {name: operation(case, group) for name, group in named.items()}
        for number in range(rounds + 1):
            for name in named if number % 2 else reversed(named):
                dist.barrier(group=named["gloo"])
                start = time.perf_counter()
                for _ in range(case.repeats()):
                    calls[name]()
                slowest = torch.tensor([(time.perf_counter() - start) / case.repeats()], dtype=torch.float64)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=named["gloo"])
                if number:  # the first round warms up
                    seconds[name].append(slowest.item())
        found.append(tuple(of(seconds[name]) for of in (statistics.median, min) for name in ("shm", "gloo")))
    return found


def text_of(rows: list[Row]) -> str:
    """The table: microseconds, gloo's over ours, and gigabytes a second of our best round."""
    lines = [f"{'':<46}{'median of the rounds':^28}{'best round':^28}"]
    lines.append(f"{'operation':<15}{'type':>6}{'size':>9}{'ranks':>6}" + 2 * f"{'shm us':>11}{'gloo us':>11}{'ratio':>8}" + f"{'GB/s':>8}")
    for row in rows:
        size = f"{row.size // MIB} MiB" if row.size >= MIB else f"{row.size // KIB} KiB" if row.size else "-"
        times = "".join(f"{s:>11.1f}{g:>11.1f}{g / s:>7.1f}x" for s, g in ((row.shm, row.gloo), (row.shm_best, row.gloo_best)))
        rate = f"{row.size / row.shm_best / 1e3:>8.2f}" if row.size else f"{'-':>8}"
        lines.append(f"{row.name:<15}{row.dtype:>6}{size:>9}{row.ranks:>6}{times}{rate}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "python benchmarks/collectives.py --ranks 2 4 --json /tmp/collectives.json"
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default: 2 4)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each backend (default: 9)")
    parser.add_argument("--largest", type=int, default=64, metavar="MIB", help="leave out larger sizes (default: 64)")
    parser.add_argument("--realtime", action="store_true", help="give the ranks real-time priority while they measure (as root)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2 or options.rounds < 1:
        raise UserError(f"--ranks {options.ranks} --rounds {options.rounds}: needs at least 2 ranks and 1 round")
    reason = shm.why_not_here()
    if reason:
        raise UserError(f"nothing to compare, the shm backend cannot be used here: {reason}")
    cases = [case for case in CASES if case.size <= options.largest * MIB]
    rows = []
    for ranks in options.ranks:
        times = run_ranks(measure, cases, options.rounds, options.realtime, dp=ranks, timeout=1800.0)[0]
        rows += [Row(c.name, c.dtype, c.size, ranks, *(1e6 * one for one in of)) for c, of in zip(cases, times, strict=True)]
    how = ", real-time priority" if options.realtime else ""
    print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, one thread a rank{how}")
    print(text_of(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"written: {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
