"""Peer on a GPU: megatron-core's GPTModel of its local modules (without Transformer Engine), its schedule and its optimizer.

Settings: device, precision bf16 | fp32, fused (its fusions by torch.compile: SwiGLU and cross-entropy), warmup.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist

from benchmarks.gpu.process import device_of, warm_up_and_serve
from benchmarks.peers import cuda_on_cpu
from benchmarks.protocol import claim_stdout, versions
from benchmarks.workload import Workload
from megatron_llm.utils.errors import UserError, run_command
from megatron_llm.utils.optional import available

PACKAGE = "megatron-core==0.16.1"


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    if not available("megatron.core"):
        raise UserError(f"megatron-core is not installed in {sys.executable}: pip install {PACKAGE}")
    device = device_of(settings)
    if device.type == "cpu":
        cuda_on_cpu.redirect()
    warnings.filterwarnings("ignore")
    from benchmarks.peers import megatron_core_model as peer  # after the redirection

    if device.type == "cpu":
        cuda_on_cpu.redirect_imported()
    # One process: its groups of one rank need neither a network nor a launcher.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(work.seed)
    peer.initialize(work, settings)
    config = peer.transformer_config(work, settings)
    model = peer.build(work, settings, config)
    about = {"parameters": peer.parameters_of(model, 1), "versions": versions("torch", "megatron-core")}
    warm_up_and_serve(peer.step_of(work, settings, config, model), about, settings, answers, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
