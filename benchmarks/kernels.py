"""The C++ CPU operators against the plain forms, eager and compiled, at the sizes of a 512-wide model.

Example: python benchmarks/kernels.py --threads 1 2 --json /tmp/kernels.json

Each operation runs forward and backward (or once, where it has no backward) in the three forms in turn, so that all meet
the same machine. Shown is the fastest of the repeats, because other processes can only make one slower, and how many times
as long the other forms take. With one thread the time is the thread's own, without waits for a processor that others use.
Compiled alone an operation loses what the compiler gains by fusing it with its neighbours.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.kernels import fused, native, reference
from megatron_llm.kernels.attention import attention
from megatron_llm.utils.allocator import huge_pages_for_heap, keep_freed_memory
from megatron_llm.utils.errors import UserError, run_command

SEQUENCE, BATCH, HIDDEN, FFN, VOCAB, HEADS, HEAD = 256, 8, 512, 1376, 32000, 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One operation: the form that runs, and the inputs that all forms get."""

    name: str
    ours: Callable[..., object]
    plain: Callable[..., object]
    inputs: tuple[object, ...]
    gradient: Tensor | None = None  # of the output, where the backward is part of it
    compiles: bool = True  # torch's own fused AdamW does not


@dataclass(frozen=True)
class Row:
    """Milliseconds of one operation in each form; `compiled` is None where it was not asked for or there is none."""

    name: str
    dtype: str
    threads: int
    ours: float
    eager: float
    compiled: float | None


def loss_cases(dtype: torch.dtype) -> list[Case]:
    """Statistics and gradient of the cross-entropy, over half of the tokens."""
    rows = SEQUENCE * BATCH // 2
    logits, labels = torch.randn(rows, VOCAB).to(dtype), torch.randint(0, VOCAB, (rows,))
    lse, scale = torch.full((rows,), 10.9), torch.full((rows,), 1 / rows)
    operators = torch.ops.megatron_llm
    return [
        Case("softmax_statistics", operators.softmax_statistics, reference.softmax_statistics, (logits, labels, 0, VOCAB)),
        Case("softmax_gradient_", operators.softmax_gradient_, reference.softmax_gradient_, (logits, labels, lse, scale, 0, VOCAB)),
    ]


def flat_cases(dtype: torch.dtype, elements: int) -> list[Case]:
    """The optimizer's operations. The gradient buffer is fp32, what is accumulated into it and the parameters have `dtype`."""
    main, average, grad = (torch.randn(elements) for _ in range(3))
    square, addend = torch.rand(elements), torch.randn(elements).to(dtype)
    rounded = None if dtype == torch.float32 else torch.empty(elements, dtype=dtype)
    rest = (3e-4, 0.9, 0.95, 1e-8, 0.1, 7, 0.5)
    operators = torch.ops.megatron_llm
    cases = [Case("adamw_", operators.adamw_, reference.adamw_, (main, average, square, grad, rounded, *rest), compiles=False)]
    if dtype != torch.float32:  # fp32 is added by torch
        cases.append(Case("accumulate_", operators.accumulate_, add_to, (main, addend, False)))
    return cases


def add_to(total: Tensor, addend: Tensor, overwrite: bool) -> None:
    """`reference.accumulate_` without its pieces, which only eager torch gains from."""
    if overwrite:
        total.copy_(addend)
    else:
        total.add_(addend)


def layer_cases(dtype: torch.dtype) -> list[Case]:
    """The operations on activations, with their backward."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    tokens = (SEQUENCE, BATCH)
    heads = random(*tokens, 3 * HEADS, HEAD)[:, :, :HEADS].detach().requires_grad_()
    angles = torch.randn(SEQUENCE, 1, 1, HEAD // 2)
    tables = (angles.cos(), angles.sin())
    wide = random(*tokens, 2 * FFN).requires_grad_()
    norm = (random(*tokens, HIDDEN).requires_grad_(), random(HIDDEN).requires_grad_(), 1e-6)
    turned = random(BATCH, HEADS, SEQUENCE, HEAD).permute(2, 0, 1, 3)  # as attention returns it
    projected = [random(*tokens, HEADS, HEAD).permute(1, 2, 0, 3).requires_grad_() for _ in range(3)]
    mixed = random(*tokens, HEADS, HEAD).permute(1, 2, 0, 3)
    return [
        Case("rms_norm", fused.rms_norm, reference.rms_norm, norm, random(*tokens, HIDDEN)),
        Case("rotary", fused.rotary, reference.rotary, (heads, *tables), turned),
        Case("rotary_interleaved", fused.rotary_interleaved, reference.rotary_interleaved, (heads, *tables), turned),
        Case("attention", attention, reference.attention, (*projected, None, 0.0), mixed),
        Case("swiglu", fused.swiglu, reference.swiglu, (wide,), random(*tokens, FFN)),
    ]


def run_once(form: Callable[..., object], case: Case, clock: Callable[[], float]) -> float:
    """Milliseconds of the forward and, where the case has one, the backward."""
    start = clock()
    if case.gradient is None:
        with torch.no_grad():
            form(*case.inputs)
    else:
        inputs = [value for value in case.inputs if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(form(*case.inputs), inputs, case.gradient)
    return (clock() - start) * 1e3


def measure(case: Case, dtype: str, threads: int, repeats: int, *, compiled: bool) -> Row:
    """All forms in turn; the first round warms up and compiles."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    forms = {"ours": case.ours, "eager": case.plain}
    if compiled and case.compiles:
        torch.compiler.reset()
        forms["compiled"] = torch.compile(case.plain, dynamic=False)
    rounds = [{name: run_once(form, case, clock) for name, form in forms.items()} for _ in range(repeats + 1)]
    best = {name: min(times[name] for times in rounds[1:]) for name in forms}
    return Row(case.name, dtype, threads, best["ours"], best["eager"], best.get("compiled"))


def line(row: Row) -> str:
    """A row of the table."""
    times = f"{row.name:<24}{row.dtype:>5}{row.threads:>8}{row.ours:>10.2f}{row.eager:>10.2f}"
    if row.compiled is None:
        return f"{times}{'-':>10}{row.eager / row.ours:>10.2f}{'-':>10}"
    return f"{times}{row.compiled:>10.2f}{row.eager / row.ours:>10.2f}{row.compiled / row.ours:>10.2f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "python benchmarks/kernels.py --threads 1 2 --json /tmp/kernels.json"
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure with")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="operations whose name begins with one of these")
    parser.add_argument("--elements", type=int, default=40_000_000, help="length of the flat buffers")
    parser.add_argument("--repeats", type=int, default=7, help="rounds after the first, which warms up")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled form")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    if reason := native.load():
        raise UserError(f"there is nothing to measure: the C++ operators cannot be used, because {reason}")
    if keep_freed_memory():  # as in a training
        huge_pages_for_heap()
    print(f"C++ operators: {native.capability()}; torch {torch.__version__}; milliseconds, the fastest of {options.repeats}")
    print(f"{'operation':<24}{'type':>5}{'threads':>8}{'C++':>10}{'eager':>10}{'compiled':>10}{'eager/C++':>10}{'comp/C++':>10}")
    rows = []
    for dtype in options.dtypes:
        torch.manual_seed(1)
        for make in (loss_cases, layer_cases, lambda kind: flat_cases(kind, options.elements)):
            for case in make(DTYPES[dtype]):
                if options.only and not case.name.startswith(tuple(options.only)):
                    continue
                for threads in options.threads:
                    rows.append(measure(case, dtype, threads, options.repeats, compiled=not options.no_compile))
                    print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"written: {options.json}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
