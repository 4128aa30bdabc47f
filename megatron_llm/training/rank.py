"""A rank that is forked from a process which has imported its libraries already; see forked.py for the launcher's side."""

import atexit
import ctypes
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1


def run(arguments: Sequence[str], environment: Mapping[str, str], outputs: tuple[str | None, str | None]) -> None:
    """What `python -u SCRIPT ARGUMENTS` does in a session and environment of its own. Returns, or raises SystemExit with its status.

    `outputs` are the files that standard output and error go to; None leaves one as it is.
    """
    os.setsid()  # an interrupt from the keyboard is for the launcher, which decides what the ranks are told
    # kill -9 of all the launcher's processes is meant for this one as well.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        if path is not None:
            with open(path, "w") as file:
                os.dup2(file.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = list(arguments)
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception:  # noqa: BLE001 - told as Python tells what nobody caught
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
