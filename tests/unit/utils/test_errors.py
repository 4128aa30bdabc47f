"""What a person sees of an error: the first line that says something."""

import pytest

from megatron_llm.utils.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n  one \ntwo"), "one"), (KeyError("a"), "'a'"), (RuntimeError(), "RuntimeError"), (OSError(" \n\t\n"), "OSError")],
)
def test_the_first_line_that_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line
