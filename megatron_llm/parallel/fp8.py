"""The linear layer whose three products are in 8 bits (`kernels.fp8`): forward, input's gradient, weight's gradient.

What is kept for the backward is the input in 8 bits, half of what the plain layer keeps in bf16. Weights stay in their own
type, so the optimizer, checkpoints and gradient buffers know nothing of it; they are rounded again for each product.

This is the layer on one rank and the row-parallel one. The column-parallel product over several ranks (`layers`) communicates
its input and keeps it in its own type.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_llm.kernels.fp8 import E4M3, E5M2, Scaled, input_product, product, rounded, scaled, weight_product
from megatron_llm.parallel.deferred import DeferredGradients, Product, splits


class _Fp8Linear(torch.autograd.Function):
    """x W^T; the weight's gradient may be left to `deferred`, as in `deferred.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, deferred: DeferredGradients | None) -> Tensor:
        ctx.deferred = deferred
        ctx.parameter = None if deferred is None else weight  # recomputation brings back detached copies of what is saved
        source, matrix = scaled(x, E4M3), scaled(weight, E4M3)
        ctx.save_for_backward(source.data, source.scale, weight, matrix.scale)
        return product(source, matrix, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        data, scale, weight, weight_scale = ctx.saved_tensors
        source, gradient = Scaled(data, scale, weight.dtype), scaled(grads[0], E5M2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(gradient, rounded(weight, weight_scale, E4M3).transposed())
        if ctx.deferred is not None and ctx.deferred.collecting:
            ctx.deferred.put(Product(ctx.parameter, source, gradient, "fp8"))
            return grad_x, None, None
        return grad_x, weight_product(gradient, source) if ctx.needs_input_grad[1] else None, None


class _Fp8LinearFrozen(torch.autograd.Function):
    """The same for a weight that is not trained: the input need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(scaled(x, E4M3), scaled(weight, E4M3), fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return input_product(scaled(grads[0], E5M2), weight), None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredGradients) -> Tensor:
    """x W^T + b on one rank, [..., in] to [..., out], its products in 8 bits; the sum with the bias is not."""
    if weight.requires_grad:
        y: Tensor = _Fp8Linear.apply(x, weight, deferred if splits(weight, deferred) else None)
    else:
        y = _Fp8LinearFrozen.apply(x, weight)
    return y if bias is None else y + bias
