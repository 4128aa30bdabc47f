"""The one place where Triton is imported, and what all kernels share: rows of a tensor, tile sizes, the device.

Without Triton `jit` leaves a kernel an ordinary function that nothing calls, so that every module imports everywhere.
Kernels quote `Pointer` and `Scalar` in their signatures, names that Triton's compiler would otherwise look up and refuse.
Counts and strides are not annotated int: Triton would take that for 32 bits and forget what they are divisible by.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import available, require

NAMESPACE = "megatron_llm_triton"
LARGEST_ROW = 65536  # elements that a kernel which keeps a row in registers accepts

_TRITON: Any = require("triton") if available("triton") else None
tl: Any = require("triton.language") if _TRITON is not None else None

if TYPE_CHECKING:
    constexpr = int
else:
    constexpr = tl.constexpr if tl is not None else int

Pointer = Any
Scalar = Any


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, or the function itself where there is no Triton."""
    return kernel if _TRITON is None else _TRITON.jit(kernel)


def require_triton() -> None:
    """UserError where Triton is not installed."""
    if _TRITON is None:  # torch.compile traces the test, not an import
        require("triton", purpose="--kernels fused on a GPU")


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., n] as [rows, n] with unit stride along a row: a view where its strides allow, else a copy."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        stride, count = 0, 1
        for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if count == 1:
                stride = step
            elif step != stride * count:
                break
            count *= size
        else:
            return x.as_strided((rows, x.shape[-1]), (stride or x.shape[-1], 1))
    return x.contiguous().view(rows, x.shape[-1])


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def divide_up(count: int, part: int) -> int:
    """Parts of size `part` that hold `count` elements."""
    return -(-count // part)


def warps(elements: int) -> int:
    """Warps for a tile of this many elements, a power of two: about 16 elements a thread."""
    return min(max(elements // 512, 1), 16)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 on the CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels are started on the current device of a process, which need not be that of `x`."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def check_row(columns: int) -> None:
    """UserError for a row too long for registers."""
    if columns > LARGEST_ROW:
        raise UserError(
            f"a norm over {columns} elements was asked of the fused kernels, which take at most {LARGEST_ROW}: use --kernels torch"
        )
