"""One warm process of the rank pool: waits for a job, joins its process group, runs one function, reports, waits again.

A worker that fails reports and leaves: its sockets close, so ranks that wait for it fail at once instead of at the
timeout, and no broken state reaches the next job. It also leaves when its parent is gone, however that went.
"""

import faulthandler
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llm.parallel import shm
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.groups import build_groups

STACK_SIGNAL = signal.SIGUSR1  # asks a worker to write the Python stacks of its threads into its log
TIMEOUT_MARGIN = timedelta(seconds=30)  # collectives outlive the job's timeout, so that the parent gets to show the stacks


@dataclass(frozen=True)
class Job:
    """One rank's share of a `run_ranks` call; `call` is the pickled (args, kwargs), opened only once `path` is set."""

    grid: Grid
    rank: int
    rendezvous: str
    timeout: float
    path: tuple[str, ...]
    module: str
    module_file: str | None
    name: str
    call: bytes
    backend: str


@dataclass(frozen=True)
class Reply:
    """What a rank sends back: the pickled result, or an error with the moment it happened (one clock for all ranks)."""

    result: bytes | None = None
    error: str = ""
    error_type: str = ""
    stack: str = ""
    moment: float = 0.0


def unpack(data: bytes) -> Any:
    """Unpickle what this harness pickled a moment ago in a process of its own."""
    return pickle.loads(data)  # noqa: S301


def worker_main(connection: Connection, log: str) -> None:
    """Serve jobs that arrive on `connection` until it closes. Everything printed goes to the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(file=2)
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group; the parent decides
    threading.Thread(target=leave_with_parent, daemon=True).start()
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])  # host names need not resolve
    torch.set_num_threads(1)
    connection.send_bytes(pickle.dumps(Reply()))  # ready
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        reply = run_job(unpack(message))
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(pickle.dumps(reply))
        if reply.result is None:
            os._exit(0)


def leave_with_parent() -> None:
    """Leave when the parent process ends, even by SIGKILL and even if this one hangs in a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a pool worker is always started by a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def run_job(job: Job) -> Reply:
    """Run one job in a fresh process group, random state and default dtype; never raises."""
    try:
        sys.path[:] = job.path
        function = find_function(job)
        args, kwargs = unpack(job.call)
        random.seed(0)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        limit = timedelta(seconds=job.timeout) + TIMEOUT_MARGIN
        if job.backend == shm.BACKEND:
            shm.register()
        dist.init_process_group(
            job.backend, init_method=f"file://{job.rendezvous}", rank=job.rank, world_size=job.grid.world_size, timeout=limit
        )
        groups = build_groups(job.grid, torch.device("cpu"), limit)
        result = pickle.dumps(function(groups, *args, **kwargs))
        del groups
        dist.destroy_process_group()
        return Reply(result=result)
    except BaseException as error:  # noqa: BLE001 - every failure, SystemExit too, is reported to the parent
        summary = "".join(traceback.format_exception_only(error)).strip()
        stack = "".join(traceback.format_exception(error))
        return Reply(error=summary, error_type=type(error).__name__, stack=stack, moment=time.monotonic())


def find_function(job: Job) -> Callable[..., Any]:
    """The function by module and qualified name; a module that is on no import path is loaded from its file."""
    try:
        found: Any = importlib.import_module(job.module)
    except ModuleNotFoundError as error:
        if error.name is None or not job.module.startswith(error.name) or job.module_file is None:
            raise
        spec = importlib.util.spec_from_file_location(job.module, Path(job.module_file))
        if spec is None or spec.loader is None:
            raise
        found = importlib.util.module_from_spec(spec)
        sys.modules[job.module] = found
        spec.loader.exec_module(found)
    for part in job.name.split("."):
        found = getattr(found, part)
    return found
