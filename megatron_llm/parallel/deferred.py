"""Weight gradients that are computed later than the backward they belong to.

A linear layer's backward is two products that need not follow each other: the input's gradient, which the stage before
waits for, and the weight's gradient, which only the optimizer needs. Schedules that split the backward (Qi et al. 2023,
"Zero Bubble Pipeline Parallelism", arXiv:2401.10241) run the first alone and fill the time in which a stage would wait
with the second.

A `DeferredGradients` belongs to one model chunk. While it collects, the chunk's linear layers leave their weight's
gradient out of the backward and leave here what it is made of; `run` computes it. Until then a layer's input and its
output's gradient stay alive, the rest of the micro-batch's activations does not.

Norms, biases and embeddings cost next to nothing and take their gradient in the backward. So does the output layer: its
output's gradient is as wide as the vocabulary and more than a stage's other activations together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_llm.kernels.fp8 import Scaled
from megatron_llm.kernels.products import Products, forward_product, input_gradient, left_to_torch, weight_gradient
from megatron_llm.parallel.comm import all_gather_into
from megatron_llm.parallel.groups import Group


@dataclass(frozen=True)
class Product:
    """A weight gradient that is still to be computed: output's gradient [..., out] and input [..., in] of a linear layer.

    Both may be in 8 bits already. `group`: the input is this rank's part of the first dimension, in its own type, and is
    gathered over the group first.
    """

    parameter: nn.Parameter
    source: Tensor | Scaled
    gradient: Tensor | Scaled
    products: Products
    group: Group | None = None

    def whole_source(self) -> Callable[[], Tensor | Scaled]:
        """Start to bring the input of all ranks here; what is returned waits for it."""
        source = self.source
        if self.group is None or isinstance(source, Scaled):
            return lambda: source
        whole = source.new_empty((source.shape[0] * self.group.size, *source.shape[1:]))
        return all_gather_into(whole, source.contiguous(), self.group, async_op=True).wait


class DeferredGradients:
    """What the weight gradients of one model chunk are made of, by micro-batch.

    `enabled` says whether the backwards of this chunk will be split: layers ask it in their forward. One thread at a
    time: the backward may run in autograd's thread, the rest in the caller's.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._waiting: dict[int, list[Product]] = {}
        self._collecting: list[Product] | None = None

    @property
    def collecting(self) -> bool:
        """Whether a backward is under way that leaves weight gradients out."""
        return self._collecting is not None

    @contextmanager
    def collect(self, micro: int) -> Iterator[None]:
        """The backward of micro-batch `micro` runs within: it computes no gradient that it can leave here."""
        self._collecting = self._waiting[micro] = []
        try:
            yield
        finally:
            self._collecting = None

    def put(self, product: Product) -> None:
        """Leave a weight gradient for later. Only while `collecting`."""
        assert self._collecting is not None, "a layer asks `collecting` first"
        self._collecting.append(product)

    def parameters(self, micro: int) -> list[nn.Parameter]:
        """The parameters whose gradient from micro-batch `micro` is still to come."""
        return [product.parameter for product in self._waiting.get(micro, [])]

    def run(self, micro: int) -> None:
        """Compute what micro-batch `micro` left, in the backward's order, and accumulate it as autograd would have.

        Collective over the tensor-parallel group under sequence parallelism: the next layer's input is gathered while
        this layer's product is computed.
        """
        products = self._waiting.pop(micro)
        products.reverse()  # popped from the end, so that each one's tensors are free as soon as it is done
        upcoming = products[-1].whole_source() if products else None
        while products:
            product, started = products.pop(), upcoming
            assert started is not None, "in the turn before"
            whole = started()
            upcoming = products[-1].whole_source() if products else None
            _Late.apply(product.parameter, whole, product.gradient, product.products).backward()

    def clear(self) -> None:
        """Forget everything, as after a step that failed."""
        self._waiting.clear()
        self._collecting = None


class _Late(torch.autograd.Function):
    """Hands a parameter its gradient through autograd, which accumulates it, runs the hooks and takes it over uncopied."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, source: Tensor | Scaled, gradient: Tensor | Scaled, products: Products) -> Tensor:
        ctx.source, ctx.gradient, ctx.products = source, gradient, products
        return parameter.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return weight_gradient(ctx.source, ctx.gradient, ctx.products), None, None, None


class _Linear(torch.autograd.Function):
    """A linear layer on one rank by `kernels.products`, whose weight gradient may be left to `deferred`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredGradients | None, products: Products) -> Tensor:
        # Recomputed activations bring back detached copies of what is saved; a gradient is delivered to the parameter.
        ctx.deferred, ctx.parameter, ctx.products = deferred, None if deferred is None else weight, products
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return forward_product(x, weight, bias, products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gradient, products = grads[0], ctx.products
        grad_x = input_gradient(gradient, weight, products) if ctx.needs_input_grad[0] else None
        grad_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if ctx.deferred is not None and ctx.deferred.collecting:
            ctx.deferred.put(Product(ctx.parameter, x.detach(), gradient, products))
            return grad_x, None, grad_bias, None, None
        return grad_x, weight_gradient(x, gradient, products) if ctx.needs_input_grad[1] else None, grad_bias, None, None


def splits(weight: Tensor, deferred: DeferredGradients) -> bool:
    """Whether the gradient of this weight may be left for later: it must be the parameter itself, to be delivered to."""
    return deferred.enabled and torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredGradients, products: Products = "torch") -> Tensor:
    """x W^T + b on one rank, [..., in] to [..., out], with a weight gradient that can be computed later."""
    later = splits(weight, deferred)
    if not later and left_to_torch(x, weight, products):
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias, deferred if later else None, products)
    return result
