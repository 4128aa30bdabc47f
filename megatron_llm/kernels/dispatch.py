"""The one place that decides which form of an operation is used.

A model holds a `Kernels` and calls its fields; it never asks for the device. Every operation has its plain torch form,
which is also the reference that fused forms are tested against. On CPU the fused forms are the C++ operators of csrc/cpu/, on
NVIDIA GPUs Triton kernels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_llm.kernels import fused, native, reference
from megatron_llm.kernels.attention import attention
from megatron_llm.kernels.products import Products, onednn_multiplies_faster
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class Kernels:
    """The operations with a fused form; signatures are those of `kernels.reference`."""

    name: str  # torch or fused
    detail: str  # which forms are in use, and why
    products: Products  # what matrices are multiplied with
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotary_interleaved: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    silu: Callable[[Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    gelu_tanh: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    softmax_statistics: Callable[[Tensor, Tensor, int, int], Tensor]
    softmax_gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]
    adamw_: Callable[..., None]
    sum_of_squares: Callable[[Tensor], Tensor]
    accumulate_: Callable[[Tensor, Tensor, bool], None]

    @property
    def fuses_loss(self) -> bool:
        """Whether the output layer and its loss are best computed together (`parallel.linear_loss`)."""
        return self.name == "fused"

    def describe(self) -> str:
        """One line for the start of a run: the forms in use, and why."""
        return f"{self.name} ({self.detail})"


def torch_kernels(detail: str = "every operation in plain torch") -> Kernels:
    """Every operation in plain torch."""
    return Kernels(
        name="torch",
        detail=detail,
        products="torch",
        rms_norm=reference.rms_norm,
        layer_norm=reference.layer_norm,
        rotary=reference.rotary,
        rotary_interleaved=reference.rotary_interleaved,
        swiglu=reference.swiglu,
        silu=reference.silu,
        gelu=reference.gelu,
        gelu_tanh=reference.gelu_tanh,
        attention=reference.attention,
        softmax_statistics=reference.softmax_statistics,
        softmax_gradient_=reference.softmax_gradient_,
        adamw_=reference.adamw_,
        sum_of_squares=reference.sum_of_squares,
        accumulate_=reference.accumulate_,
    )


def select_kernels(choice: Literal["auto", "torch", "fused"], device: torch.device, *, compiled: bool = False) -> Kernels:
    """The kernels for a device: `fused` where they are available, which `auto` takes and `fused` insists on (UserError).

    `compiled`: the model runs under torch.compile, which fuses the smaller operations itself.
    """
    if choice == "torch":
        return torch_kernels("as asked for")
    if device.type == "cpu":
        reason = native.load()
        fused_kernels: Callable[[], Kernels] = _native_kernels
    else:
        # Here and not above: defining the Triton kernels takes time that runs on CPU need not spend.
        from megatron_llm.kernels.triton import operations

        reason = operations.missing(device)
        fused_kernels = functools.partial(_triton_kernels, operations.operations(compiled=compiled))
    if reason is None:
        return fused_kernels()
    if choice == "fused":
        raise UserError(f"--kernels fused was given, but there are no fused kernels to use, because {reason}; or use --kernels auto")
    return torch_kernels(f"no fused kernels, because {reason}")


def _triton_kernels(operations: dict[str, Any]) -> Kernels:
    chosen = replace(torch_kernels(), name="fused", **operations)
    return replace(chosen, detail=f"Triton: {_differences(chosen)}; the others in plain torch")


def _native_kernels() -> Kernels:
    operators = torch.ops.megatron_llm
    chosen = replace(
        torch_kernels(),
        name="fused",
        products="onednn" if onednn_multiplies_faster() else "torch",
        attention=attention,
        rms_norm=fused.rms_norm,
        rotary=fused.rotary,
        rotary_interleaved=fused.rotary_interleaved,
        swiglu=fused.swiglu,
        softmax_statistics=operators.softmax_statistics.default,
        softmax_gradient_=operators.softmax_gradient_.default,
        adamw_=operators.adamw_.default,
        accumulate_=operators.accumulate_.default,
    )
    return replace(chosen, detail=f"C++, {native.capability()}: {_differences(chosen)}; the others in plain torch")


def _differences(chosen: Kernels) -> str:
    """The operations that are not in their plain form, by name."""
    plain = torch_kernels()
    names = (field.name for field in fields(Kernels) if field.name not in ("name", "detail"))
    return ", ".join(name.strip("_") for name in names if getattr(chosen, name) is not getattr(plain, name))
