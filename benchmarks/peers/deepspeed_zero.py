"""Peer: DeepSpeed with ZeRO stage 1 over data-parallel CPU ranks, around the LLaMA of `transformers`.

Settings: precision bf16 | fp32, optimizer fused (torch's AdamW) | deepspeed (its own CPU Adam, built on first use),
overlap, compile, communication gloo. DeepSpeed keeps fp32 main weights for bf16.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
import torch
import torch.distributed as dist

from benchmarks.peers.loop import optimizer_of
from benchmarks.peers.transformers_llama import build, forward
from benchmarks.protocol import claim_stdout, serve, versions
from benchmarks.workload import Workload


def engine_of(work: Workload, settings: dict[str, Any], model: torch.nn.Module, replicas: int) -> Any:
    """DeepSpeed's engine for this rank."""
    config: dict[str, Any] = {
        "train_batch_size": work.sequences,
        "train_micro_batch_size_per_gpu": work.micro,
        "gradient_accumulation_steps": work.sequences // (work.micro * replicas),
        "gradient_clipping": work.clip,
        "zero_optimization": {"stage": settings.get("stage", 1), "overlap_comm": settings.get("overlap", False)},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "steps_per_print": 10**9,
    }
    if settings.get("optimizer", "fused") == "deepspeed":
        options = {"lr": work.lr, "betas": list(work.betas), "eps": work.eps, "weight_decay": work.weight_decay}
        config["optimizer"] = {"type": "AdamW", "params": options}
        return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    optimizer = optimizer_of(work, model, "fused")
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step_of(work: Workload, settings: dict[str, Any], engine: Any, loss_of: Callable[..., torch.Tensor]) -> Callable[[], float]:
    """One optimizer step over this replica's share of the batch; the loss of that share."""
    replica, replicas = dist.get_rank(), dist.get_world_size()
    ids = torch.from_numpy(work.batch())
    count = work.sequences // (work.micro * replicas)
    mine = [ids[(number * replicas + replica) * work.micro :][: work.micro] for number in range(count)]
    pieces = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in mine]

    def step() -> float:
        total = 0.0
        for tokens, labels in pieces:
            loss = loss_of(tokens, labels)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach())
        return total / count

    return step


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    deepspeed.init_distributed(settings.get("communication", "gloo"))
    model = build(work, settings)
    about = {"parameters": sum(p.numel() for p in model.parameters()), "versions": versions("torch", "deepspeed", "transformers")}
    engine = engine_of(work, settings, model, dist.get_world_size())
    engine.train()
    if settings.get("compile"):
        engine.compile()
    step = step_of(work, settings, engine, forward(engine))
    serve(step, about, answers, before=dist.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
