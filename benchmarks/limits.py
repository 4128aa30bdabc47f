"""What this machine can do at best, measured: the shares that the other parts print are shares of these numbers.

    python -m benchmarks.limits --json limits.json

Matrix products (GFLOP/s in fp32 and bf16, with 1 and all threads), memory (GB/s of copy and of triad), disk (GB/s of
fresh data to the disk and of uncached data from it), all-reduce between two processes (GB/s).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.report import number, save, stamp, stamp_lines, table
from megatron_llm.parallel import shm
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.session import usable_cores

# Rows, inner and columns: squares, and the products of the benchmark's model (2,048 tokens; MLP, output layer).
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 512, 2752), (2048, 1376, 512), (2048, 512, 32000), (512, 2048, 32000))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch uses `count` threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_seconds(work: Callable[[], object], seconds: float) -> float:
    """Fastest of the calls that fit into `seconds`, at least three; a first one warms up."""
    work()
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


@dataclass(frozen=True)
class Product:
    """A matrix product: what runs it, how many floating-point operations it has, how many of them a second."""

    multiply: Callable[[], Tensor]
    flops: float
    rate: float


def fastest_product(dtype: torch.dtype, *, seconds: float = 0.5, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Product:
    """The product with the most FLOP/s of any of the shapes, the right side by rows and as a linear layer has it, by columns."""
    best: Product | None = None
    for rows, inner, columns in shapes:
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        linear_right = right.t().contiguous().t()
        out = torch.empty(rows, columns, dtype=dtype)
        flops = 2.0 * rows * inner * columns
        for other in (right, linear_right):
            multiply = partial(torch.mm, left, other, out=out)
            product = Product(multiply, flops, flops / best_seconds(multiply, seconds))
            best = product if best is None or product.rate > best.rate else best
    assert best is not None, "there are shapes"
    return best


def matmul_peak(dtype: torch.dtype, count: int, *, seconds: float = 0.5, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> float:
    """FLOP/s of the fastest matrix product with `count` threads."""
    with threads(count):
        return fastest_product(dtype, seconds=seconds, shapes=shapes).rate


def memory_bandwidth(count: int, *, megabytes: int = 256, seconds: float = 1.0) -> dict[str, float]:
    """Bytes/s of a copy (2 bytes moved a byte copied) and of a triad a = b + s c (3 arrays), arrays far larger than caches."""
    size = megabytes * 2**20 // 4
    first, second, third = torch.ones(size), torch.ones(size), torch.ones(size)
    with threads(count):
        copy = best_seconds(lambda: first.copy_(second), seconds)
        triad = best_seconds(lambda: torch.add(second, third, alpha=0.5, out=first), seconds)
    return {"copy": 2 * size * 4 / copy, "triad": 3 * size * 4 / triad}


def disk_bandwidth(folder: Path, *, megabytes: int = 512) -> dict[str, float]:
    """Bytes/s of one stream of fresh random data, until it is on the disk, and of reading it back past the page cache."""
    block = os.urandom(2**22)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(megabytes // 4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(2**22)
        start = time.perf_counter()
        while file.raw.readinto(buffer):  # type: ignore[attr-defined]
            pass
        read = time.perf_counter() - start
    size = megabytes // 4 * 2**22
    return {"write": size / write, "read": size / read}


def _all_reduce(groups: ParallelGroups, megabytes: float, seconds: float) -> float:
    """Seconds of the fastest all-reduce of that many megabytes of fp32."""
    torch.set_num_threads(1)
    tensor = torch.ones(int(megabytes * 2**20 / 4))
    best = float("inf")
    for _ in range(max(5, int(seconds / 0.05))):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        best = min(best, time.perf_counter() - start)
        tensor.fill_(1.0)
    return best


def all_reduce_bandwidth(*, megabytes: float = 64) -> dict[str, float]:
    """Bytes/s of the buffer that two processes reduce, size / seconds, by each backend that this machine has."""
    backends = ["gloo"] + ([shm.BACKEND] if not shm.why_not_here() else [])
    return {
        f"{backend}, 2 processes": megabytes * 2**20 / max(run_ranks(_all_reduce, megabytes, 1.0, tp=2, timeout=300, backend=backend))
        for backend in backends
    }


def measure(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """All limits; `quick` is for tests: small sizes, numbers of no meaning."""
    cores = usable_cores()
    seconds = 0.01 if quick else 0.5
    shapes = ((64, 64, 64),) if quick else SHAPES
    products = {
        f"{name}, {count} thread{'s' if count > 1 else ''}": matmul_peak(dtype, count, seconds=seconds, shapes=shapes)
        for name, dtype in DTYPES.items()
        for count in sorted({1, cores})
    }
    return {
        "matmul_flops": products,
        "memory_bytes_per_s": memory_bandwidth(cores, megabytes=1 if quick else 256, seconds=seconds),
        "disk_bytes_per_s": disk_bandwidth(folder, megabytes=4 if quick else 512),
        "all_reduce_bytes_per_s": all_reduce_bandwidth(megabytes=1 if quick else 64),
    }


def as_table(found: dict[str, Any]) -> str:
    """All limits as one table."""
    units = {"matmul_flops": ("matrix product", "GFLOP/s"), "memory_bytes_per_s": ("memory", "GB/s"), "disk_bytes_per_s": ("disk", "GB/s")}
    rows = []
    for name, values in found.items():
        what, unit = units.get(name, (name.removesuffix("_bytes_per_s").replace("_", "-"), "GB/s"))
        rows += [(f"{what}, {case}", number(value / 1e9), unit) for case, value in values.items()]
    return table(("limit", "measured", "unit"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the disk is measured (default: the current folder)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the code, the numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    options = parser.parse_args(argv)
    found = measure(options.folder, quick=options.quick)
    print(f"{stamp_lines(stamp())}\n\n{as_table(found)}")
    if options.json is not None:
        save(options.json, "limits", [], limits=found)


if __name__ == "__main__":
    main()
