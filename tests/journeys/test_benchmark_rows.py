"""Parts of the benchmark that need no peer: what a start is measured by, and what a peer that fails leaves."""

import sys
from pathlib import Path

import pytest

from benchmarks import data_index, startup
from megatron_llm.utils.errors import UserError

_TRAINING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
for line in {lines!r}:
    time.sleep(0.05)
    print(line, flush=True)
time.sleep({rest})
"""


def checkout(folder: Path, lines: list[str], rest: float) -> Path:
    """A folder whose script prints two commands, the second of which says `lines` and then waits."""
    folder.mkdir()
    (folder / "training.py").write_text(_TRAINING.format(lines=lines, rest=rest))
    training = f"{sys.executable} {folder / 'training.py'} -m {startup.LAUNCHER}"
    (folder / "run_pretrain_gpt.sh").write_text(f'echo "{sys.executable} --version"\necho "{training}"\n')
    return folder


def test_a_start_is_measured_to_its_three_lines_and_then_stopped(tmp_path: Path) -> None:
    """The training waits much longer than the test may: it is told to stop after its first step."""
    made = checkout(tmp_path / "checkout", ["starting", "model    LLaMA", "step        1/300", "step        2/300"], rest=600.0)
    (tmp_path / "out" / "data" / "cache").mkdir(parents=True)
    found = startup.measure(made, tmp_path / "out")
    assert 0.05 < found.first_line < found.header < found.first_step < 60
    assert not (tmp_path / "out" / "data" / "cache").exists(), "each start builds the index anew"
    assert startup.row("here", [found, found])[0] == "here"


@pytest.mark.parametrize("lines", [["error: no"], ["model    LLaMA", "step       10/300"]], ids=["an error", "no first step"])
def test_a_training_without_a_first_step_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    made = checkout(tmp_path / "checkout", lines, rest=0.0)
    with pytest.raises(UserError, match="came to no first step") as caught:
        startup.measure(made, tmp_path / "out")
    assert lines[-1] in str(caught.value)


def test_a_script_that_fails_is_said(tmp_path: Path) -> None:
    (tmp_path / "run_pretrain_gpt.sh").write_text("echo 'error: DEVICE is what?' >&2\nexit 1\n")
    with pytest.raises(UserError, match="does not print its commands: error: DEVICE is what"):
        startup.commands(tmp_path, tmp_path / "out")


def test_a_peer_that_fails_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = data_index._Large(wall=2.0, cpu=1.0, peak=10, digests={"documents": "a"})

    def alone(side: str, *arguments: object) -> data_index._Large:
        if side == "core":
            raise MemoryError("no room")
        return ours

    monkeypatch.setattr(data_index, "_alone", alone)
    (row,) = data_index.large_rows(5, 4, tmp_path)
    assert (row.ours, row.core, row.failure) == (2.0, None, "megatron-core ended with MemoryError: no room")


def test_a_peer_with_another_result_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data_index, "_alone", lambda side, *_: data_index._Large(1.0, 1.0, 1, {"documents": side}))
    with pytest.raises(SystemExit, match="documents of 5 documents differs"):
        data_index.large_rows(5, 4, tmp_path)
