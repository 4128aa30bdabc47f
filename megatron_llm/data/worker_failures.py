"""How what goes wrong in another process is told in the main one: a sentence for the user, a stack for everything else."""

import signal
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megatron_llm.utils.errors import UserError


class WorkerFailure(RuntimeError):
    """A worker's function raised; the message is its stack."""


@dataclass(frozen=True)
class Failure:
    """What went wrong, on its way to the main process: the sentence of a UserError, or the stack of anything else."""

    message: str
    user_error: bool

    @staticmethod
    def of(error: Exception) -> "Failure":
        """What to tell of `error`, which is being handled."""
        if isinstance(error, UserError):
            return Failure(str(error), True)
        return Failure(f"a worker process failed:\n{traceback.format_exc()}", False)

    def exception(self) -> Exception:
        """What to raise in the main process."""
        return UserError(self.message) if self.user_error else WorkerFailure(self.message)


def tell(pipe: Connection, message: object) -> None:
    """Send a message, unless nobody listens any more."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return


def how_it_ended(code: int | None) -> str:
    """An exit status in words, as the end of "it died, ...", with the usual cause where there is one."""
    if code is None:
        return "nobody knows how"
    if code >= 0:
        return f"with exit status {code}"
    hint = " (out of memory is the usual cause: use fewer --workers)" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
