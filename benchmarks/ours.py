"""The project's training engine as a measured process: what `tools/pretrain.py` runs on each step, told to step by step.

Settings: flags, a list of command-line flags of tools/pretrain.py beyond the model's and the optimizer's, threads, and
micro, sequences of a micro-batch where that is not the workload's.
Ranks are what the launcher's variables say, as everywhere in the project.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.protocol import claim_stdout, serve, versions
from benchmarks.workload import Workload
from megatron_llm.config.flags import parse_run_config
from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import RunConfig
from megatron_llm.data.batch import Batch, Sample, collate
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.comm import barrier
from megatron_llm.parallel.failure import PhaseTracker
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.pretrain import count_parameters
from megatron_llm.training.session import Launch, choose_device, distributed, tune_process


def configuration(work: Workload, flags: Sequence[str], world_size: int) -> RunConfig:
    """The resolved configuration of the workload, with `flags` after its own, so that they win."""
    values = {
        "--model": "llama",
        "--num-layers": work.layers,
        "--hidden-size": work.hidden,
        "--ffn-hidden-size": work.ffn,
        "--num-attention-heads": work.heads,
        "--vocab-size": work.vocabulary,
        "--norm-epsilon": work.norm_eps,
        "--init-method-std": work.init_std,
        "--seq-length": work.length,
        "--global-batch-size": work.sequences,
        "--micro-batch-size": work.micro,
        "--seed": work.seed,
        "--lr": work.lr,
        "--adam-beta1": work.betas[0],
        "--adam-beta2": work.betas[1],
        "--adam-eps": work.eps,
        "--weight-decay": work.weight_decay,
        "--clip-grad": work.clip,
        "--distributed-timeout-seconds": 7200,  # ranks wait while other programs take their turn
    }
    words = ["--mock-data", "--device", "cpu"]
    for name, value in values.items():
        words += [name, str(value)]
    config = parse_run_config([*words, *flags])
    return resolve(config, world_size, get_family(config.model.model).violations)


def micro_batches(work: Workload, groups: ParallelGroups) -> list[Batch]:
    """This replica's micro-batches of the workload's batch, in the order of the project's loader."""
    ids = work.batch()
    positions, ones = torch.arange(work.length).numpy(), torch.ones(work.length).numpy()
    samples = [Sample(row[:-1], row[1:], ones, positions) for row in ids]
    starts = range(groups.dp.rank * work.micro, work.sequences, groups.dp.size * work.micro)
    return [collate(samples[start : start + work.micro]) for start in starts]


def step_of(engine: NativeEngine, work: Workload, batches: Sequence[Batch]) -> Callable[[], float | None]:
    """A function that takes the next optimizer step."""
    done = 0

    def step() -> float | None:
        nonlocal done
        outcome = engine.train_step(batches, step=done, first_sample=done * work.sequences, lr=work.lr)
        done += 1
        return outcome.loss

    return step


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    settings = json.loads(sys.argv[2])
    work = Workload.from_json(sys.argv[1])
    work = replace(work, micro=settings.get("micro", work.micro))
    launch = Launch.from_environment(os.environ)
    config = configuration(work, [*settings.get("flags", []), "--num-threads", str(settings["threads"])], launch.world_size)
    device = choose_device(config.parallel, launch)
    tune_process(config, launch, device)
    with distributed(config.parallel, launch, device, PhaseTracker()) as groups:
        engine = NativeEngine(config, get_family(config.model.model), groups)
        step = step_of(engine, work, micro_batches(work, groups))
        about = {"parameters": count_parameters(engine), "versions": versions("torch", "megatron_llm")}
        serve(step, about, answers, before=lambda: barrier(groups.world))


if __name__ == "__main__":
    main()
