"""Errors meant for the person at the keyboard.

A `UserError` is one sentence: what was given, what was expected, what to change. Command-line entry points print it
without a stack and leave with status 1; everything else is a defect of ours and keeps its stack.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, told in one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run_command(main: Callable[[], None]) -> None:
    """Run a tool's main function; a UserError becomes one line on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
