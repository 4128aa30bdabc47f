"""The input files of preprocessing: finding them, and reading them as blocks of lines that workers can take.

Blocks keep memory flat whatever the size of a file, keep all workers busy on one big file, and each says where it
ends, so that a killed run can go on behind the last block that was written.
"""

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llm.utils.compressed import SourceFile, is_compressed, plain_suffix
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.input_files import find_input_files

SUFFIXES = (".jsonl", ".json", ".txt")
# Blocks of small inputs are small, for all workers to have some; those of large ones cost less to hand around.
BLOCK_BYTES, LARGE_BLOCK_BYTES, BLOCKS = 256 * 1024, 1024 * 1024, 100


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
    """Some lines of one file, in order; `read` gives them as UTF-8 text, a record a line.

    It lies between the decompressed bytes `start` and `end` (both 0 in JSON arrays, which have no such places) and counts
    in a `unit`: "line", or "element" of a JSON array. `consumed` is the bytes of the file on disk read by its end. Blocks
    of plain files carry no `data`: whoever works on one reads it, in parallel with others.
    """

    file: int
    path: str
    kind: str
    unit: str
    start: int
    end: int
    consumed: int
    data: bytes | None = None

    def read(self) -> bytes:
        """The bytes of the block. UserError when the file has become shorter since the block was cut."""
        if self.data is not None:
            return self.data
        with SourceFile(self.path) as source:
            source.skip(self.start)
            data = source.read(self.end - self.start)
        if len(data) != self.end - self.start:
            raise UserError(f"{self.path} has become shorter while it was read: give the command again once it is complete")
        return data


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that names, glob patterns and folders (searched through) stand for, each once, in the order given.

    Within a pattern or folder files are in sorted order. Files of other kinds are passed over in folders and patterns and
    are a UserError when named; so is a name, pattern or folder that gives no file.
    """
    paths = find_input_files(patterns, SUFFIXES, what="the input")
    if not paths:
        raise UserError("no input was given: name files, folders or patterns with --input")
    return [InputFile(path, status.st_size, status.st_mtime_ns) for path, status in zip(paths, map(os.stat, paths), strict=True)]


def block_size(total: int) -> int:
    """Bytes of a block of an input of `total` bytes: a hundredth of it, within bounds."""
    return max(BLOCK_BYTES, min(LARGE_BLOCK_BYTES, total // BLOCKS))


def read_blocks(file: InputFile, index: int, start: Position, size: int | None = None) -> Iterator[Block]:
    """The blocks of a file from `start` on, of `size` bytes (default: BLOCK_BYTES) and what the last line has beyond."""
    size = size if size is not None else BLOCK_BYTES
    if file.kind == ".json" and _holds_array(file.path):
        with SourceFile(file.path) as source:
            yield from _array_blocks(source, file, index, start, size)
    elif is_compressed(file.path):
        yield from _stream_blocks(file, index, start.offset, size)
    else:
        yield from _plain_blocks(file, index, start.offset, size)


def _stream_blocks(file: InputFile, index: int, offset: int, size: int) -> Iterator[Block]:
    """Of a compressed file, which can only be read from its beginning on: with their data."""
    with SourceFile(file.path) as source:
        source.skip(offset)
        while data := source.read(size):
            if not data.endswith(b"\n"):
                data += source.readline()
            start, offset = offset, offset + len(data)
            yield Block(index, file.path, file.kind, "line", start, offset, source.position, data)


def _plain_blocks(file: InputFile, index: int, offset: int, size: int) -> Iterator[Block]:
    """Of a plain file: only their ends are looked for, which are the ends of the lines that hold the last of `size` bytes."""
    with SourceFile(file.path) as source:
        source.skip(offset)
        while offset < source.size:
            start, offset = offset, min(offset + size, source.size)
            if offset < source.size:
                source.skip(offset - 1 - source.position)
                offset += len(source.readline()) - 1
            yield Block(index, file.path, file.kind, "line", start, offset, offset)


def sample_blocks(files: Sequence[InputFile], first: int, others: int, places: int) -> Iterator[Block]:
    """A look at the input: a block of about `first` bytes at its beginning, then one of `others` bytes at each of so many places.

    The places are spread evenly over the bytes of all plain files; compressed files and JSON arrays have none but their beginning.
    """
    for block in read_blocks(files[0], 0, Position()):
        data = block.read()
        end = data.rfind(b"\n", 0, first) + 1 or len(data)
        yield replace(block, data=data[:end])
        break
    plain = [file for file in files if file.kind != ".json" and not is_compressed(file.path)]
    step = max(1, sum(file.size for file in plain) // (places + 1))
    at = 0
    for file in plain:
        for place in range(step if at == 0 else -at % step, file.size, step):
            with SourceFile(file.path) as source:
                source.skip(place)
                source.readline()  # the place is inside of a line
                data = source.read(others)
            end = data.rfind(b"\n") + 1
            if end:
                yield Block(0, file.path, file.kind, "line", place, place + end, place + end, data[:end])
        at += file.size


def _holds_array(path: str) -> bool:
    with SourceFile(path) as source:
        return source.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _array_blocks(source: SourceFile, file: InputFile, index: int, start: Position, size: int) -> Iterator[Block]:
    """Elements of a JSON array, one a line of the block; the elements before `start` are parsed again and passed over."""
    elements: list[bytes] = []
    found = 0
    for number, text in enumerate(_array_elements(source), start=1):
        if number <= start.line:
            continue
        # A line end inside an element can only be white space between its parts: in strings it is escaped.
        elements.append(text.replace("\n", " ").replace("\r", " ").encode("utf-8"))
        found += len(elements[-1])
        if found >= size:
            yield _array_block(source, file, index, elements)
            elements, found = [], 0
    if elements:
        yield _array_block(source, file, index, elements)


def _array_block(source: SourceFile, file: InputFile, index: int, elements: list[bytes]) -> Block:
    return Block(index, file.path, file.kind, "element", 0, 0, source.position, b"\n".join(elements))


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
