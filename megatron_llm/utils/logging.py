"""Log lines that say which rank wrote them.

Modules log through the standard library (`logging.getLogger(__name__)`); a run calls `configure_logging` once, which
gives every line of the package this rank's coordinates. By default rank 0 shows information, the other ranks warnings
and errors only. `warn_once` is for advice that would otherwise appear at every step.
"""

import logging
import sys
from typing import TextIO

PACKAGE = "megatron_llm"


class _Format(logging.Formatter):
    """`12:03:05 [rank 5 (tp 1, dp 0, pp 1)] warning: text`; the level is left out of plain information."""

    def __init__(self, where: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._where = f" [{where}]" if where else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        text = f"{self.formatTime(record, self.datefmt)}{self._where}{level} {record.getMessage()}"
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


class _DropRepeats(logging.Filter):
    """Lets a record marked `once` pass the first time only."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "once", False):
            return True
        text = record.getMessage()
        first = text not in self._seen
        self._seen.add(text)
        return first


def configure_logging(where: str = "", *, quiet: bool = False, stream: TextIO | None = None) -> logging.Logger:
    """Send the package's log lines to `stream` (default stderr), each marked with `where`, this rank's coordinates.

    `quiet` shows warnings and errors only: for every rank but 0. Calling it again replaces the former setting.
    """
    logger = logging.getLogger(PACKAGE)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Format(where))
    handler.addFilter(_DropRepeats())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False  # a library that configures the root logger must not double every line
    return logger


def warn_once(logger: logging.Logger, message: str) -> None:
    """A warning that appears once in a run, however often it is given."""
    logger.warning("%s", message, extra={"once": True})
