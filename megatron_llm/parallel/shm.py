"""The `shm` backend of `torch.distributed`: CPU ranks of one host talk through shared memory instead of sockets.

The work is done in C++ (`csrc/shm`, built as `megatron_llm._shm`); this module registers it with torch and decides
whether a run can use it, which all ranks must answer alike: they meet in the store, and one rank that cannot makes all
of them use gloo.

    register()
    dist.init_process_group("shm", store=store, rank=rank, world_size=world_size)
"""

import importlib
import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llm.utils.errors import UserError

BACKEND = "shm"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACES = ("pid", "ipc", "user")  # ranks in different ones do not see each other's processes or memory
SELF_TEST_TIMEOUT = timedelta(seconds=60)


def why_not_here() -> str:
    """Why this process cannot use the backend, as the end of a sentence; empty when it can."""
    if not BOOT_ID.exists():
        return "shared-memory collectives need Linux"
    try:
        _extension()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "megatron_llm._shm"
        return "the extension megatron_llm._shm is not built" if missing else f"the extension megatron_llm._shm does not load: {error}"
    return ""


def register() -> None:
    """Make `shm` known to `torch.distributed`; UserError where it cannot be used. Calling it again does nothing."""
    reason = why_not_here()
    if reason:
        raise UserError(f"distributed backend shm cannot be used here, {reason}: run run_install_environment.sh, or use gloo")
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def host_identity() -> str:
    """A text that two processes share when they run under one kernel and see each other's processes."""
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES] if BOOT_ID.exists() else []
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return " ".join([socket.gethostname(), boot, str(os.getuid()), *spaces])


def why_not(store: dist.Store, rank: int, world_size: int, self_test: bool = True) -> str:
    """Why these ranks cannot use the backend, the same text on all of them; empty when they can. Collective.

    They can when all are on one host, the extension loads on each, and (unless `self_test` is false) a small sum over all
    of them comes out right.
    """
    store = dist.PrefixStore("shm", store)
    store.set(f"host/{rank}", json.dumps([host_identity(), why_not_here()]))
    seen = [json.loads(store.get(f"host/{other}")) for other in range(world_size)]
    hosts = {identity for identity, _ in seen}
    if len(hosts) > 1:
        names = sorted({identity.split()[0] for identity in hosts})
        return f"the ranks are on {len(hosts)} hosts or in separate containers ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
    reasons = [reason for _, reason in seen if reason]
    if reasons or not self_test:
        return reasons[0] if reasons else ""
    store.set(f"test/{rank}", _self_test(dist.PrefixStore("test", store), rank, world_size))
    verdicts = [store.get(f"test/{other}").decode() for other in range(world_size)]
    return next((verdict for verdict in verdicts if verdict), "")


def _self_test(store: dist.Store, rank: int, world_size: int) -> str:
    """Sum the ranks' numbers over all of them; what went wrong, or nothing."""
    try:
        group = _extension().create(store, rank, world_size, SELF_TEST_TIMEOUT, list(range(world_size)), _crowded(world_size))
        numbers = torch.arange(1000, dtype=torch.float32) + rank
        group.allreduce([numbers], dist.AllreduceOptions()).wait()
        group.shutdown()
    except dist.DistError as error:
        return f"its self-test failed: {error}"
    expected = torch.arange(1000, dtype=torch.float32) * world_size + world_size * (world_size - 1) / 2
    return "" if torch.equal(numbers, expected) else "its self-test gave a wrong sum"


def _create(options: Any, _: Any) -> Any:
    """What `torch.distributed` calls for each new group: the backend object of this rank."""
    names = list(options.global_ranks_in_group) or list(range(options.group_size))
    ranks_here = dist.get_world_size() if dist.is_initialized() else options.group_size
    return _extension().create(options.store, options.group_rank, options.group_size, options.timeout, names, _crowded(ranks_here))


def _crowded(ranks: int) -> bool:
    """Whether ranks must share cores, so that one that waits has to make room for the one it waits for."""
    return ranks > len(os.sched_getaffinity(0))


def _extension() -> Any:
    return importlib.import_module("megatron_llm._shm")
