"""`torchrun` with the same arguments, but a failure is told once, and on CPUs a run begins in less than half the time.

    python -m megatron_llm.training.launch --standalone --nproc-per-node 4 tools/pretrain.py ...

When a rank fails it has already said what was wrong in one sentence; torchrun would add a table of every rank and its
own stack below it, and the sentence would scroll away. The exit status is that of the first rank that failed.

Importing torch takes a processor more than a second, and torchrun has every rank do it. Here one process does, while the
launcher gets ready, and the ranks are forked from it. Not on machines with GPUs: libraries that drive them may not
survive a fork, and they have processors enough. `MEGATRON_LLM_FORK_RANKS=0` has every rank started afresh.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

_NOISY = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.run",
)
_VARIABLE = "MEGATRON_LLM_FORK_RANKS"
_GPUS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
# With these of torchrun's arguments what is run is no script, or is started in another way.
_OWN_WAY = ("-m", "--module", "--no-python", "--no_python", "--run-path", "--run_path")
# What the process that ranks are forked from imports: for any script, and for one of that name.
_NEEDED, _NEEDED_BY = "torch.distributed", {"pretrain.py": "megatron_llm.training.preload"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun; leave with the status of the first failed rank, or 128 + signal when the launcher itself was told to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    script = forkable_script(arguments, os.environ)
    if script is not None:
        _start_server(script)
    import logging

    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if script is not None:
        from megatron_llm.training.forked import fork_ranks

        fork_ranks()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A negative exit code is the signal that killed the rank.
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"rank {rank} ended first, with exit status {status}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def forkable_script(arguments: Sequence[str], environment: Mapping[str, str], gpus: Sequence[str] = _GPUS) -> str | None:
    """The script among torchrun's arguments, where its ranks are to be forked; None where they are to be started afresh."""
    if environment.get(_VARIABLE) == "0":
        return None
    script = next((argument for argument in arguments if argument.endswith(".py")), None)
    if script is None or not Path(script).is_file() or any(Path(name).exists() for name in gpus):
        return None
    own = arguments[: arguments.index(script)]
    return None if any(argument.partition("=")[0] in _OWN_WAY for argument in own) else script


def _start_server(script: str) -> None:
    """Start the process that ranks are forked from; it imports what they need while the launcher goes on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_NEEDED_BY.get(Path(script).name, _NEEDED)])
    # As torchrun has it for several ranks. It is read when torch is loaded; ranks set torch's threads themselves.
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        forkserver.ensure_running()
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


if __name__ == "__main__":
    main()
