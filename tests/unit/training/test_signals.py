"""Signals are noted and forgotten again, the time limit and the step interval give a reason."""

import os
import signal

import pytest

from megatron_llm.training.signals import WATCHED, ExitMonitor, SignalWatcher


@pytest.mark.parametrize("number", WATCHED, ids=lambda number: number.name)
def test_a_signal_is_noted_and_the_process_lives(number: signal.Signals) -> None:
    with SignalWatcher() as signals:
        monitor = ExitMonitor(signals=signals)
        assert monitor.should_exit(1) is None
        os.kill(os.getpid(), number)
        assert signals.received == number.name
        assert monitor.should_exit(1) == f"{number.name} received"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in WATCHED]
    with SignalWatcher():
        assert [signal.getsignal(number) for number in WATCHED] != before
    assert [signal.getsignal(number) for number in WATCHED] == before


@pytest.mark.parametrize("first", WATCHED, ids=lambda number: number.name)
def test_the_first_signal_counts_and_an_interrupt_after_it_interrupts(first: signal.Signals) -> None:
    with SignalWatcher() as signals:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == first.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_time_limit_counts_from_construction() -> None:
    now = 1000.0
    monitor = ExitMonitor(exit_duration_in_mins=2, clock=lambda: now)
    now = 1119.0
    assert monitor.should_exit(5) is None
    now = 1120.0
    assert monitor.should_exit(5) == "2.0 minutes have passed, exit_duration_in_mins is 2"


def test_the_interval_leaves_at_its_multiples_only() -> None:
    monitor = ExitMonitor(exit_interval=4)
    assert [step for step in range(13) if monitor.should_exit(step)] == [4, 8, 12]


def test_without_limits_there_is_no_reason() -> None:
    assert ExitMonitor().should_exit(10**9) is None
