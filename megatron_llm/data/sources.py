"""The input files of preprocessing: finding them, and reading them as blocks of lines that workers can take.

Blocks keep memory flat whatever the size of a file, keep all workers busy on one big file, and each says where it
ends, so that a killed run can go on behind the last block that was written.
"""

import codecs
import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llm.utils.compressed import SourceFile, plain_suffix
from megatron_llm.utils.errors import UserError

SUFFIXES = (".jsonl", ".json", ".txt")
BLOCK_BYTES = 256 * 1024
_WILD = "*?["


@dataclass(frozen=True)
class InputFile:
    """One input file as it was found: a change of size or time since then makes it another input."""

    path: str
    size: int
    mtime_ns: int

    @property
    def kind(self) -> str:
        """ ".jsonl", ".json" or ".txt", compression aside."""
        return plain_suffix(self.path)


@dataclass(frozen=True)
class Position:
    """A place between two documents of a file: decompressed bytes before it, and lines (of a JSON array: elements) before it."""

    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Block:
    """Some lines of one file, in order. `data` is UTF-8 text, a record a line.

    `first` is the number of its first line, counted from 1 (`unit`: "line", or "element" of a JSON array), `end` where it
    ends, `consumed` the bytes of the file on disk read by then.
    """

    file: int
    path: str
    kind: str
    unit: str
    first: int
    data: bytes
    end: Position
    consumed: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that names, glob patterns and folders (searched through) stand for, each once, in the order given.

    Within a pattern or folder files are in sorted order. Files of other kinds are passed over in folders and patterns and
    are a UserError when named; so is a name, pattern or folder that gives no file.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        for path in _expand(pattern):
            status = os.stat(path)
            found.setdefault(os.path.realpath(path), InputFile(path, status.st_size, status.st_mtime_ns))
    if not found:
        raise UserError("no input was given: name files, folders or patterns with --input")
    return list(found.values())


def _expand(pattern: str) -> list[str]:
    kinds = ", ".join(SUFFIXES) + " (each also with .gz or .zst)"
    if os.path.isfile(pattern):
        if plain_suffix(pattern) not in SUFFIXES:
            raise UserError(f"the input {pattern} is of no known kind: its name should end in {kinds}")
        return [pattern]
    if os.path.isdir(pattern):
        names = [os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names]
    elif any(letter in pattern for letter in _WILD):
        names = glob.glob(pattern, recursive=True)
    else:
        raise UserError(f"the input {pattern} does not exist")
    files = sorted(name for name in names if plain_suffix(name) in SUFFIXES and os.path.isfile(name))
    if not files:
        raise UserError(f"the input {pattern} gives no file whose name ends in {kinds}")
    return files


def read_blocks(file: InputFile, index: int, start: Position) -> Iterator[Block]:
    """The blocks of a file from `start` on. Where blocks are cut depends on the file and on `start` alone."""
    with SourceFile(file.path) as source:
        if file.kind == ".json" and _holds_array(file.path):
            yield from _array_blocks(source, file, index, start)
            return
        source.skip(start.offset)
        offset, line = start.offset, start.line
        while data := source.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += source.readline()
            first, offset, line = line + 1, offset + len(data), line + data.count(b"\n")
            yield Block(index, file.path, file.kind, "line", first, data, Position(offset, line), source.position)


def _holds_array(path: str) -> bool:
    with SourceFile(path) as source:
        return source.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _array_blocks(source: SourceFile, file: InputFile, index: int, start: Position) -> Iterator[Block]:
    """Elements of a JSON array, one a line of the block; the elements before `start` are parsed again and passed over."""
    elements: list[bytes] = []
    size, count = 0, start.line
    for number, text in enumerate(_array_elements(source), start=1):
        if number <= start.line:
            continue
        # A line end inside an element can only be white space between its parts: in strings it is escaped.
        elements.append(text.replace("\n", " ").replace("\r", " ").encode("utf-8"))
        size, count = size + len(elements[-1]), number
        if size >= BLOCK_BYTES:
            yield _array_block(source, file, index, elements, count)
            elements, size = [], 0
    if elements:
        yield _array_block(source, file, index, elements, count)


def _array_block(source: SourceFile, file: InputFile, index: int, elements: list[bytes], count: int) -> Block:
    data = b"\n".join(elements)
    return Block(index, file.path, file.kind, "element", count - len(elements) + 1, data, Position(0, count), source.position)


def _array_elements(source: SourceFile) -> Iterator[str]:
    """The text of each element of the JSON array that the file holds; memory is bounded by the largest element."""
    text = _TextBuffer(source)
    number = 0
    text.skip_space()
    text.take("[", "the [ that opens the array")
    while text.skip_space() != "]":
        if number:
            text.take(",", f"a comma or ] after element {number}")
            text.skip_space()
        number += 1
        yield text.take_value(number)
    text.take("]", "the ] that closes the array")
    if text.skip_space():
        raise text.error("text after the end of the array")


class _TextBuffer:
    """The part of a JSON text around the place of reading."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._before = "", 0, 0
        self._ended = False

    def _more(self, size: int = BLOCK_BYTES) -> bool:
        """Read on; False at the end of the file."""
        data = self._source.read(size)
        self._ended = not data
        try:
            new = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 text ({error.reason})") from error
        self._before += self._at
        self._text, self._at = self._text[self._at :] + new, 0
        return not self._ended

    def skip_space(self) -> str:
        """Go to the next character that is no white space and return it; "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, letter: str, what: str) -> None:
        """Pass over the expected character."""
        if self._text[self._at : self._at + 1] != letter:
            raise self.error(f"expected {what}")
        self._at += 1

    def take_value(self, number: int) -> str:
        """Pass over one JSON value and return its text."""
        while True:
            try:
                _, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                # Cut off by the end of what has been read so far, or wrong in itself?
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                # Reading as much again each time keeps the work linear in the size of a large element.
                if cut and not self._ended and (self._more(max(BLOCK_BYTES, len(self._text) - self._at)) or self._text):
                    continue
                raise self.error(f"element {number} is not JSON: {error.msg}", error.pos) from error
            except (RecursionError, ValueError) as error:
                raise self.error(f"element {number} cannot be read: {error}") from error
            value, self._at = self._text[self._at : end], end
            return value

    def error(self, what: str, at: int | None = None) -> UserError:
        """An error at a place in the text. It is fatal: where the next element begins cannot be told."""
        place = self._before + (self._at if at is None else at)
        return UserError(f"{self._source.path}, character {place}: {what}")


def describe(files: Sequence[InputFile]) -> str:
    """The files as a few words: their number and size."""
    total = sum(file.size for file in files)
    names = Path(files[0].path).name if len(files) == 1 else f"{len(files)} files"
    return f"{names}, {total / 1e6:.1f} MB"
