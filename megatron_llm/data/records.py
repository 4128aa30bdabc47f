"""From a block of input lines to texts: what counts as a document, what as an empty one, what as a bad line."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megatron_llm.data.sources import Block, InputFile, Position, read_blocks
from megatron_llm.utils.optional import available, require
from megatron_llm.utils.suggest import did_you_mean

_BOM = "\ufeff"
_NAMES = {list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false", type(None): "null", str: "a text"}


@dataclass
class Records:
    """The texts of a block by key, the number of its lines, and its bad lines as (number, reason). A bad line adds to no key.

    Lines are numbered from 1 at the beginning of the block.
    """

    texts: dict[str, list[str]]
    lines: int
    bad: list[tuple[int, str]] = field(default_factory=list)


def parse_block(block: Block, keys: Sequence[str]) -> Records:
    """The texts of each line of a block. JSON records have one text a key; text files have one a line, which goes to the first key.

    Lines of white space in .jsonl files are no records and pass without a word.
    """
    lines = block.read().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    quick = _quick_loads() if block.kind != ".txt" else None
    if quick is not None and len(keys) == 1 and (texts := _all_texts(quick, lines, keys[0])) is not None:
        return Records({keys[0]: texts}, len(lines))
    records = Records({key: [] for key in keys}, len(lines))
    takers = [records.texts[key].append for key in keys]
    for number, raw in enumerate(lines, start=1):
        texts = _quick_texts(quick, raw, keys) if quick is not None else None
        if texts is None:
            try:
                texts = _parse_line(raw, block, number, keys)
            except _BadLineError as error:
                records.bad.append((number, str(error)))
                continue
        for take, text in zip(takers, texts, strict=False):
            take(text)
    return records


@cache
def _quick_loads() -> Callable[[bytes], object] | None:
    """A faster reader of JSON where one is installed."""
    return require("orjson").loads if available("orjson") else None


def _all_texts(loads: Callable[[bytes], Any], lines: Sequence[bytes], key: str) -> list[str] | None:
    """The text of each line when all of them are as they should be, which is what nearly all blocks are; see _quick_texts."""
    try:
        texts = [loads(line)[key] for line in lines]
    except (ValueError, TypeError, KeyError):
        return None
    return texts if set(map(type, texts)) <= {str} else None


def _quick_texts(loads: Callable[[bytes], object], raw: bytes, keys: Sequence[str]) -> list[str] | None:
    """The texts of a line that is as it should be; None when it has to be looked at closely.

    The faster reader is the stricter one (no NaN, no lone surrogates): what it reads, Python's reads to the same texts.
    """
    try:
        record = loads(raw)
    except ValueError:
        return None
    if type(record) is not dict:
        return None
    texts: list[Any] = [record.get(key) for key in keys]
    for text in texts:
        if type(text) is not str:
            return None
    return texts


class _BadLineError(Exception):
    """Why a line cannot be used."""


def _parse_line(raw: bytes, block: Block, number: int, keys: Sequence[str]) -> list[str]:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLineError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    if number == 1 and block.start == 0:
        line = line.removeprefix(_BOM)
    if block.kind == ".txt":
        return [line.rstrip("\r")]
    if not line.strip():
        return []
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadLineError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"JSON that cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise _BadLineError(f"{_NAMES[type(record)]}, not a JSON object with the key {keys[0]!r}")
    return [_text(record, key) for key in keys]


def _text(record: dict[str, object], key: str) -> str:
    if key not in record:
        names = [str(name) for name in record]
        raise _BadLineError(f"no key {key!r}, it has {', '.join(map(repr, names[:8])) or 'none'}{did_you_mean(key, names)}")
    value = record[key]
    if not isinstance(value, str):
        raise _BadLineError(f"the value of {key!r} is {_NAMES[type(value)]}, not a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadLineError(f"the value of {key!r} holds half a surrogate pair at character {error.start}, which is no text") from error
    return value


def iterate_texts(files: Sequence[InputFile], keys: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Every text of every key and file in turn, with the bytes on disk read so far; bad lines are passed over.

    For tools that look at a corpus without writing a dataset, such as tokenizer training.
    """
    before = 0
    for index, file in enumerate(files):
        for block in read_blocks(file, index, Position()):
            records = parse_block(block, keys)
            for key in keys:
                for text in records.texts[key]:
                    yield text, before + block.consumed
        before += file.size
