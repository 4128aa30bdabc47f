"""Finding input files: names, glob patterns and folders to a list of files, the same for all tools that read data."""

import glob
import os
from collections.abc import Sequence

from megatron_llm.utils.compressed import plain_suffix
from megatron_llm.utils.errors import UserError

_WILD = "*?["


def find_input_files(patterns: Sequence[str], suffixes: Sequence[str], *, what: str) -> list[str]:
    """The files that names, glob patterns and folders (searched through) stand for, each once, in the order given.

    Within a pattern or folder files are in sorted order. Files of other `suffixes` (compression aside) are passed over in
    folders and patterns and are a UserError when named; so is a name, pattern or folder that gives no file. `what` names
    such a file in a sentence: "the input".
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in _expand(pattern, suffixes, what):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _expand(pattern: str, suffixes: Sequence[str], what: str) -> list[str]:
    kinds = ", ".join(suffixes) + " (each also with .gz or .zst)"
    if os.path.isfile(pattern):
        if plain_suffix(pattern) not in suffixes:
            raise UserError(f"{what} {pattern} is of no known kind: its name should end in {kinds}")
        return [pattern]
    if os.path.isdir(pattern):
        names = [os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names]
    elif any(letter in pattern for letter in _WILD):
        names = glob.glob(pattern, recursive=True)
    else:
        raise UserError(f"{what} {pattern} does not exist")
    files = sorted(name for name in names if plain_suffix(name) in suffixes and os.path.isfile(name))
    if not files:
        raise UserError(f"{what} {pattern} gives no file whose name ends in {kinds}")
    return files
