"""Progress lines: percent, rates, time left; refreshed on a terminal, occasional elsewhere."""

import io

import pytest

from megatron_llm.utils.progress import Progress, amount, duration, track


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_line_has_percent_rates_and_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("reading", 1_000_000, unit="B", stream=stream, clock=clock) as progress:
        progress.update(0, documents=0)
        clock.now += 20
        progress.update(250_000, documents=500)
        clock.now += 5
        progress.update(260_000, documents=520)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "reading: 25.0 %, 250 kB (12.5 kB/s), 500 documents (25/s), ETA 1:00"
    assert lines[1] == "reading: 26.0 %, 260 kB (10.4 kB/s), 520 documents (20.8/s), in 25.0 s"
    assert len(lines) == 2  # the update five seconds after the first line was too soon for another


def test_terminal_line_is_refreshed_in_place() -> None:
    clock, stream = Clock(), Terminal()
    with Progress("work", 10, stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(5)
        progress.say("a note")
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.count("\r") >= 3
    assert "a note" in text.split("\n")[0]
    assert text.rstrip("\n").split("\r")[-1].startswith("work: 50.0 %, 5 (5/s), in 1.0 s")


def test_rates_after_resuming_speak_of_this_run() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress("work", 100, stream=stream, clock=clock)
    progress.resume(80, documents=1000)
    clock.now += 10
    progress.update(90, documents=1100)
    assert stream.getvalue() == "work: 90.0 %, 90 (1/s), 1.1 k documents (10/s), ETA 10.0 s\n"


def test_unknown_total_shows_no_percent_and_no_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress("work", stream=stream, clock=clock)
    clock.now += 10
    progress.advance(20)
    assert stream.getvalue() == "work: 20 (2/s)\n"


def test_track_yields_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    captured = capsys.readouterr()
    assert "counting: 100.0 %, 3" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "", "0"), (2.25, "", "2.2"), (999, "B", "999 B"), (1234, "", "1.23 k"), (5.6e9, "B", "5.6 GB"), (3e12, "", "3 T")],
)
def test_amounts(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


@pytest.mark.parametrize(("seconds", "text"), [(8.44, "8.4 s"), (185, "3:05"), (7385, "2:03:05"), (3599.6, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
