"""Peer: the GPT class of `litgpt` with the benchmark's LLaMA shape, in a plain PyTorch training loop.

Settings as for transformers_llama.py (without attention: it is SDPA), and loss chunked (its own, in blocks of rows) | plain.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

from benchmarks.peers.loop import plain_step
from benchmarks.protocol import claim_stdout, serve, versions
from benchmarks.workload import Workload


def build(work: Workload) -> torch.nn.Module:
    """The model with random weights, initialised as the other programs do."""
    config = Config(
        name="benchmark",
        block_size=work.length,
        padded_vocab_size=work.vocabulary,
        vocab_size=work.vocabulary,
        n_layer=work.layers,
        n_head=work.heads,
        n_embd=work.hidden,
        n_query_groups=work.heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        lm_head_bias=False,
        norm_class_name="RMSNorm",
        norm_eps=work.norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=work.ffn,
    )
    torch.manual_seed(work.seed)
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=work.init_std)
    return model


def forward(model: torch.nn.Module, loss: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Tokens and labels [sequences, length] to the mean loss."""
    if loss == "chunked":
        return lambda tokens, labels: chunked_cross_entropy(model(tokens), labels)
    return lambda tokens, labels: torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    model = build(work)
    step = plain_step(work, settings, model, forward(model, settings.get("loss", "plain")))
    about: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "versions": versions("torch", "litgpt")}
    serve(step, about, answers)


if __name__ == "__main__":
    main()
