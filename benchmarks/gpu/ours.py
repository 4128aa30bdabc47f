"""The project's training engine on a GPU as a measured process.

Settings: device, flags (of tools/pretrain.py, beyond the workload's own), warmup.
"""

import json
import os
import sys

from benchmarks.gpu.process import device_of, warm_up_and_serve
from benchmarks.ours import configuration, micro_batches, step_of
from benchmarks.protocol import claim_stdout, versions
from benchmarks.workload import Workload
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.pretrain import count_parameters
from megatron_llm.utils.errors import run_command


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    device = device_of(settings)
    config = configuration(work, ["--device", device.type, *settings["flags"]], 1)
    groups = single_process_groups(device)
    engine = NativeEngine(config, get_family(config.model.model), groups)
    about = {"parameters": count_parameters(engine), "versions": versions("torch"), "process": os.getpid()}
    warm_up_and_serve(step_of(engine, work, micro_batches(work, groups)), about, settings, answers, device)


if __name__ == "__main__":
    run_command(main)
