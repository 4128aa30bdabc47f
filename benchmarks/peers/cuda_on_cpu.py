"""Lets megatron-core train on the CPU: everything that it places on a GPU is placed on the CPU, with gloo between ranks.

megatron-core names its device in the code ("cuda", torch.cuda.current_device(), tensor type names), and never anything
else. Only factories and queries are replaced, before it is imported; the arithmetic runs as it would without this file,
so that its times are its own.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # torch.compile learns which functions are torch's while they still are

FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "linspace")
LIKE = ("empty_like", "zeros_like", "ones_like")
# What megatron-core asks of the random number generator of its GPU.
RANDOM = {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state, "manual_seed": torch.manual_seed}


class NoStream:
    """A stream of a device that runs everything in order."""

    def wait_stream(self, *_: Any) -> None:
        """Nothing runs beside."""

    def synchronize(self) -> None:
        """Everything is done already."""


def redirect() -> None:
    """Replace what names a GPU. Call it before megatron-core is imported."""
    for name in (*FACTORIES, *LIKE):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.set_device = lambda *_: None
    cuda.current_stream = cuda.default_stream = cuda.Stream = lambda *_, **__: NoStream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: RANDOM["get_rng_state"]()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: RANDOM["set_rng_state"](state)
    cuda.manual_seed = lambda seed: RANDOM["manual_seed"](seed)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.type = _named_as_cuda(tensor.type)


def redirect_imported() -> None:
    """Replace what megatron-core took at its import."""
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, *_, **__: RANDOM["set_rng_state"](state)
    random._get_cuda_rng_state = lambda *_, **__: RANDOM["get_rng_state"]()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, with a device of cuda or a device number made cpu."""

    @functools.wraps(factory)
    def made(*arguments: Any, **options: Any) -> Any:
        device = options.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            options["device"] = "cpu"
        if options.pop("pin_memory", False):
            pass  # pinned memory is for transfers to a GPU
        return factory(*arguments, **options)

    return made


def _named_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type: the name as it would be on a GPU, which megatron-core compares with; conversions as they are."""

    @functools.wraps(original)
    def named(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    return named
