"""How long a training takes to begin: from the command to the line of its first step, with the demo's four processes.

    python -m benchmarks.startup                        this checkout, median of 3
    python -m benchmarks.startup --before FOLDER        another checkout as well, in turn with this one

The commands are those that run_pretrain_gpt.sh prints with DRY_RUN=1 in each checkout: TP 2 x PP 2 on the CPU. Corpus,
tokenizer and dataset are made once, before; the index of the samples is built anew in each start, as in the first one of a
user. Shown are the seconds to the first line that any process writes, to the header, which is written when everything has
been built, and to the line of the first step. Then the training is told to stop, which is not timed.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import ROOT, Comparison, save, stamp, stamp_lines, table
from megatron_llm.utils.errors import UserError, run_command

LAUNCHER = "megatron_llm.training.launch"
HEADER, FIRST_STEP = re.compile(r"^model    "), re.compile(r"^step\s+1/")
# What the script sets for its processes.
VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}


@dataclass(frozen=True)
class Start:
    """Seconds from the command to three lines."""

    first_line: float
    header: float
    first_step: float


def commands(checkout: Path, output: Path) -> list[list[str]]:
    """The demo's commands in a checkout, in order; what they make goes to `output`."""
    script = checkout / "run_pretrain_gpt.sh"
    variables = os.environ | {"DRY_RUN": "1", "DEVICE": "cpu", "OUTPUT": str(output), "VENV": sys.prefix}
    done = subprocess.run(["sh", str(script)], env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{script} does not print its commands: {done.stderr.strip()}")
    return [shlex.split(line) for line in done.stdout.splitlines() if line.strip()]


def environment(checkout: Path) -> dict[str, str]:
    """The variables of a command of a checkout."""
    return {**os.environ, **VARIABLES, "PYTHONPATH": str(checkout)}


def prepare(output: Path) -> None:
    """Corpus, tokenizer and dataset: the commands ahead of the training."""
    for command in commands(ROOT, output):
        if LAUNCHER in command:
            return
        done = subprocess.run(command, env=environment(ROOT), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    raise UserError("run_pretrain_gpt.sh prints no command of a training")


def measure(checkout: Path, output: Path) -> Start:
    """Start the training of a checkout, and stop it after the line of its first step."""
    for name in ("checkpoint", "curves", "data/cache"):
        shutil.rmtree(output / name, ignore_errors=True)
    command = next(command for command in commands(checkout, output) if LAUNCHER in command)
    seen: list[str] = []
    times: dict[str, float] = {}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, env=environment(checkout), cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None, "made with a pipe"
        for line in process.stdout:
            now = time.perf_counter() - begin
            seen.append(line)
            times.setdefault("first_line", now)
            if HEADER.match(line):
                times["header"] = now
            if FIRST_STEP.match(line) and "first_step" not in times:
                times["first_step"] = now
                process.send_signal(signal.SIGTERM)
    if "first_step" not in times or "header" not in times:
        raise UserError(f"{shlex.join(command)} came to no first step:\n{''.join(seen)}")
    return Start(**times)


def row(name: str, starts: Sequence[Start]) -> list[str]:
    """Medians, and the fastest and the slowest first step."""
    steps = [one.first_step for one in starts]
    medians = [statistics.median(getattr(one, field) for one in starts) for field in ("first_line", "header", "first_step")]
    return [name, *(f"{value:.2f}" for value in medians), f"{min(steps):.2f}", f"{max(steps):.2f}"]


def main() -> None:
    """Prepare, measure in turn, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each checkout (default: 3)")
    parser.add_argument("--before", type=Path, help="another checkout, built in place, to start in turn with this one")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    checkouts = {"this checkout": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    starts: dict[str, list[Start]] = {name: [] for name in checkouts}
    stamped = stamp()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for _ in range(options.rounds):
            for which, checkout in checkouts.items():
                starts[which].append(measure(checkout, Path(name)))
    heads = ("start of the demo, TP 2 x PP 2, seconds to", "the first line", "the header", "the first step", "fastest", "slowest")
    print(stamp_lines(stamped), "\n")
    print(table(heads, [row(which, found) for which, found in starts.items()]))
    if options.json is not None:
        steps = {which: statistics.median(one.first_step for one in found) for which, found in starts.items()}
        what = "command to first step, demo, TP 2 x PP 2, four processes"
        compared = [Comparison("startup", what, "s", "before", steps["this checkout"], steps["before"])] if options.before else []
        save(options.json, "startup", compared, starts={which: [asdict(one) for one in found] for which, found in starts.items()})


if __name__ == "__main__":
    run_command(main)
