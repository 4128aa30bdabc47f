"""Peer on a GPU: the LLaMA of `transformers` in a plain training loop, with the kernels of Liger where asked for.

Settings: device, precision bf16 (bf16 parameters and moments, no fp32 main copy) | autocast (fp32 parameters, bf16 arithmetic),
compile true | false, liger true | false, warmup.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.process import device_of, warm_up_and_serve
from benchmarks.protocol import claim_stdout, versions
from benchmarks.workload import Workload
from megatron_llm.utils.errors import run_command
from megatron_llm.utils.optional import require


def apply_liger() -> None:
    """Replace the LLaMA's layers and loss by Liger's kernels, all of them."""
    require("liger_kernel.transformers", purpose="transformers with Liger's kernels").apply_liger_kernel_to_llama()


def step_of(work: Workload, settings: dict[str, Any], model: torch.nn.Module, device: torch.device) -> Callable[[], float]:
    """One optimizer step over the whole batch; what it returns is the loss before the update."""
    from benchmarks.peers.loop import optimizer_of
    from benchmarks.peers.transformers_llama import forward

    optimizer = optimizer_of(work, model, "fused")
    loss_of = torch.compile(forward(model)) if settings["compile"] else forward(model)
    ids = torch.from_numpy(work.batch()).to(device)
    pieces = list(zip(ids[:, :-1].contiguous().split(work.micro), ids[:, 1:].contiguous().split(work.micro), strict=True))

    def precise() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if settings["precision"] == "autocast" else contextlib.nullcontext()

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens, labels in pieces:
            with precise():
                loss = loss_of(tokens, labels)
            loss = loss / len(pieces)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    if settings["liger"]:
        apply_liger()
    from benchmarks.peers.transformers_llama import build

    device = device_of(settings)
    with device:
        model = build(work, settings)
    if settings["precision"] == "bf16":
        model.to(torch.bfloat16)
    model.train()
    about = {"parameters": sum(p.numel() for p in model.parameters()), "versions": versions("torch", "transformers")}
    warm_up_and_serve(step_of(work, settings, model, device), about, settings, answers, device)


if __name__ == "__main__":
    run_command(main)
