"""Who turns texts into ids during preprocessing: the library a tokenizer's files were made for, or gigatoken.

gigatoken (https://github.com/marcelroed/gigatoken) reads a `tokenizer.json` and encodes tens of times faster: it cuts
words with vector instructions and remembers the ids of words it has seen. It is taken where it gives the ids of the
tokenizer's own library, and that is tried at the start of each run, on the input itself and on texts that are hard to cut.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from megatron_llm.data.sources import Block
from megatron_llm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import available, require

# Texts handed to a tokenizer library at once: its results take some hundred bytes a token until they are arrays.
_BATCH_CHARACTERS = 64 * 1024
# What gigatoken may remember, in bytes of the process: it keeps every word it meets and never forgets one by itself.
_MEMORY_BYTES = 128 << 20
# As many characters of the input are compared as take the library some tenths of a second, spread over these places.
SAMPLE_FIRST, SAMPLE_OTHERS, SAMPLE_PLACES = 128 * 1024, 32 * 1024, 4

HARD_TEXTS = (
    "It's what they'LL say: I've, you're, don't, 'tis; x'y''z",
    "  two  spaces   three\t\ttabs \n\n\n lines \r\n\r\n \u00a0no-break\u2003em\u3000wide ",
    " " * 17 + "def f(x):\n" + " " * 300 + "return x" + "\n" * 40 + "\t" * 33,
    "1 12 123 1234 12345678901234567890 3.14e-10 0x1F 1,234,567 \u0663\u0664 \u00bd \u2167",
    "\x00\x01\x02 bell\x07 escape\x1b[0m delete\x7f next\x85line \u200b\u200d\ufeff\ufffd \u2028\u2029",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f \U0010ffff",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\uff0c\u5168\u89d2\uff01 \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 ",
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u2460 \uff71\uff9e \u212b \u00df \u0130\u0131 \u0390 n\u0303o",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "CamelCaseHTTPServer snake_case __init__ a.b.c() => {x: [1, 2]}; // \\n \"q\" `t` $1 #2 @3 %4 ^5 &6 *7",
    "<|endoftext|> </s><s> <unk> [PAD] <|im_start|>user<|im_end|> a<|endoftext|>b <0x0A> <mask>",
    "\u2581 \u2581\u2581word \u0120word \u010a", "a" * 1500, "ab" * 700 + "\u00e9" * 300, "-" * 200 + "=" * 64 + "." * 9,
    "x", " ", "\n", " x", "x ", "",
)  # fmt: skip


class TextEncoder(Protocol):
    """Texts to ids."""

    def __call__(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, all int32 or all uint32. A lone surrogate in a text raises UnicodeEncodeError or TypeError."""


class LibraryEncoder:
    """The tokenizer itself, in batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See TextEncoder."""
        encoded: list[NDArray[Any]] = []
        start = size = 0
        for end, text in enumerate(texts, start=1):
            size += len(text)
            if size >= _BATCH_CHARACTERS or end == len(texts):
                encoded += self._tokenizer.encode_batch(texts[start:end])
                start, size = end, 0
        return encoded


class GigatokenEncoder:
    """gigatoken on the contents of a tokenizer.json. UserError when they are of a kind that it cannot read."""

    def __init__(self, tokenizer_json: str) -> None:
        self._load: Callable[[str], Any] = require(
            "gigatoken.gigatoken_rs", extra="data", purpose="--tokenizer-backend gigatoken"
        ).load_hf_json
        self._json = tokenizer_json
        try:
            self._renew()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"gigatoken cannot read this tokenizer ({str(error).splitlines()[0]})") from error

    def _renew(self) -> None:
        self._tokenizer = self._load(self._json)
        self._limit = _resident_bytes() + _MEMORY_BYTES

    def __call__(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See TextEncoder."""
        if _resident_bytes() > self._limit:
            self._renew()
        # One text at a time costs a microsecond and gives numpy arrays; batches come as arrays of a library that takes half a
        # second to import in each process.
        encode = self._tokenizer.encode
        return [encode(text.encode()) for text in texts]


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class BackendRecipe:
    """How a worker makes its encoder: gigatoken from `tokenizer_json`, or without one from the arguments of `build_tokenizer`."""

    tokenizer: tuple[str, str | None, str | None, str | None]
    tokenizer_json: str | None = None

    def __call__(self) -> TextEncoder:
        return LibraryEncoder(build_tokenizer(*self.tokenizer)) if self.tokenizer_json is None else GigatokenEncoder(self.tokenizer_json)


@dataclass(frozen=True)
class Candidate:
    """gigatoken for a tokenizer, or the reason why it is out of the question."""

    tokenizer_json: str | None
    refusal: str = ""


def gigatoken_candidate(tokenizer: Tokenizer, wanted: str) -> Candidate:
    """Whether gigatoken is to be tried; `wanted` is one of TOKENIZER_BACKENDS."""
    if wanted == "library":
        return Candidate(None, "as asked for")
    found = tokenizer.as_json()
    if found is None:
        return Candidate(None, f"gigatoken does not read a {tokenizer.kind} of this kind")
    if not available("gigatoken"):
        return Candidate(None, "gigatoken, which is many times faster, is not installed (pip install 'megatron_llm[data]')")
    return Candidate(found)


def hard_block(keys: Sequence[str]) -> Block:
    """HARD_TEXTS as a block of JSON lines without a file."""
    data = b"".join(json.dumps(dict.fromkeys(keys, text)).encode() + b"\n" for text in HARD_TEXTS)
    return Block(0, "", ".jsonl", "line", 0, len(data), len(data), data)
