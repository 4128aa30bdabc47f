"""Cutting documents into sentences, for datasets whose sequences are sentences (`--split-sentences`).

The first of these that is at hand is used, and said on one line: NLTK's punkt with parameters given by path or
installed; nupunkt (English); punkt trained on the beginning of the corpus. Chinese and Japanese, which end sentences
with marks of their own, are cut by a rule.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import available, require

TRAINING_CHARACTERS = 1_000_000
_PARAMETER_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
# A run of end marks, with the closing quotes and brackets behind it.
_WIDE_END = re.compile(r"[\u3002\uff01\uff1f\uff61!?\u2026]+[\u201d\u2019\u300d\u300f\uff09\u3011\u300b\")'\]]*")
_WIDE_LANGUAGES = ("chinese", "japanese")


class SpanFinder(Protocol):
    """Finds sentences: (start, end) of each, in order, in characters. Instances go to worker processes (picklable)."""

    def __call__(self, text: str) -> list[tuple[int, int]]: ...


class SentenceSplitter:
    """Cuts texts into sentences. `description` says by what; `fingerprint` covers everything that decides the cuts.

    With `keep_newlines` the white space between two sentences stays at the end of the first, so that the sentences
    joined are the text; otherwise sentences come stripped.
    """

    def __init__(self, finder: SpanFinder, description: str, fingerprint: str, keep_newlines: bool) -> None:
        self._finder = finder
        self.description = description
        self.fingerprint = f"{fingerprint} keep_newlines={keep_newlines}"
        self.keep_newlines = keep_newlines

    def split(self, text: str) -> list[str]:
        """The sentences of a text; none for white space."""
        if not text.strip():
            return []
        spans = self._finder(text) or [(0, len(text))]
        if not self.keep_newlines:
            return [sentence for start, end in spans if (sentence := text[start:end].strip())]
        starts = [0, *(start for start, _ in spans[1:]), len(text)]
        return [text[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def build_splitter(lang: str, data_path: str | Path | None, keep_newlines: bool, sample: Callable[[], Iterable[str]]) -> SentenceSplitter:
    """The best splitter at hand for a language (English name, as NLTK names its parameters: "english", "german").

    `data_path` is a folder with NLTK's punkt parameters (`nltk_data`, or any folder inside it down to the language's).
    `sample` gives texts of the corpus and is called only when there is nothing better than training on it.
    """
    lang = lang.lower()
    if data_path is not None:
        folder = _find_parameters([Path(data_path)], lang)
        if folder is None:
            raise UserError(
                f"{data_path} holds no punkt parameters for {lang!r}: expected {', '.join(_PARAMETER_FILES)} in it or in {lang}/"
            )
        return _punkt(_read_parameters(folder), f"NLTK punkt with the parameters in {folder}", keep_newlines)
    if lang in _WIDE_LANGUAGES:
        return SentenceSplitter(_WideFinder(), f"the end marks of {lang}", "end marks", keep_newlines)
    if available("nltk"):
        folder = _find_parameters([Path(path) for path in require("nltk").data.path], lang)
        if folder is not None:
            return _punkt(_read_parameters(folder), f"NLTK punkt with the installed parameters in {folder}", keep_newlines)
    if lang == "english" and available("nupunkt"):
        version = getattr(require("nupunkt"), "__version__", "")
        return SentenceSplitter(
            _NupunktFinder(), f"nupunkt {version} (NLTK has no punkt parameters installed)", f"nupunkt {version}", keep_newlines
        )
    return _trained(lang, keep_newlines, sample)


def _trained(lang: str, keep_newlines: bool, sample: Callable[[], Iterable[str]]) -> SentenceSplitter:
    punkt = require("nltk.tokenize.punkt", extra="data", purpose="--split-sentences")
    trainer = punkt.PunktTrainer()
    total = 0
    for text in sample():
        trainer.train(text, finalize=False)
        total += len(text)
        if total >= TRAINING_CHARACTERS:
            break
    trainer.finalize_training()
    description = f"NLTK punkt trained on the first {total:,} characters of the corpus (no parameters for {lang!r} are installed)"
    return _punkt(trainer.get_params(), description, keep_newlines)


def _punkt(parameters: Any, description: str, keep_newlines: bool) -> SentenceSplitter:
    parts = (parameters.abbrev_types, parameters.collocations, parameters.sent_starters, parameters.ortho_context.items())
    digest = hashlib.sha256(repr([sorted(part) for part in parts]).encode()).hexdigest()
    return SentenceSplitter(_PunktFinder(parameters), description, f"punkt {digest}", keep_newlines)


def _find_parameters(roots: list[Path], lang: str) -> Path | None:
    for root in roots:
        for folder in (root, root / lang, root / "punkt_tab" / lang, root / "tokenizers" / "punkt_tab" / lang):
            if all((folder / name).is_file() for name in _PARAMETER_FILES):
                return folder
    return None


def _read_parameters(folder: Path) -> Any:
    """Punkt parameters from the tab-separated text files NLTK distributes (never from a pickle)."""
    parameters = require("nltk.tokenize.punkt", extra="data", purpose="--split-sentences").PunktParameters()
    lines = {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in _PARAMETER_FILES}
    try:
        parameters.abbrev_types = {line for line in lines["abbrev_types.txt"] if line}
        parameters.sent_starters = {line for line in lines["sent_starters.txt"] if line}
        parameters.collocations = {(left, right) for left, right in (line.split("\t") for line in lines["collocations.tab"] if line)}
        contexts = {word: int(flags) for word, flags in (line.split("\t") for line in lines["ortho_context.tab"] if line)}
        parameters.ortho_context = defaultdict(int, contexts)
    except ValueError as error:
        raise UserError(f"the punkt parameters in {folder} are garbled: {error}") from error
    return parameters


class _PunktFinder:
    """NLTK's punkt with given parameters."""

    def __init__(self, parameters: Any) -> None:
        self._tokenizer = require("nltk.tokenize.punkt", extra="data", purpose="--split-sentences").PunktSentenceTokenizer()
        self._tokenizer._params = parameters

    def __call__(self, text: str) -> list[tuple[int, int]]:
        return list(self._tokenizer.span_tokenize(text))


class _NupunktFinder:
    """nupunkt's English model."""

    def __call__(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = require("nupunkt").sent_spans(text)
        return spans


class _WideFinder:
    """Sentences end at the full-width marks, and at line ends."""

    def __call__(self, text: str) -> list[tuple[int, int]]:
        cuts = {match.end() for match in _WIDE_END.finditer(text)} | {match.end() for match in re.finditer(r"\n+", text)} | {len(text)}
        spans = []
        start = 0
        for end in sorted(cuts):
            stripped = text[start:end].strip()
            if stripped:
                begin = text.index(stripped, start)
                spans.append((begin, begin + len(stripped)))
            start = end
        return spans
