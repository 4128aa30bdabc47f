"""The picture of a schedule, through the tool that draws it."""

import sys
from pathlib import Path

import pytest

from megatron_llm.parallel.schedules import Action, ActionKind, make_schedule
from megatron_llm.parallel.simulator import Costs, Span, measured_costs, simulate
from megatron_llm.parallel.timeline import COLOURS, draw_panels, measured_panel, simulated_panel
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


def test_split_backwards_and_transfers_are_drawn_too(tmp_path: Path) -> None:
    plan = make_schedule("zero-bubble", 3, 4)
    result = simulate(plan, 4, costs=Costs(transfer=0.25))
    panel = simulated_panel(result, "split")
    assert panel.title == f"split: {result.ticks:.4g} ticks, {result.bubble:.0%} idle"
    assert sum(span.end - span.start for row in panel.transfers for span in row) == 16 * 0.25
    assert {span.action.kind for row in panel.spans for span in row} == set(COLOURS)
    draw_panels([panel, simulated_panel(simulate(make_schedule("interleaved", 2, 4, 2), 4, 2), "chunks")], "ticks", tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_recorded_run_starts_at_zero_and_gives_back_its_costs() -> None:
    costs = [Costs(1.0, 2.0, 3.0), Costs(4.0, 5.0, 6.0)]
    spans = simulate(make_schedule("zero-bubble", 2, 4), 4, costs=costs).spans
    recorded = [[Span(span.action, span.start + 100.0, span.end + 100.0) for span in row] for row in spans]
    waits = [[Span(Action(ActionKind.RECV_BACKWARD, 0, 0, 1), 101.0, 103.0), *recorded[0]], recorded[1]]
    panel = measured_panel(waits, "run")
    assert panel.spans == spans and [len(row) for row in panel.transfers] == [1, 0]
    assert measured_costs(waits) == costs
    busy = 4 * (6.0 + 15.0)
    assert panel.title == f"run: {panel.end:.4g} s, {1 - busy / (2 * panel.end):.0%} idle"


def test_a_bad_request_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "schedule.png"
    with pytest.raises(UserError, match="gpipe runs one model chunk a rank"):
        draw(monkeypatch, "--schedule", "gpipe", "--chunks", "2", "--output", str(picture))
    assert not picture.exists()
