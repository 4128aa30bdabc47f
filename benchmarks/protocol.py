"""What a measured process speaks: one line of JSON for each line it is told, on the standard streams it was started with.

A program is started once, warms up, and then takes one step each time it is told to, so that a driver can let several
programs take turns; while one works the others wait in a read and use no processor time.

    process -> driver   {"ready": true, "parameters": ..., "versions": {...}, ...}
    driver  -> process  step
    process -> driver   {"seconds": ..., "cpu": ..., "loss": ...}
    driver  -> process  quit

Standard library only, since it also runs in the peers' environments. What libraries print goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, TextIO


def claim_stdout() -> TextIO:
    """The real standard output, for answers alone; whatever prints from now on prints to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def versions(*packages: str) -> dict[str, str]:
    """Versions of these installed packages."""
    return {package: metadata.version(package) for package in packages}


def timed(step: Callable[[], float | None], before: Callable[[], Any]) -> dict[str, float | None]:
    """One step: seconds by the clock, seconds of processor time of this process, and the loss it gives (None: not here)."""
    before()
    clock, cpu = time.perf_counter(), time.process_time()
    loss = step()
    return {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu, "loss": loss}


def serve(step: Callable[[], float | None], about: dict[str, Any], answers: TextIO, before: Callable[[], Any] = lambda: None) -> None:
    """Answer until told to quit or the driver is gone. `before` runs ahead of each step outside the time: a barrier of the ranks."""
    print(json.dumps({"ready": True, **about}), file=answers, flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "quit":
            return
        if word != "step":
            raise ValueError(f"told {word!r}, expected step or quit")
        print(json.dumps(timed(step, before)), file=answers, flush=True)
