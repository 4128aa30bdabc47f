"""What the measured processes of the GPU benchmark share: waiting for the device, memory, warming up before being ready.

A process warms up by itself before it says that it is ready, so that several that were started together compile at the same
time; after that they take turns as in benchmarks/programs.py.
"""

import resource
from collections.abc import Callable
from typing import Any, TextIO

import torch

from benchmarks.protocol import serve


def device_of(settings: dict[str, Any]) -> torch.device:
    """The device in a program's settings, made current."""
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.set_device(torch.device("cuda", 0))
    return device


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on the GPU; on a CPU the largest resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm_up_and_serve(
    step: Callable[[], float | None], about: dict[str, Any], settings: dict[str, Any], answers: TextIO, device: torch.device
) -> None:
    """Take the settings' `warmup` steps, then answer; a step ends when the device has finished it."""

    def whole() -> float | None:
        loss = step()
        finish(device)
        return loss

    losses = [whole() for _ in range(settings["warmup"])]
    serve(whole, {**about, "first_losses": losses, "memory": peak_memory(device)}, answers, before=lambda: finish(device))
