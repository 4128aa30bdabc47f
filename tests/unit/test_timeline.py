"""The picture of a schedule, through the tool that draws it."""

import sys
from pathlib import Path

import pytest

from megatron_llm.utils.errors import UserError
from tools import plot_schedule


def draw(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_schedule.py", *flags])
    plot_schedule.main()


def test_the_tool_draws_and_says_what_the_schedule_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "schedule.png"
    draw(monkeypatch, "--schedule", "interleaved", "--stages", "2", "--micro-batches", "4", "--chunks", "2", "--output", str(picture))
    out = capsys.readouterr().out
    assert "27 ticks (one chunk's forward 1, backward 2), 11.1% of all ranks' time idle" in out
    assert "peak live activations of each stage: 5 3" in out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_bad_request_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "schedule.png"
    with pytest.raises(UserError, match="gpipe runs one model chunk a rank"):
        draw(monkeypatch, "--schedule", "gpipe", "--chunks", "2", "--output", str(picture))
    assert not picture.exists()
