"""One call in a process of its own, while the caller goes on."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_llm.data.worker_failures import Failure, how_it_ended, tell
from megatron_llm.utils.errors import UserError

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Calls `call`, which must be picklable as its result, in a process of the given name. Use as a context manager.

    A UserError that it raises is raised by `result`, anything else becomes a WorkerFailure, and a process that dies is a UserError.
    """

    def __init__(self, call: Callable[[], Result], name: str) -> None:
        context = multiprocessing.get_context("forkserver")  # see WorkerPool.start
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(theirs, call), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> bool:
        """Whether `result` would not have to wait. Not to be asked after it."""
        return self._pipe.poll()

    def result(self) -> Result:
        """What the call returned. To be asked for once."""
        try:
            answer: Any = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            how = how_it_ended(self._process.exitcode)
            raise UserError(f"the process {self._process.name!r} died, {how}; run the command again") from error
        if isinstance(answer, Failure):
            raise answer.exception()
        result: Result = answer
        return result

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> "Background[Result]":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _answer(pipe: Connection, call: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        answer = call()
    except Exception as error:  # noqa: BLE001 - told to the main process, which raises it
        answer = Failure.of(error)
    tell(pipe, answer)
