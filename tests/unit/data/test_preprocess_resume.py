"""A preprocessing run that was stopped goes on where it was, and its output is the one of an uninterrupted run."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_llm.data import preprocess_output, sources
from megatron_llm.data.encoder import EncodedTexts
from megatron_llm.data.preprocess import PreprocessSettings, preprocess
from megatron_llm.data.preprocess_output import WorkFolder
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.progress import Progress

ROOT = Path(__file__).parents[3]


class Crash(BaseException):
    """Stands for the end of the process at some instant."""


def _corpus(folder: Path, count: int = 60) -> list[Path]:
    """Four files of different kinds."""
    folder.mkdir()
    records = [{"text": f"document {i} " + "x" * (i * 13 % 97), "title": f"t{i}"} for i in range(4 * count)]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "a.jsonl").write_text("".join(lines[:count]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[count : 2 * count]).encode()))
    (folder / "c.json").write_text(json.dumps(records[2 * count : 3 * count]))
    (folder / "d.jsonl").write_text("".join(lines[3 * count :]))
    return sorted(folder.iterdir())


def _settings(folder: Path, output: str = "out") -> PreprocessSettings:
    keys = ("text", "title")
    return PreprocessSettings(
        (str(folder / "in"),), str(folder / output), "ByteTokenizer", json_keys=keys, append_eod=True, workers=0, resume_seconds=0
    )


def _output(folder: Path, name: str = "out") -> dict[str, bytes]:
    paths = sorted(folder.glob(f"{name}_*"))
    assert len(paths) == 6 and not list(folder.glob("*.partial"))
    return {path.name.removeprefix(name): path.read_bytes() for path in paths}


def _crash_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """The run ends in the middle of adding the block after so many."""
    add, seen = WorkFolder.add, 0

    def crash(work: WorkFolder, texts: dict[str, EncodedTexts]) -> None:
        nonlocal seen
        seen += 1
        if seen > blocks:
            add(work, {"text": texts["text"]})  # one key is ahead of the other
            raise Crash
        add(work, texts)

    monkeypatch.setattr(WorkFolder, "add", crash)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few lines, so that small files have many."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 700)


@pytest.mark.parametrize("blocks", [0, 1, 5, 9, 12, 20, 31])
def test_crash_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], blocks: int) -> None:
    _corpus(tmp_path / "in")
    preprocess(_settings(tmp_path, "straight"))
    with monkeypatch.context() as patch:
        _crash_after(patch, blocks)
        with pytest.raises(Crash):
            preprocess(_settings(tmp_path))
    assert not list(tmp_path.glob("out_*"))
    capsys.readouterr()
    preprocess(_settings(tmp_path))
    assert ("going on where an earlier run stopped" in capsys.readouterr().err) == (blocks > 0)
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _corpus(tmp_path / "in")
    settings = replace(_settings(tmp_path), resume_seconds=1e9)
    shown = 0

    def interrupt(*arguments: object, **counters: float) -> None:
        nonlocal shown
        shown += 1
        if shown == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            preprocess(settings)
    capsys.readouterr()
    preprocess(settings)
    assert "going on where an earlier run stopped" in capsys.readouterr().err
    preprocess(_settings(tmp_path, "straight"))
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_several_crashes_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _corpus(tmp_path / "in")
    preprocess(_settings(tmp_path, "straight"))
    crashes = 0
    with monkeypatch.context() as patch:
        _crash_after(patch, 10**9)
        while True:
            patch.undo()
            _crash_after(patch, 4)
            try:
                preprocess(_settings(tmp_path))
                break
            except Crash:
                crashes += 1
    assert crashes > 5
    assert _output(tmp_path) == _output(tmp_path, "straight")


@pytest.mark.parametrize("step", ["index", "move"])
def test_crash_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    _corpus(tmp_path / "in")
    preprocess(_settings(tmp_path, "straight"))
    done = 0
    name = "publish" if step == "move" else "write_sidecar"
    original = getattr(preprocess_output, name)

    def crash(*arguments: object) -> None:
        nonlocal done
        if done == 1:
            raise Crash
        done += 1
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_output, name, crash)
        with pytest.raises(Crash):
            preprocess(_settings(tmp_path))
    summary = preprocess(_settings(tmp_path))
    assert _output(tmp_path) == _output(tmp_path, "straight")
    assert [marks.documents for marks in summary.datasets.values()] == [240, 240]


def _crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    _corpus(tmp_path / "in")
    with monkeypatch.context() as patch:
        _crash_after(patch, blocks)
        with pytest.raises(Crash):
            preprocess(_settings(tmp_path))


def test_other_settings_never_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _crashed(tmp_path, monkeypatch, 12)
    preprocess(replace(_settings(tmp_path, "straight"), append_eod=False))
    capsys.readouterr()
    preprocess(replace(_settings(tmp_path), append_eod=False))
    assert "is of other settings or input, or had not got anywhere: starting at the beginning" in capsys.readouterr().err
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_workers_and_error_handling_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _crashed(tmp_path, monkeypatch, 12)
    preprocess(_settings(tmp_path, "straight"))
    capsys.readouterr()
    preprocess(replace(_settings(tmp_path), on_error="skip", workers=2))
    assert "going on where" in capsys.readouterr().err
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_a_changed_input_is_read_again_and_those_before_it_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _crashed(tmp_path, monkeypatch, 31)
    changed = tmp_path / "in" / "c.json"
    changed.write_text(json.dumps([{"text": "other", "title": "text"}]))
    capsys.readouterr()
    preprocess(_settings(tmp_path))
    errors = capsys.readouterr().err
    assert "going on where" in errors and "b.jsonl.gz" in errors
    preprocess(_settings(tmp_path, "straight"))
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_corrected_lines_go_on_from_the_files_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _corpus(tmp_path / "in")
    good = files[3].read_text()
    files[3].write_text(good.replace('"text"', '"txet"', 1))
    with pytest.raises(UserError, match=r"d\.jsonl, line 1: no key 'text'"):
        preprocess(_settings(tmp_path))
    files[3].write_text(good)
    capsys.readouterr()
    preprocess(_settings(tmp_path))
    assert "going on where an earlier run stopped: 360 documents are there" in capsys.readouterr().err
    preprocess(_settings(tmp_path, "straight"))
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_garbled_journals_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _crashed(tmp_path, monkeypatch, 12)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join(lines[:6]) + b"\n" + lines[6][:40])  # cut short while being written
    preprocess(_settings(tmp_path))
    preprocess(_settings(tmp_path, "straight"))
    assert _output(tmp_path) == _output(tmp_path, "straight")


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    _corpus(tmp_path / "in")
    files = sources.find_inputs([str(tmp_path / "in")])
    busy = pytest.raises(UserError, match=r"another process is writing to .*out\.partial")
    with WorkFolder(str(tmp_path / "out"), {"text": "x"}, 257, "", files), busy:
        preprocess(_settings(tmp_path))


def test_kill_of_the_process_group(tmp_path: Path) -> None:
    """kill -9 of the tool and its workers halfway, then the same command again."""
    lines = [json.dumps({"text": f"document {i} " + "word " * (i % 60)}) + "\n" for i in range(20_000)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:15_000]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[15_000:]).encode(), 1))

    def command(output: str) -> list[str]:
        names = ["--input", str(tmp_path / "*.jsonl*"), "--output-prefix", str(tmp_path / output), "--tokenizer-type", "ByteTokenizer"]
        return [sys.executable, "tools/preprocess_data.py", *names, "--append-eod", "--workers", "2", "--resume-seconds", "0"]

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command("straight"), cwd=ROOT, env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command("out"), cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert time.monotonic() < deadline and process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("out_*"))
    again = subprocess.run(command("out"), cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "going on where an earlier run stopped" in again.stderr
    for suffix in (".bin", ".idx", ".meta.json"):
        assert (tmp_path / f"out_text_document{suffix}").read_bytes() == (tmp_path / f"straight_text_document{suffix}").read_bytes()
