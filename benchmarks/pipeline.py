"""What pipeline schedules cost: a stage's forward, its two halves of a backward, and the step that follows from them.

    python -m benchmarks.pipeline --stages 4 --micro-batches 8 --plot pipeline.png
    python -m benchmarks.pipeline --run 2

Each stage's forward (F), input's gradient (B) and weights' gradients (W) are timed alone on one thread of this machine, on
the model of the training benchmark, and the transfer between two processes. The simulator plays 1F1B, interleaved 1F1B and
ZB-H1 with these times: for the stages as they are (the first has the embedding, the last the output layer and the loss), and
for equal stages of layers alone beside the published formulas of the idle time of a stage: (p-1)(F+B+W) for
1F1B, that over the chunks a rank for interleaved, (p-1)(F+B-W) for ZB-H1 (Qi et al. 2023, arXiv:2401.10241).

With --run the same schedules also train on that many ranks, in turns: seconds of forward and backward of one step, and the
step that the simulator makes of the durations measured within it. Ranks need a core each: with fewer, a wait costs nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import configuration, micro_batches
from benchmarks.report import Comparison, stamp, stamp_lines
from benchmarks.workload import Workload
from megatron_llm.kernels.dispatch import select_kernels
from megatron_llm.models.causal_lm import ModelChunk, ModelOptions, build_chunks
from megatron_llm.models.inputs import MicroBatch
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.comm import barrier
from megatron_llm.parallel.executor import PipelineExecutor
from megatron_llm.parallel.groups import Group, ParallelGroups, single_process_groups
from megatron_llm.parallel.p2p import Mailbox
from megatron_llm.parallel.schedules import make_schedule
from megatron_llm.parallel.simulator import Costs, Simulation, Span, measured_costs, simulate
from megatron_llm.parallel.timeline import Panel, draw_panels, measured_panel, simulated_panel
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine, model_dtype
from megatron_llm.utils.atomic import write_json
from megatron_llm.utils.errors import UserError, run_command

SCHEDULES = {"1f1b": 1, "interleaved": 2, "zero-bubble": 1}  # chunks a rank


@dataclass(frozen=True)
class Measured:
    """Seconds of one virtual stage; `whole` is a backward that is not split."""

    forward: float
    backward_input: float
    backward_weight: float
    whole: float


def stage_chunks(work: Workload, flags: Sequence[str], virtual_stages: int) -> list[ModelChunk]:
    """Every virtual stage's chunk, all in this process."""
    config, alone, chunks = configuration(work, flags, 1), single_process_groups(), []
    kernels = select_kernels(config.train.kernels, alone.device)  # type: ignore[arg-type]
    options = ModelOptions(seed=work.seed, dtype=model_dtype(config))
    for stage in range(virtual_stages):
        groups = replace(alone, pp=Group(ranks=tuple(range(virtual_stages)), rank=stage))
        chunks += build_chunks(get_family(config.model.model), config.model, groups, kernels, options)
    return chunks


def time_chunk(chunk: ModelChunk, batch: MicroBatch, hidden: Tensor, *, split: bool) -> list[float]:
    """Seconds of one forward, one backward and, where split, the weights' gradients."""
    chunk.context.deferred.enabled = split
    source = None if chunk.embedding is not None else hidden.detach().requires_grad_()
    moments = [time.perf_counter()]
    output = chunk(batch, source)
    moments.append(time.perf_counter())
    gradient = None if chunk.head is not None else torch.full_like(output, 1e-3)
    if split:
        with chunk.context.deferred.collect(0):
            torch.autograd.backward([output], None if gradient is None else [gradient])
        moments.append(time.perf_counter())
        chunk.context.deferred.run(0)
    else:
        torch.autograd.backward([output], None if gradient is None else [gradient])
    moments.append(time.perf_counter())
    return [end - start for start, end in zip(moments, moments[1:], strict=False)]


def measure_stages(work: Workload, flags: Sequence[str], virtual_stages: Sequence[int], rounds: int) -> list[list[Measured]]:
    """The fastest of the rounds, for each number of virtual stages: what else runs on a machine only adds.

    Each round takes every stage of every number, split and whole, in turn; the first warms up.
    """
    (batch, *_) = micro_batches(work, single_process_groups())
    micro = MicroBatch(batch, torch.tensor(1.0 / work.length))
    models = [stage_chunks(work, flags, count) for count in virtual_stages]
    hidden = torch.randn(work.length, work.micro, work.hidden).to(next(models[0][0].parameters()).dtype)
    found: list[list[list[list[float]]]] = [[[] for _ in chunks] for chunks in models]
    for _ in range(rounds + 1):
        for chunks, per_chunk in zip(models, found, strict=True):
            for chunk, times in zip(chunks, per_chunk, strict=True):
                whole = time_chunk(chunk, micro, hidden, split=False)
                times.append([*time_chunk(chunk, micro, hidden, split=True), whole[1]])
    return [[Measured(*map(min, zip(*times[1:], strict=True))) for times in per_chunk] for per_chunk in found]


def ping(groups: ParallelGroups, shape: tuple[int, ...], dtype: torch.dtype, times: int) -> float:
    """Median seconds of half a round trip of a tensor between two stages."""
    mailbox, tensor, seconds = Mailbox(groups.pp, groups.device), torch.zeros(shape, dtype=dtype), []
    for number in range(times):
        barrier(groups.pp)
        start = time.perf_counter()
        for sender in (0, 1):
            if groups.pp.rank == sender:
                mailbox.post_send(tensor, 1 - sender, "there and back", 2 * number + sender)
            else:
                mailbox.post_receive(shape, dtype, sender, 2 * number + sender).take()
        mailbox.finish()
        seconds.append((time.perf_counter() - start) / 2)
    return statistics.median(seconds)


def equal_stages(measured: Sequence[Measured], chunks: Sequence[int]) -> dict[int, list[Measured]]:
    """Stages that all are as the cheapest one; over several chunks a rank, evenly."""
    least = asdict(min(measured, key=lambda one: one.forward + one.whole))
    return {count: [Measured(**{what: seconds / count for what, seconds in least.items()})] * (len(measured) * count) for count in chunks}


def play(measured: dict[int, list[Measured]], stages: int, micros: int, transfer: float) -> dict[str, Simulation]:
    """Every schedule, simulated with the times of its virtual stages: each with the backward that it runs, whole or split."""
    played = {}
    for name, chunks in SCHEDULES.items():
        if chunks not in measured:
            continue
        halves = [(one.backward_input, one.backward_weight) if name == "zero-bubble" else (one.whole, 0.0) for one in measured[chunks]]
        costs = [Costs(one.forward, *half, transfer) for one, half in zip(measured[chunks], halves, strict=True)]
        played[name] = simulate(make_schedule(name, stages, micros, chunks), micros, chunks, costs)
    return played


def idle_by_formula(name: str, stages: int, one: Measured) -> float:
    """Seconds that a stage of equal stages waits in a step, by the papers; `one` is of all chunks of a rank."""
    if name == "zero-bubble":
        return (stages - 1) * (one.forward + one.backward_input - one.backward_weight)
    return (stages - 1) * (one.forward + one.whole) / SCHEDULES[name]


def table(played: dict[str, Simulation], formula: Callable[[str], float] | None) -> list[str]:
    """A row for each schedule."""
    rows = [
        "| schedule | step, s | idle | times 1F1B | idle of a stage, s | by the formula, s | live micro-batches |",
        "|---|" + "---:|" * 6,
    ]
    for name, one in played.items():
        idle, count = one.ticks - max(one.busy), max(one.peak_activations)
        ratio, published = played["1f1b"].ticks / one.ticks, "" if formula is None else f"{formula(name):.3f}"
        live = f"{count}" if SCHEDULES[name] == 1 else f"{count} of half the layers"
        rows.append(f"| {name} | {one.ticks:.3f} | {one.bubble:.1%} | {ratio:.2f} | {idle:.3f} | {published} | {live} |")
    return rows


def train_in_turns(
    groups: ParallelGroups, work: Workload, flags: Sequence[str], rounds: int
) -> dict[str, tuple[list[float], list[list[Span]]]]:
    """Seconds of forward and backward of each round's step, and what was recorded in it, of every schedule that fits."""
    torch.set_num_threads(1)
    layout, engines, executors = ["--pipeline-model-parallel-size", str(groups.pp.size)], {}, {}
    for name, chunks in SCHEDULES.items():
        if work.layers % (groups.pp.size * chunks):
            continue
        if chunks not in engines:
            chosen = [*flags, *layout, "--virtual-pipeline-model-parallel-size", str(chunks)]
            config = configuration(work, chosen, groups.world.size)
            engines[chunks] = NativeEngine(config, get_family(config.model.model), groups)
        engine = engines[chunks]
        queues = [chunk.context.deferred for chunk in engine.chunks]
        executors[name] = partial(PipelineExecutor, engine.chunks, groups, name, engine.dtype, deferred=queues)
    batches = micro_batches(work, groups)
    results: dict[str, tuple[list[float], list[list[Span]]]] = {name: ([], []) for name in executors}
    for step in range(rounds + 1):
        for name, make in executors.items():
            engine = engines[SCHEDULES[name]]
            spans: list[Span] = []
            engine.executor = make(on_span=spans.append)
            barrier(groups.world)
            start = time.perf_counter()
            engine.compute_gradients(batches, step=step, first_sample=0)
            if step > 0:  # the first warms up
                results[name][0].append(time.perf_counter() - start)
                results[name][1].append(spans)
    return results


def report_run(ranks: Sequence[dict[str, Any]], micros: int) -> tuple[list[str], dict[str, Any], list[Panel]]:
    """Table, figures and pictures of a real run."""
    lines, figures, panels = ["| schedule | step, s | times 1F1B | simulated from its own durations, s |", "|---|---:|---:|---:|"], {}, []
    for name, (seconds, _) in ranks[0].items():
        step = statistics.median(seconds)
        median = min(range(len(seconds)), key=lambda i: abs(seconds[i] - step))
        spans = [rank[name][1][median] for rank in ranks]
        plan = make_schedule(name, len(ranks), micros, SCHEDULES[name])
        expected = simulate(plan, micros, SCHEDULES[name], measured_costs(spans, SCHEDULES[name])).ticks
        figures[name] = {"seconds": seconds, "median": step, "simulated": expected}
        ratio = figures["1f1b"]["median"] / step
        lines.append(f"| {name} | {step:.3f} | {ratio:.2f} | {expected:.3f} |")
        panels.append(measured_panel(spans, f"{name}, run on {len(ranks)} ranks"))
    return lines, figures, panels


def parsed() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--stages", type=int, default=4, help="pipeline ranks to simulate (default 4)")
    made.add_argument("--micro-batches", type=int, default=8, help="micro-batches of a step (default 8)")
    made.add_argument("--sequences", type=int, default=1, help="sequences in a micro-batch (default 1)")
    made.add_argument("--vocabulary", type=int, default=Workload().vocabulary, help="entries of the vocabulary (default: the benchmark's)")
    made.add_argument("--bf16", action="store_true", help="weights and activations in bf16 (default fp32)")
    made.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    made.add_argument("--run", type=int, nargs="*", default=[], metavar="RANKS", help="also train on so many ranks, e.g. --run 2 4")
    made.add_argument("--json", type=Path, help="write the figures here")
    made.add_argument("--plot", type=Path, help="draw the timelines here (PNG)")
    return made.parse_args()


def main() -> None:
    """Measure, simulate, run, print, write."""
    args = parsed()
    work = replace(Workload(), micro=args.sequences, sequences=args.sequences * args.micro_batches, vocabulary=args.vocabulary)
    if min(args.stages, args.micro_batches, args.sequences, args.rounds) < 1 or work.layers % args.stages:
        raise UserError(f"--stages must divide the {work.layers} layers, and counts be at least 1")
    flags = ["--bf16"] if args.bf16 else []
    torch.set_num_threads(1)
    stamped = stamp()
    print(stamp_lines(stamped))
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    transfer = run_ranks(ping, (work.length, work.micro, work.hidden), dtype, 20, pp=2)[0]
    possible = [chunks for chunks in (1, 2) if work.layers % (args.stages * chunks) == 0]
    found = measure_stages(work, flags, [args.stages * chunks for chunks in possible], args.rounds)
    measured = dict(zip(possible, found, strict=True))
    print(f"\n{args.sequences} x {work.length} tokens a micro-batch, {dtype}; a transfer takes {transfer * 1e3:.1f} ms\n")
    print("| stage | F, ms | B, ms | W, ms | backward in one, ms |\n|---|---:|---:|---:|---:|")
    for stage, one in enumerate(measured[1]):
        print(f"| {stage} |" + "".join(f" {seconds * 1e3:.1f} |" for seconds in asdict(one).values()))
    layers = equal_stages(measured[1], possible)
    played, equal = play(measured, args.stages, args.micro_batches, transfer), play(layers, args.stages, args.micro_batches, 0.0)
    print(f"\n## {args.stages} stages, {args.micro_batches} micro-batches, stages as they are\n")
    print("\n".join(table(played, None)))
    print("\n## All stages as the cheapest, which has layers alone; transfers for nothing\n")
    print("\n".join(table(equal, lambda name: idle_by_formula(name, args.stages, layers[1][0]))))
    panels = [simulated_panel(one, name, "s") for name, one in played.items()]
    runs = {}
    for ranks in args.run:
        print(f"\n## Run on {ranks} ranks, {len(os.sched_getaffinity(0))} cores\n", flush=True)
        lines, runs[ranks], drawn = report_run(
            run_ranks(train_in_turns, work, flags, args.rounds, pp=ranks, timeout=3600), args.micro_batches
        )
        print("\n".join(lines), flush=True)
        panels += drawn
    if args.plot is not None:
        draw_panels(panels, "seconds", args.plot)
    if args.json is not None:
        write_json(args.json, document(stamped, args, measured, transfer, {"as they are": played, "equal stages": equal}, runs))


def document(
    stamped: dict[str, Any],
    args: argparse.Namespace,
    measured: dict[int, list[Measured]],
    transfer: float,
    played: dict[str, dict[str, Simulation]],
    runs: dict[int, Any],
) -> dict[str, Any]:
    """Everything, for --json."""
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    comparisons = [
        Comparison("pipeline", f"step of {args.stages} stages, {case}, simulated", "s", "1F1B", one["zero-bubble"].ticks, one["1f1b"].ticks)
        for case, one in played.items()
    ]
    return {
        "stamp": stamped,
        "options": options,
        "transfer": transfer,
        "stages": {chunks: [asdict(one) for one in found] for chunks, found in measured.items()},
        "simulated": {
            case: {name: {"seconds": one.ticks, "idle": one.bubble, "live": one.peak_activations} for name, one in found.items()}
            for case, found in played.items()
        },
        "runs": runs,
        "comparisons": [one.as_json() for one in comparisons],
    }


if __name__ == "__main__":
    run_command(main)
