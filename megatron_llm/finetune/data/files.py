"""Finding fine-tuning files and reading their raw records, each with the line it starts on.

JSON arrays (Alpaca, ShareGPT), JSON lines under either suffix, CSV with a header and plain text, each also .gz or .zst.
A line that cannot be parsed is a record with an error, not the end of the work; a broken array has no next record to
go on with and is an error of the file.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_llm.utils.compressed import SourceFile, plain_suffix
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.input_files import find_input_files

_LONGEST_FIELD = 1 << 30  # characters of a CSV value; the library's own limit of 128 k is less than a long answer


@dataclass(frozen=True)
class Raw:
    """One record as it was read: a parsed value, or the reason why there is none. `line` counts from 1."""

    line: int
    value: Any = None
    error: str | None = None


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files that names, glob patterns and folders (searched through) stand for, each once, sorted within a pattern.

    A name, pattern or folder that gives no file of one of these suffixes is a UserError.
    """
    found = find_input_files([str(pattern) for pattern in patterns], suffixes, what="the data file")
    if not found:
        raise UserError("no data was given: name files, folders or patterns")
    return found


def read_raw(path: str) -> Iterator[Raw]:
    """The records of a .jsonl, .json or .csv file (CSV rows as objects by the names in the header)."""
    suffix = plain_suffix(path)
    if suffix == ".csv":
        yield from _rows(path)
    elif suffix == ".json":
        text = _whole(path)
        if text.lstrip()[:1] == "[":
            yield from _elements(text, path)
        elif _one_object(text):
            yield Raw(1 + len(text[: len(text) - len(text.lstrip())].splitlines()), json.loads(text))
        else:
            yield from (_parsed(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    elif suffix == ".jsonl":
        with SourceFile(path) as source:
            for number, raw in enumerate(source, start=1):
                if raw.strip():
                    yield _parsed(raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape"), number)
    else:
        raise UserError(f"{path} holds plain text, no questions and answers: records are read from .jsonl, .json or .csv files")


def _parsed(line: str, number: int) -> Raw:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return Raw(number, error="the line is not UTF-8 text")
    try:
        return Raw(number, json.loads(line))
    except (ValueError, RecursionError):
        return Raw(number, error="the line is not JSON")


def _whole(path: str) -> str:
    with SourceFile(path) as source:
        parts = []
        while data := source.read(1 << 20):
            parts.append(data)
    try:
        return b"".join(parts).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8") from error


def _one_object(text: str) -> bool:
    """Whether a file that is no array is one object over several lines, rather than an object a line."""
    first = text.lstrip().partition("\n")[0]
    if _parsed(first, 1).error is None:
        return False
    return _parsed(text, 1).error is None


def _elements(text: str, path: str) -> Iterator[Raw]:
    """The elements of a JSON array, each with the line it starts on."""
    decode = json.JSONDecoder().raw_decode
    at, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[") + 1)
    number = 0
    while True:
        place = _skip(text, at)
        line, at = line + text.count("\n", at, place), place
        if text[at : at + 1] == "]" and (number == 0 or text[_before(text, at)] != ","):
            break
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: element {number + 1} of the array is not JSON ({error}): repair the file") from error
        number += 1
        yield Raw(line, value)
        place = _skip(text, end)
        line, at = line + text.count("\n", at, place), place
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise UserError(f"{path}:{line}: a comma or ] is missing behind element {number} of the array: the file may be cut short")
    if text[at + 1 :].strip():
        raise UserError(f"{path}:{line}: there is text behind the end of the array: repair the file")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _before(text: str, at: int) -> int:
    at -= 1
    while text[at] in " \t\r\n":
        at -= 1
    return at


def _rows(path: str) -> Iterator[Raw]:
    """Rows of a CSV file as objects by the header's names; values may span lines inside quotes."""
    csv.field_size_limit(_LONGEST_FIELD)
    with SourceFile(path) as source:
        reader = csv.reader(_csv_lines(source, path), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            line = reader.line_num + 1
            for row in reader:
                if any(value.strip() for value in row):
                    yield _row(header, row, line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV ({error}): check the quotes") from error


def _row(header: list[str], row: list[str], line: int) -> Raw:
    if len(row) != len(header):
        return Raw(line, error="the row has more or fewer values than the header has names")
    return Raw(line, dict(zip(header, row, strict=True)))


def _csv_lines(source: SourceFile, path: str) -> Iterator[str]:
    for number, raw in enumerate(source, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}): convert the file to UTF-8") from error
