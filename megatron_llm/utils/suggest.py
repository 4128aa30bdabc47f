"""Did-you-mean: the nearest of the names that would have been right, for messages about a name that is wrong."""

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name` (dashes and underscores count as equal, case does not count), or None when none is close."""
    folded = {_fold(choice): choice for choice in choices}
    matches = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error sentence: `; did you mean 'x'?`, or nothing when no choice is close."""
    choice = nearest(name, choices)
    return f"; did you mean {choice!r}?" if choice is not None else ""


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")
