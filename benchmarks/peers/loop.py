"""The training loop of the peers that are models without a loop of their own: AdamW, gradient clipping, precision, compilation."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.workload import Workload

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def optimizer_of(work: Workload, model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    """AdamW over all parameters; no weight decay on vectors. `kind` is fused or foreach."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": work.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    chosen = {"fused": {"fused": True}, "foreach": {"foreach": True}}[kind]
    return torch.optim.AdamW(groups, lr=work.lr, betas=work.betas, eps=work.eps, **chosen)


def plain_step(work: Workload, settings: dict[str, Any], model: torch.nn.Module, loss_of: Loss) -> Callable[[], float]:
    """One optimizer step over the whole batch; what it returns is the loss before the update."""
    precision = settings["precision"]
    if precision == "bf16":
        model.to(torch.bfloat16)
    model.train()
    optimizer = optimizer_of(work, model, settings.get("optimizer", "fused"))
    forward: Loss = torch.compile(loss_of, **settings.get("compile_options", {})) if settings.get("compile") else loss_of
    ids = torch.from_numpy(work.batch())
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def precise() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()

    def step() -> float:
        total = 0.0
        pieces = list(zip(tokens.split(work.micro), labels.split(work.micro), strict=True))
        for some, wanted in pieces:
            with precise():
                loss = forward(some, wanted)
            loss = loss / len(pieces)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step
