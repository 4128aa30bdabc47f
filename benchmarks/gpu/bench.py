"""Training on one GPU: the project beside `transformers` (compiled, or with Liger's kernels) and megatron-core, inside a time budget.

    python -m benchmarks.gpu.bench --minutes 9 --out bench_results/gpu

Two models in bf16 at 4,096 tokens: a LLaMA of 1.2 billion parameters, and four layers as wide as those of an 8B model. Prints
tokens/s, model FLOPs utilisation (against the data sheet and against a measured matrix product) and peak memory; writes
gpu.json and gpu.md after every part, so that what was measured is there whatever happens later.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu.waves import Result, Turns
from benchmarks.programs import ROOT, Program
from benchmarks.report import number, stamp, stamp_lines, table
from benchmarks.train_step import peers_folder
from benchmarks.workload import Workload
from megatron_llm.training.flops import gpu_peak
from megatron_llm.utils.atomic import write_json, write_text
from megatron_llm.utils.errors import UserError, run_command
from megatron_llm.utils.optional import available

WORKS = {
    "LLaMA 1.2B": Workload(hidden=2048, layers=16, heads=16, ffn=8192, length=4096, sequences=4, micro=2),
    "4 layers as wide as 8B": Workload(hidden=4096, layers=4, heads=32, ffn=14336, length=4096, sequences=4, micro=2),
}
TINY = {"tiny": Workload(hidden=32, layers=1, heads=2, ffn=64, vocabulary=64, length=16, sequences=2, micro=1)}
OURS = {
    "compiled, fused": ("--compile", "--kernels", "fused"),
    "compiled, fused, fp8": ("--compile", "--kernels", "fused", "--fp8", "tensorwise"),
    "compiled, fused, CUDA graphs": ("--compile", "--compile-mode", "reduce-overhead", "--kernels", "fused"),
    "eager, fused": ("--kernels", "fused"),
    "compiled, torch": ("--compile", "--kernels", "torch"),
    "eager, torch": ("--kernels", "torch"),
}
TINY_OURS = {"eager, torch": OURS["eager, torch"], "eager, fp8": ("--kernels", "torch", "--fp8", "tensorwise")}
# Precision, compiled, Liger.
TRANSFORMERS = {
    "compiled, bf16 weights alone": ("bf16", True, False),
    "Liger, bf16 weights alone": ("bf16", False, True),
    "compiled, autocast, fp32 weights": ("autocast", True, False),
    "eager, bf16 weights alone": ("bf16", False, False),
}
HEADS = ("program", "median, s", "tokens/s", "MFU, data sheet", "MFU, measured peak", "GiB", "speed of the first", "first losses")


def megatron_python() -> str:
    """The interpreter that has megatron-core: this one, else the one of benchmarks/peers/install.sh; this one where neither has."""
    own = peers_folder() / "megatron-core" / "bin" / "python"
    return str(own) if not available("megatron.core") and own.exists() else sys.executable


def programs(device: str, *, tiny: bool) -> list[Program]:
    """The configurations, the anchor first, then by how much they tell: time may run out. `tiny`: a few, without compilation."""
    settings = {"device": device, "threads": 1 if tiny else 4, "warmup": 1 if tiny else 3}
    own = [
        Program(f"ours, {name}", sys.executable, "benchmarks.gpu.ours", {**settings, "flags": ["--bf16", *flags]}, role="ours")
        for name, flags in (TINY_OURS if tiny else OURS).items()
    ]
    # It keeps every attention score, which takes the memory of two.
    local = {**settings, "precision": "bf16", "fused": not tiny, "alone": True}
    megatron = Program("megatron-core, local modules", megatron_python(), "benchmarks.gpu.megatron_core_gpt", local)
    others = {name: TRANSFORMERS[name] for name in ("Liger, bf16 weights alone",)} if tiny else TRANSFORMERS
    theirs = [
        Program(
            f"transformers, {name}",
            sys.executable,
            "benchmarks.gpu.transformers_llama",
            {**settings, "precision": precision, "compile": compiled, "liger": liger},
        )
        for name, (precision, compiled, liger) in others.items()
    ]
    return [own[0], *theirs[:2], megatron, *own[1:3], *theirs[2:3], *own[3:], *theirs[3:]]


def matmul_peak(device: torch.device, size: int) -> float:
    """FLOP/s of bf16 matrix products of random numbers, the best of several runs of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first prepares, and warms the clocks
        _wait(device)
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right)
        _wait(device)
        best = min(best, (time.perf_counter() - began) / 10)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def attention_backend(device: torch.device) -> str:
    """What torch chooses for causal attention with grouped heads in bf16."""
    query, key = (torch.randn(1, heads, 128, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2))
    return SDPBackend(torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)).name


def machine(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """What the figures were measured on, and the two peaks they are compared with."""
    found: dict[str, Any] = stamp()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        found |= {"gpu": name, "cuda": torch.version.cuda, "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}
        found["data_sheet_flops"] = gpu_peak(name, torch.bfloat16).flops
    found["attention"] = attention_backend(device)
    found["matmul_flops"] = matmul_peak(device, 64 if tiny else 8192)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def row(result: Result, work: Workload, about: dict[str, Any]) -> tuple[str, ...]:
    """One line of a table."""
    seconds = result.median
    if result.not_run is not None or seconds is None:
        return result.program.name, f"not run: {result.not_run}", *("-" for _ in HEADS[2:])
    rate = work.flops / seconds
    shares = [f"{rate / peak:.1%}" if peak else "-" for peak in (about.get("data_sheet_flops"), about["matmul_flops"])]
    memory = number(result.about["memory"] / 2**30)
    relative = number(result.anchor_s / seconds) if result.anchor_s else "-"
    losses = ", ".join(f"{loss:.3f}" for loss in result.about["first_losses"])
    return result.program.name, number(seconds), number(work.tokens / seconds), *shares, memory, relative, losses


def kernel_table(found: dict[str, Any]) -> str:
    """The part of benchmarks/gpu/kernels.py."""
    if "not_run" in found:
        return f"not run: {found['not_run']}"
    lines = []
    for one in found["rows"]:
        times = one["milliseconds"]
        cells = [number(times[name]) if name in times else "-" for name in ("torch", "compiled", "triton")]
        lines.append((one["operation"], *cells, number(one["megabytes"] / min(times.values()))))
    reason = f"\n\nTriton not run: {found['triton_not_run']}" if found["triton_not_run"] else ""
    return table(("operation", "torch, ms", "compiled, ms", "Triton, ms", "best, GB/s"), lines) + reason


def measure_kernels(device: str, *, tiny: bool, deadline: float) -> dict[str, Any]:
    """Run benchmarks/gpu/kernels.py in a process of its own, whose memory is free afterwards."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--device", device, *(["--tiny", "--rounds", "2"] if tiny else [])]
    try:
        limit = max(1.0, deadline - time.monotonic())
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"not_run": "it was not done when its share of the time budget ran out"}
    if done.returncode:
        return {"not_run": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(
    out: Path, about: dict[str, Any], kernels: dict[str, Any] | None, parts: dict[str, list[Result]], works: dict[str, Workload]
) -> str:
    """gpu.json and gpu.md; returns the tables."""
    text = "# Training on one GPU\n\n" + stamp_lines(about) + "\n"
    if kernels is not None:
        text += "\n## Kernels, bf16\n\n" + kernel_table(kernels) + "\n"
    for name, results in parts.items():
        work = works[name]
        text += f"\n## {name}: {work.parameters / 1e9:.2f} billion parameters, {work.tokens} tokens a step of {work.length}\n\n"
        text += table(HEADS, [row(result, work, about) for result in results]) + "\n"
    rows = {name: [result.as_json() for result in results] for name, results in parts.items()}
    write_json(out / "gpu.json", {"part": "gpu", "stamp": about, "kernels": kernels, "training": rows})
    write_text(out / "gpu.md", text)
    return text


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget of everything; what does not fit is told as not run")
    parser.add_argument("--out", type=Path, default=Path("bench_results/gpu"))
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each program")
    parser.add_argument("--alive", type=int, default=3, help="programs in the GPU's memory at once, about 40 GiB each")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a model and programs for a test of this benchmark")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the peak, the kernels, then every model, as far as the time goes."""
    options = options_of(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("the GPU benchmark found no CUDA device: run it on a machine with one, or try the program with --device cpu --tiny")
    began = time.monotonic()
    budget = 60 * options.minutes

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s of {budget:.0f} s] {text}", file=sys.stderr, flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    logs = (options.out / "logs").resolve()
    works = TINY if options.tiny else WORKS
    about = machine(torch.device(options.device), tiny=options.tiny)
    about["triton"] = available("triton")
    say(f"measured matrix product: {about['matmul_flops'] / 1e12:.3g} TFLOP/s; kernels next")
    kernels = measure_kernels(options.device, tiny=options.tiny, deadline=began + budget / 5)
    parts: dict[str, list[Result]] = {}
    text = write(options.out, about, kernels, parts, works)
    for position, (name, work) in enumerate(works.items()):
        left = budget - (time.monotonic() - began)
        # What is left is shared so that the first model, which has the most programs' turns, gets two thirds.
        share = left if position == len(works) - 1 else 0.6 * left
        say(f"{name}: {share:.0f} s for it")
        folder = logs / str(position)
        folder.mkdir(parents=True, exist_ok=True)
        turns = Turns(work, options.rounds, options.alive, time.monotonic() + share, folder, say)
        parts[name] = turns.run(programs(options.device, tiny=options.tiny))
        text = write(options.out, about, kernels, parts, works)
    say(f"done; tables and figures are in {options.out}")
    print(text)


if __name__ == "__main__":
    run_command(main)
