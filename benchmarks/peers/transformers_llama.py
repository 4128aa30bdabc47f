"""Peer: the LLaMA of `transformers` in a plain PyTorch training loop.

Settings: precision fp32 | bf16 (bf16 parameters, no fp32 main copy) | autocast (fp32 parameters, bf16 arithmetic),
attention sdpa | eager, compile true | false, optimizer fused | foreach.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.loop import plain_step
from benchmarks.protocol import claim_stdout, serve, versions
from benchmarks.workload import Workload


def build(work: Workload, settings: dict[str, Any]) -> torch.nn.Module:
    """The model with random weights."""
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.ffn,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=work.length,
        rms_norm_eps=work.norm_eps,
        initializer_range=work.init_std,
        tie_word_embeddings=False,
        attention_bias=False,
        use_cache=False,
        attn_implementation=settings.get("attention", "sdpa"),
    )
    torch.manual_seed(work.seed)
    return LlamaForCausalLM(config)


def forward(model: torch.nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Tokens and labels [sequences, length] to the mean loss; the labels are shifted already."""
    return lambda tokens, labels: model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    model = build(work, settings)
    step = plain_step(work, settings, model, forward(model))
    about = {"parameters": sum(p.numel() for p in model.parameters()), "versions": versions("torch", "transformers")}
    serve(step, about, answers)


if __name__ == "__main__":
    main()
