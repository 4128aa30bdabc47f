"""The operations that have a Triton form, by the names of `kernels.reference`, and whether they can run on a device."""

from typing import Any

import torch

from megatron_llm.kernels.triton import flat, loss, norm, rotary, swiglu
from megatron_llm.utils.optional import available

# Ampere: the first generation with bf16, which the kernels' tests cover.
_OLDEST = (8, 0)


def missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, to follow "because"; None where they can."""
    if device.type != "cuda":
        return f"Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if not available("triton"):
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        return f"this GPU has compute capability {major}.{minor}, and Triton kernels are tested from 8.0 on"
    return None


def operations(*, compiled: bool = False) -> dict[str, Any]:
    """The operations by name, for `dataclasses.replace` on `torch_kernels()`.

    `compiled`: the model runs under torch.compile, which fuses norms, rotations and activations with what surrounds them;
    a custom operator would only stand in its way, so these are left out.
    """
    whole = {
        "softmax_statistics": loss.softmax_statistics,
        "softmax_gradient_": loss.softmax_gradient_,
        "adamw_": flat.adamw_,
        "sum_of_squares": flat.sum_of_squares,
    }
    if compiled:
        return whole
    return {
        **whole,
        "rms_norm": norm.rms_norm,
        "layer_norm": norm.layer_norm,
        "rotary": rotary.rotary,
        "rotary_interleaved": rotary.rotary_interleaved,
        "swiglu": swiglu.swiglu,
    }
