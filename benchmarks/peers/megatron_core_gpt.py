"""Peer: megatron-core's GPTModel, its data-parallel wrapper, schedules and optimizer, on CPU processes with gloo.

Settings: precision bf16 | fp32, tp, pp, sequence_parallel, distributed_optimizer, overlap (of the gradients' reduction
with the backward), fused (its fusions by torch.compile: SwiGLU and cross-entropy), reduce_in_fp32, last_layers.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist

from benchmarks.peers import cuda_on_cpu
from benchmarks.protocol import claim_stdout, serve, versions
from benchmarks.workload import Workload


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    cuda_on_cpu.redirect()
    warnings.filterwarnings("ignore")
    from benchmarks.peers import megatron_core_model as peer  # after the redirection

    dist.init_process_group("gloo")
    cuda_on_cpu.redirect_imported()
    peer.initialize(work, settings)
    config = peer.transformer_config(work, settings)
    model = peer.build(work, settings, config)
    step = peer.step_of(work, settings, config, model)
    about = {"parameters": peer.parameters_of(model, dist.get_world_size()), "versions": versions("torch", "megatron-core")}
    serve(step, about, answers, before=dist.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
