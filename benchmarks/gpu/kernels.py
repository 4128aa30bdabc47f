"""The Triton kernels on one GPU beside plain torch and torch.compile of it: milliseconds, and the share of the memory's bandwidth.

    python -m benchmarks.gpu.kernels --json kernels.json

Each operation moves a known number of bytes, which bounds it; forms take turns, and medians are compared. Sizes are those of
a LLaMA of hidden size 4,096 over 8,192 tokens, too large for the caches.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels import reference
from megatron_llm.kernels.triton import operations

Step = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """One operation on fixed inputs: how to run it with given functions, and the bytes that it must move."""

    name: str
    function: str
    run: Callable[[Callable[..., Any]], object]
    megabytes: float


@dataclass(frozen=True)
class Sizes:
    """Tokens, hidden size, width of the MLP, heads of 128 channels, vocabulary, elements of a flat buffer."""

    tokens: int = 8192
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    vocabulary: int = 32000
    flat: int = 1 << 27


TINY = Sizes(6, 16, 24, 2, 40, 500)


def _with_backward(work: Callable[[], Tensor], inputs: Sequence[Tensor], outer: Tensor) -> None:
    torch.autograd.grad(work(), inputs, outer)


def make_operations(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """The operations with their inputs; forward and backward where there is one."""
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    size = torch.finfo(dtype).bits // 8
    x, weight = make(sizes.tokens, 1, sizes.hidden).requires_grad_(), make(sizes.hidden).requires_grad_()
    wide = make(sizes.tokens, 1, 2 * sizes.ffn).requires_grad_()
    half = make(sizes.tokens, 1, sizes.ffn)
    channels = sizes.hidden // sizes.heads
    query = make(sizes.tokens, 1, sizes.heads, channels).requires_grad_()
    table = torch.randn(sizes.tokens, 1, 1, channels // 2, device=device)
    logits = make(sizes.tokens, sizes.vocabulary)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)
    rows = torch.ones(sizes.tokens, device=device)
    state = [torch.rand(sizes.flat, device=device) for _ in range(4)]
    rounded = torch.empty(sizes.flat, device=device, dtype=dtype)
    hidden, ffn, columns = (sizes.tokens * n * size / 1e6 for n in (sizes.hidden, sizes.ffn, sizes.vocabulary))
    rates = (1e-3, 0.9, 0.95, 1e-8, 0.1, 3, 0.5)
    return [
        Operation(
            "RMSNorm, both ways", "rms_norm", lambda f: _with_backward(lambda: f(x, weight, 1e-5), [x, weight], x.detach()), 5 * hidden
        ),
        Operation(
            "rotary, both ways", "rotary", lambda f: _with_backward(lambda: f(query, table, table), [query], query.detach()), 4 * hidden
        ),
        Operation("SwiGLU, both ways", "swiglu", lambda f: _with_backward(lambda: f(wide), [wide], half), 8 * ffn),
        Operation("softmax statistics", "softmax_statistics", lambda f: f(logits, labels, 0, sizes.vocabulary), columns),
        Operation("softmax gradient", "softmax_gradient_", lambda f: f(logits, labels, rows, rows, 0, sizes.vocabulary), 2 * columns),
        Operation("AdamW", "adamw_", lambda f: f(*state, rounded, *rates), sizes.flat * (28 + size) / 1e6),
        Operation("sum of squares", "sum_of_squares", lambda f: f(state[3]), sizes.flat * 4 / 1e6),
    ]


def seconds_of(step: Step, device: torch.device) -> float:
    """One run by the device's clock, or by this machine's on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(operation: Operation, forms: dict[str, Callable[..., Any]], device: torch.device, rounds: int) -> dict[str, Any]:
    """Median milliseconds of every form, taking turns; the first run of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            seconds = seconds_of(functools.partial(operation.run, form), device)
            if turn:
                times[name].append(seconds)
    found = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {"operation": operation.name, "megabytes": operation.megabytes, "milliseconds": found}


def run(device: torch.device, sizes: Sizes, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """All operations; Triton's forms where they can run, with the reason where they cannot."""
    reason = operations.missing(device)
    fused = operations.operations() if reason is None else {}
    dtype = torch.bfloat16
    rows = []
    for operation in make_operations(sizes, device, dtype):
        plain = getattr(reference, operation.function)
        forms: dict[str, Callable[..., Any]] = {"torch": plain}
        if compiled:
            forms["compiled"] = torch.compile(plain)
        if operation.function in fused:
            forms["triton"] = fused[operation.function]
        rows.append(measure(operation, forms, device, rounds))
    return {"rows": rows, "triton_not_run": reason}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print one JSON object, and write it with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this program, without torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    found = run(torch.device(options.device), TINY if options.tiny else Sizes(), options.rounds, compiled=not options.tiny)
    text = json.dumps(found)
    if options.json:
        options.json.write_text(text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
