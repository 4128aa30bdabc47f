"""Ranks forked from one process in which their libraries are imported, for torchrun, which would start each of them afresh.

torchrun starts a rank through a handler and sees it as a `subprocess.Popen`. Here is a handler whose process comes from the
fork server of `multiprocessing`; what torchrun does with it (redirection, signals, exit statuses, restarts) stays torchrun's.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from megatron_llm.training.rank import run


class ForkedProcess:
    """As much of `subprocess.Popen` as torchrun uses."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], outputs: tuple[str | None, str | None]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=run, args=(list(arguments), dict(environment), outputs))
        self._process.start()
        assert self._process.pid is not None, "it has been started"
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, that of a signal below 0; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, as soon as there is one; subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status


class ForkedHandler(SubprocessHandler):
    """torchrun's handler of a rank; the process is forked where a Python script is to be run, and started afresh otherwise."""

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        if args[:2] != (sys.executable, "-u") or not args[2].endswith(".py"):
            return super()._popen(args, env)
        outputs = tuple(stream.name if stream is not None else None for stream in (self._stdout, self._stderr))
        return ForkedProcess(args[2:], env, outputs)  # type: ignore[arg-type] # two of them

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Send a signal to the rank and those it has started."""
        try:
            super().close(death_sig)
        except ProcessLookupError:  # it has not come to make its session yet
            os.kill(self.proc.pid, death_sig or signal.SIGTERM)


def fork_ranks() -> None:
    """From now on torchrun, in this process, starts ranks by `ForkedHandler`."""
    api.get_subprocess_handler = ForkedHandler  # type: ignore[assignment]
