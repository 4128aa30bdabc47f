"""From how the process was started to its groups: rank, device, backend, threads.

`torchrun` (or Slurm through it) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them the
process is alone and needs no process group at all. This is the only module that reads the launcher's variables.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_llm.checkpoint.exchange import gather_json
from megatron_llm.config.schema import ParallelConfig, RunConfig
from megatron_llm.config.serialize import flatten, to_dict
from megatron_llm.parallel import shm
from megatron_llm.parallel.failure import PhaseTracker, rank_guard
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.groups import ParallelGroups, build_groups, single_process_groups
from megatron_llm.utils.allocator import huge_pages_for_heap, keep_freed_memory
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Which process of how many this is, over all machines and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "Launch":
        """What the launcher set; UserError when it set only a part or something that is not a number."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = {name: environment[name] for name in names if name in environment}
        if not given:
            return Launch()
        missing = [name for name in names[:3] if name not in given]
        if missing:
            raise UserError(f"{', '.join(given)} set but {', '.join(missing)} not: start with torchrun, or unset {', '.join(given)}")
        try:
            values = {name.lower(): int(value) for name, value in given.items()}
        except ValueError as error:
            raise UserError(f"the launcher's variables must be whole numbers, got {given}") from error
        values.setdefault("local_world_size", values["world_size"])
        return Launch(**values)


def choose_device(parallel: ParallelConfig, launch: Launch) -> torch.device:
    """The device of this process: its own GPU when there are GPUs and the configuration does not say cpu."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if parallel.device == "cpu" or (parallel.device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UserError("--device cuda was asked for but no GPU is usable here: check the driver, or use --device cpu")
    if launch.local_rank >= available:
        raise UserError(
            f"{launch.local_world_size} processes were started on a machine with {available} GPUs: "
            f"set GPUS_PER_NODE to {available}, or use --device cpu"
        )
    return torch.device("cuda", launch.local_rank)


def choose_threads(configured: int | None, launch: Launch, cores: int) -> int:
    """Torch threads of this process: what was asked for, else an equal share of the cores its machine has."""
    return configured if configured is not None else max(1, cores // launch.local_world_size)


def tune_process(config: RunConfig, launch: Launch, device: torch.device) -> str:
    """Set what makes the steps of a process fast; what was set, in a line.

    Its threads, and on a CPU an allocator that keeps freed memory, in huge pages, and arithmetic that takes numbers too small for their
    exponent as zero, which some processors are slow at.
    """
    threads = choose_threads(config.train.num_threads, launch, usable_cores())
    torch.set_num_threads(threads)
    done = [f"{threads} thread{'s' if threads > 1 else ''} each"]
    if device.type == "cpu":
        if keep_freed_memory():
            done += ["freed memory is kept in huge pages" if huge_pages_for_heap() else "freed memory is kept"]
        done += ["denormal numbers are zero"] if torch.set_flush_denormal(True) else []
    return ", ".join(done)


@contextmanager
def distributed(parallel: ParallelConfig, launch: Launch, device: torch.device, phase: PhaseTracker) -> Iterator[ParallelGroups]:
    """The groups of this process for the block's duration.

    Sets the GPU, initialises `torch.distributed` when there is more than one process, guards the block (any rank's
    failure ends all, and the first is named), and takes the process group down again. On an error it is left alone:
    taking it down would wait for ranks that may never come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    grid = Grid.from_world(launch.world_size, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    if launch.world_size == 1:
        yield single_process_groups(device)
        return
    seconds = parallel.distributed_timeout_seconds
    # A little longer than the guard's, which knows more about what went wrong and so should speak first.
    timeout = timedelta(seconds=seconds + 60)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    with rank_guard(grid, rank, store, phase, timeout=seconds):
        phase.enter("meeting the other ranks")
        backend = choose_backend(parallel.distributed_backend, device, dist.PrefixStore("backend", store), rank, world_size)
        dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=world_size, timeout=timeout)
        yield build_groups(grid, device, timeout)
        phase.enter("leaving")
        dist.destroy_process_group()


def choose_backend(configured: str, device: torch.device, store: dist.Store, rank: int, world_size: int) -> str:
    """The backend of this run, registered where it is our own. Collective over the ranks that share `store`.

    `auto` is NCCL on GPUs; on CPUs shared memory where every rank is on this host and it works, else gloo, with one line
    on rank 0 that says why. UserError when `shm` was asked for and cannot be used.
    """
    if device.type == "cuda":
        if configured == shm.BACKEND:
            raise UserError("--distributed-backend shm moves CPU memory only: use nccl (or auto) with GPUs, or --device cpu")
        return "nccl" if configured == "auto" else configured
    if configured not in ("auto", shm.BACKEND):
        return configured
    reason = shm.why_not(store, rank, world_size)
    if not reason:
        shm.register()
        return shm.BACKEND
    if configured == shm.BACKEND:
        raise UserError(f"--distributed-backend shm cannot be used, {reason}: use gloo (or auto)")
    if rank == 0:
        print(f"distributed backend: gloo and not the faster shm, {reason}", file=sys.stderr, flush=True)
    return "gloo"


def require_equal_flags(config: RunConfig, groups: ParallelGroups) -> None:
    """UserError, on every rank, naming the first setting that two ranks were started with differently. Collective.

    Ranks with different settings would wait for each other in different places, or train something that nobody meant.
    """
    everyone = gather_json(flatten(to_dict(config), "the configuration"), groups)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"{groups.grid.describe(rank)} was started with {name} {theirs[name]!r}, rank 0 with {value!r}: "
                    "start every machine with the same settings"
                )


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
