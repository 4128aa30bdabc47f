"""Programs that take turns: each is started once, warmed up, and then takes one measured step at a time.

Speeds of one machine drift by tens of percent within minutes, so programs measured one after the other cannot be
compared. Here A takes a step, then B, then C, then A again; medians of such steps see the same machine.
"""

import json
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.workload import Workload

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 900.0  # imports, building the model, meeting the other ranks
STEP_SECONDS = 1800.0  # a first step may compile


class ProgramError(Exception):
    """A program did not start or did not answer; the message is the reason in one line."""


@dataclass(frozen=True)
class Program:
    """How to start one configuration of one program.

    name       what the table calls it
    python     its interpreter
    module     what is run with -m; it speaks benchmarks/protocol.py
    settings   handed to it as JSON
    ranks      processes
    role       "ours": the project's own, to be compared with the best of the "peer"s; "beside": neither
    variables  environment beyond the driver's
    """

    name: str
    python: str
    module: str
    settings: Mapping[str, Any]
    ranks: int = 1
    role: Literal["ours", "peer", "beside"] = "peer"
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One step: the slowest rank's seconds, processor seconds of all ranks, and the loss of the rank that knows it."""

    seconds: float
    cpu: float
    loss: float | None


class Running:
    """A started program. Use it as a context: the processes end with the block."""

    def __init__(self, program: Program, work: Workload, log: Path) -> None:
        self.program, self.log, self.about = program, log, {}  # type: Program, Path, dict[str, Any]
        port = _free_port()
        with log.open("wb") as errors:
            self._processes = [self._start(rank, port, work, errors) for rank in range(program.ranks)]

    def _start(self, rank: int, port: int, work: Workload, errors: Any) -> "subprocess.Popen[str]":
        program = self.program
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(program.settings["threads"]), **program.variables}
        if program.ranks > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            variables |= {"WORLD_SIZE": str(program.ranks), "LOCAL_WORLD_SIZE": str(program.ranks), "GLOO_SOCKET_IFNAME": "lo"}
        command = [program.python, "-m", program.module, work.to_json(), json.dumps(program.settings)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, cwd=self.log.parent
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wait_ready(self) -> dict[str, Any]:
        """What the first rank tells about itself: parameters, versions. ProgramError when a rank does not start."""
        self.about = self._answers(START_SECONDS)[0]
        return self.about

    def step(self) -> Answer:
        """Let all ranks take one step."""
        for process in self._processes:
            assert process.stdin is not None, "made with a pipe"
            try:
                process.stdin.write("step\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise ProgramError(self._reason()) from error
        answers = self._answers(STEP_SECONDS)
        losses = [answer["loss"] for answer in answers if answer["loss"] is not None]
        return Answer(
            max(answer["seconds"] for answer in answers), sum(answer["cpu"] for answer in answers), losses[-1] if losses else None
        )

    def peak_memory(self) -> int | None:
        """Largest resident memory so far, bytes, summed over the ranks; None where the system does not tell."""
        total = 0
        for process in self._processes:
            status = Path(f"/proc/{process.pid}/status")
            lines = status.read_text().splitlines() if status.exists() else []
            peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
            if peak is None:
                return None
            total += int(peak) * 1024
        return total

    def close(self) -> None:
        """End the processes: ask, then insist."""
        for process in self._processes:
            if process.poll() is None and process.stdin is not None:
                try:
                    process.stdin.write("quit\n")
                    process.stdin.close()
                except BrokenPipeError:
                    continue  # it ended between the two lines
        limit = time.monotonic() + 10
        for process in self._processes:
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        """One line of each rank. A rank that is silent for too long is ended, which ends the read."""
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        try:
            return [self._answer(process) for process in self._processes]
        finally:
            timer.cancel()

    def _answer(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None, "made with a pipe"
        line = process.stdout.readline()
        if not line:
            self._kill()
            raise ProgramError(self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _reason(self) -> str:
        """The last line that the program wrote to its standard error."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or line.startswith("error")]
        return (errors or lines or ["it ended without a word"])[-1][:300]


@dataclass
class Series:
    """The measured steps of one program, or why there are none."""

    program: Program
    about: dict[str, Any] = field(default_factory=dict)
    first_losses: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median seconds of a step; infinite when it did not run."""
        return statistics.median(self.seconds) if self.seconds else float("inf")

    @property
    def best(self) -> float:
        """Fewest seconds of a step; infinite when it did not run."""
        return min(self.seconds, default=float("inf"))

    def as_json(self) -> dict[str, Any]:
        """A row of the JSON file."""
        row: dict[str, Any] = {"name": self.program.name, "role": self.program.role, "ranks": self.program.ranks, **self.about}
        row |= {"settings": dict(self.program.settings), "variables": dict(self.program.variables)}
        if self.failure is not None:
            return {**row, "not_run": self.failure}
        return {
            **row,
            "median_s": self.median,
            "min_s": self.best,
            "cpu_s": min(self.cpu),
            "seconds": self.seconds,
            "first_losses": self.first_losses,
            "peak_rss_bytes": self.peak_memory,
        }


def interleave(
    programs: Sequence[Program], work: Workload, *, rounds: int, warmup: int, folder: Path, say: Callable[[str], None]
) -> list[Series]:
    """Start all, warm each up alone, then let them take turns `rounds` times. One that fails keeps its reason; the others go on."""
    found = [Series(program) for program in programs]
    alive: dict[int, Running] = {}
    try:
        for number, series in enumerate(found):
            _start(number, series, work, warmup, folder, alive, say)
        for turn in range(rounds):
            for number, series in enumerate(found):
                if number in alive:
                    _measure(number, series, alive)
            say(f"round {turn + 1} of {rounds}")
        for number, running in alive.items():
            found[number].peak_memory = running.peak_memory()
    finally:
        for running in alive.values():
            running.close()
    return found


def _start(
    number: int, series: Series, work: Workload, warmup: int, folder: Path, alive: dict[int, Running], say: Callable[[str], None]
) -> None:
    program = series.program
    if not Path(program.python).exists():
        series.failure = f"no environment at {program.python}"
        say(f"{program.name}: not run: {series.failure}")
        return
    began = time.monotonic()
    running = Running(program, work, folder / f"{number:02d}.log")
    try:
        series.about = running.wait_ready()
        series.first_losses = [running.step().loss for _ in range(warmup)]
    except ProgramError as error:
        running.close()
        series.failure = str(error)
        say(f"{program.name}: not run: {series.failure}")
        return
    except BaseException:
        running.close()
        raise
    alive[number] = running
    say(f"{program.name}: ready after {time.monotonic() - began:.0f} s, losses {', '.join(_loss(loss) for loss in series.first_losses)}")


def _measure(number: int, series: Series, alive: dict[int, Running]) -> None:
    try:
        answer = alive[number].step()
    except ProgramError as error:
        alive.pop(number).close()
        series.failure = f"failed after {len(series.seconds)} steps: {error}"
        return
    series.seconds.append(answer.seconds)
    series.cpu.append(answer.cpu)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
