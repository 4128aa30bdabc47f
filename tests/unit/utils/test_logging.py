"""Log lines carry the rank's coordinates, quiet ranks show warnings only, repeated advice appears once."""

import io
import logging
import re
from collections.abc import Iterator

import pytest

from megatron_llm.utils.logging import PACKAGE, configure_logging, warn_once


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    """The package's logger is the process's; leave it as it was."""
    logger = logging.getLogger(PACKAGE)
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_lines_carry_the_coordinates_and_the_level() -> None:
    stream = io.StringIO()
    configure_logging("rank 5 (tp 1, dp 0, pp 1)", stream=stream)
    module = logging.getLogger(f"{PACKAGE}.some.module")
    module.info("loaded %d layers", 4)
    module.warning("slow")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[rank 5 \(tp 1, dp 0, pp 1\)\] loaded 4 layers", first)
    assert second.endswith("] warning: slow")


def test_quiet_ranks_show_warnings_only() -> None:
    stream = io.StringIO()
    logger = configure_logging("rank 1", quiet=True, stream=stream)
    logger.info("hidden")
    logger.warning("shown")
    assert "hidden" not in stream.getvalue() and "shown" in stream.getvalue()


def test_once_is_once_but_other_lines_repeat() -> None:
    stream = io.StringIO()
    logger = configure_logging(stream=stream)
    for _ in range(3):
        warn_once(logger, "at 100 % of the limit")
        logger.warning("again")
    warn_once(logger, "another")
    assert stream.getvalue().count("at 100 % of the limit") == 1
    assert stream.getvalue().count("again") == 3
    assert stream.getvalue().count("another") == 1


def test_configuring_again_replaces_and_does_not_double() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("a", stream=first)
    configure_logging("b", stream=second).info("text")
    assert first.getvalue() == "" and second.getvalue().count("text") == 1


def test_an_exception_keeps_its_stack() -> None:
    stream = io.StringIO()
    logger = configure_logging(stream=stream)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer")
    assert "outer" in stream.getvalue() and "ValueError: inner" in stream.getvalue()
