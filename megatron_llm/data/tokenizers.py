"""Text to ids and back: four kinds of tokenizer behind one interface.

Ids are the plain ones of the text: no begin or end token is added (preprocessing appends the end-of-document id). Each
kind reads its files with the library they were made for and never through transformers, whose own reading of them is
not always exact; `save_pretrained` writes a folder that transformers' AutoTokenizer opens with equal ids.

Heavy libraries are imported by the class that needs them, and what takes a library long to build is built when the first
text is encoded: training asks only for the size of the vocabulary and the end token, which the files themselves list.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.preprocess_settings import TOKENIZER_TYPES
from megatron_llm.data.tokenizer_export import byte_level_bpe, byte_level_json, convert_sentencepiece, copy_folder, write_folder
from megatron_llm.data.tokenizer_json import canonical_hash, fingerprint, listed_ids, parsed
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require
from megatron_llm.utils.suggest import did_you_mean

Ids = NDArray[np.int32]
END_OF_TEXT = "<|endoftext|>"
# Names of the end token to look for when a tokenizer.json comes without a configuration that names it.
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")


class Tokenizer(ABC):
    """What every tokenizer offers.

    `kind` is the name `build_tokenizer` knows it by, `model` where its files are (None: it has none). `vocab_size` is
    true: the largest id plus one, never padded. `eod_id` is the end-of-document id, None when the vocabulary has no such
    token. `library` is the name of what makes the ids. `listed` has the id of each token where a file tells it without
    that library.
    """

    kind: str
    library: str
    model: str | None
    vocab_size: int
    eod_id: int | None
    listed: Mapping[str, int] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides ids, the same on every machine. Found when asked for: workers do not."""
        return self._fingerprint()

    @abstractmethod
    def _fingerprint(self) -> str:
        """See fingerprint."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text. A text with a lone surrogate (not Unicode text) raises UnicodeEncodeError or TypeError."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become replacement characters."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer files for AutoTokenizer.from_pretrained into `folder` (created; other files in it are left alone).

        Its ids equal ours, except that transformers turns the spelling of a special token inside a text into that token.
        """

    def as_json(self) -> str | None:
        """The contents of a tokenizer.json from which another library comes to the same ids; None where there is none."""
        return None

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or a folder that holds one (with `tokenizer_config.json`, which names the end token)."""

    kind = "HuggingFaceTokenizer"
    library = "tokenizers"

    def __init__(self, model: str | Path) -> None:
        self.model = str(model)
        self._json = _tokenizer_json(Path(model))
        self._text = _read(self._json)
        self._content = parsed(self._text)
        self.listed = listed_ids(self._content)
        ids = self.listed if self.listed is not None else self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.end_token = _end_token(self._json.parent, ids)
        self.eod_id = ids[self.end_token] if self.end_token else None

    @cached_property
    def _tokenizer(self) -> Any:
        """The library's tokenizer; UserError when it does not read the file, or reads other ids than are listed there."""
        tokenizer = _load_fast(self._text, self._json)
        if self.listed is not None:
            found = (tokenizer.id_to_token(self.vocab_size - 1), tokenizer.id_to_token(self.vocab_size))
            end = tokenizer.token_to_id(self.end_token) if self.end_token else None
            if found[0] is None or found[1] is not None or end != self.eod_id:
                raise UserError(f"{self._json} lists other ids than the tokenizers library reads from it: have that library save it again")
        return tokenizer

    def _fingerprint(self) -> str:
        content, self._content = self._content, None  # which takes some ten times the room of the text
        return fingerprint(content if content is not None else json.loads(self._text))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return _encode_fast(self._tokenizer, texts)

    def as_json(self) -> str:
        """See Tokenizer."""
        return self._text if self.listed is not None else str(self._tokenizer.to_str())

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def save_pretrained(self, folder: str | Path) -> None:
        """See Tokenizer. Copies the folder's tokenizer files, so that chat templates and other settings stay."""
        copy_folder(self._json, Path(folder), end_token=self.end_token)


class GPT2BPETokenizer(Tokenizer):
    """GPT-2's byte-level BPE from `vocab.json` and `merges.txt`; the end token is <|endoftext|> when the vocabulary has it."""

    kind = "GPT2BPETokenizer"
    library = "tokenizers"

    def __init__(self, vocab_file: str | Path, merge_file: str | Path) -> None:
        # Where both files lie together, their folder is enough to find them again.
        self.model = str(Path(vocab_file).parent) if Path(vocab_file).parent == Path(merge_file).parent else None
        vocab = _json_object(Path(vocab_file))
        merges = [line.split(" ") for line in _read(Path(merge_file)).split("\n") if line and not line.startswith("#version")]
        bad = next((merge for merge in merges if len(merge) != 2), None)
        if bad is not None:
            raise UserError(
                f"{merge_file} is not a list of merges: a line should be two pieces with a space between, found {' '.join(bad)!r}"
            )
        lacking = next((piece for left, right in merges for piece in (left, right, left + right) if piece not in vocab), None)
        if lacking is not None:
            raise UserError(f"{vocab_file} and {merge_file} do not go together: {lacking!r} of the merges is not in the vocabulary")
        self._vocab, self._merges = vocab, merges
        self.vocab_size = max(vocab.values()) + 1
        self.eod_id = vocab.get(END_OF_TEXT)

    @cached_property
    def _tokenizer(self) -> Any:
        return byte_level_bpe(self._vocab, [(left, right) for left, right in self._merges], END_OF_TEXT)

    def _fingerprint(self) -> str:
        return canonical_hash({"kind": self.kind, "vocab": self._vocab, "merges": self._merges})

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return _encode_fast(self._tokenizer, texts)

    def as_json(self) -> str:
        """See Tokenizer."""
        return byte_level_json(self._vocab, self._merges, END_OF_TEXT)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def save_pretrained(self, folder: str | Path) -> None:
        """See Tokenizer."""
        write_folder(Path(folder), self._tokenizer, eos_token=END_OF_TEXT if self.eod_id is not None else None)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`, read with the sentencepiece library; the end token is the model's own end-of-sentence piece."""

    kind = "SentencePieceTokenizer"
    library = "sentencepiece"

    def __init__(self, model: str | Path) -> None:
        path = Path(model)
        if path.is_dir():
            path = path / "tokenizer.model"
        sentencepiece = require("sentencepiece", purpose=self.kind)
        self.model = str(path)
        self._bytes = _read_bytes(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._bytes)
        except RuntimeError as error:
            raise UserError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = int(self._processor.get_piece_size())
        end = int(self._processor.eos_id())
        self.eod_id = end if end >= 0 else None

    def _fingerprint(self) -> str:
        return "sha256:" + hashlib.sha256(self._bytes).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        for text in texts:
            text.encode("utf-8")  # the library would drop lone surrogates without a word
        encoded = self._processor.encode(list(texts), num_threads=1)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def as_json(self) -> str | None:
        """See Tokenizer. Only of BPE models: the others have no exact form."""
        tokenizer, _ = convert_sentencepiece(self._bytes, str(self.model))
        content = json.loads(tokenizer.to_str())
        if content["model"]["type"] != "BPE":
            return None
        # sentencepiece does not look for the spelling of special tokens in a text.
        return json.dumps(content | {"added_tokens": []}, ensure_ascii=False)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._processor.decode([int(i) for i in ids]))

    def save_pretrained(self, folder: str | Path) -> None:
        """See Tokenizer. Also writes the model itself, as `tokenizer.model`."""
        tokenizer, special = convert_sentencepiece(self._bytes, str(self.model))
        write_folder(Path(folder), tokenizer, **special, files={"tokenizer.model": self._bytes})


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and id 256 at the end of a document. It needs no files: for tests and first tries."""

    kind = "ByteTokenizer"
    library = "Python itself"

    def __init__(self) -> None:
        self.model = None
        self.vocab_size = 257
        self.eod_id = 256

    def _fingerprint(self) -> str:
        return canonical_hash({"kind": self.kind, "vocab_size": 257})

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        pieces = [END_OF_TEXT.encode() if i == 256 else bytes([i]) for i in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def save_pretrained(self, folder: str | Path) -> None:
        """See Tokenizer. A byte-level BPE without merges."""
        from tokenizers.pre_tokenizers import ByteLevel

        # The library spells each byte as a character of its own: printable ones as themselves, the rest from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)} | {END_OF_TEXT: 256}
        if set(vocab) - {END_OF_TEXT} != set(ByteLevel.alphabet()):
            raise ValueError("the tokenizers library spells bytes in another way than expected")
        write_folder(Path(folder), byte_level_bpe(vocab, [], END_OF_TEXT, split_words=False), eos_token=END_OF_TEXT)


def build_tokenizer(
    kind: str, model: str | Path | None = None, vocab_file: str | Path | None = None, merge_file: str | Path | None = None
) -> Tokenizer:
    """The tokenizer named by `kind` (one of TOKENIZER_TYPES) from its files; a UserError says which are missing.

    GPT2BPETokenizer also takes `model`, a folder with vocab.json and merges.txt (or names that end so).
    """
    if kind == "ByteTokenizer":
        return ByteTokenizer()
    if kind == "GPT2BPETokenizer":
        if model is not None and vocab_file is None and merge_file is None:
            vocab_file, merge_file = _one_file(Path(model), "vocab.json"), _one_file(Path(model), "merges.txt")
        if vocab_file is None or merge_file is None:
            raise UserError("GPT2BPETokenizer needs its two files: give --vocab-file and --merge-file")
        return GPT2BPETokenizer(vocab_file, merge_file)
    if kind not in TOKENIZER_TYPES:
        raise UserError(f"unknown tokenizer type {kind!r}, known are {', '.join(TOKENIZER_TYPES)}{did_you_mean(kind, TOKENIZER_TYPES)}")
    if model is None:
        what = "a folder with tokenizer.json" if kind == "HuggingFaceTokenizer" else "a sentencepiece .model file"
        raise UserError(f"{kind} needs --tokenizer-model: {what}")
    return HuggingFaceTokenizer(model) if kind == "HuggingFaceTokenizer" else SentencePieceTokenizer(model)


def _one_file(folder: Path, name: str) -> Path:
    """The file of that name in a folder, or the only one whose name ends so."""
    others = sorted(folder.glob(f"*{name}"))
    return others[0] if len(others) == 1 else folder / name


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer file {path}: {error.strerror or error}") from error


def _read(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the tokenizer file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"the tokenizer file {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"the tokenizer file {path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def _tokenizer_json(model: Path) -> Path:
    """The tokenizer.json meant by a file or folder name; what to do instead where there is none."""
    if model.is_file():
        return model
    if (model / "tokenizer.json").is_file():
        return model / "tokenizer.json"
    if (model / "tokenizer.model").is_file():
        raise UserError(f"{model} has no tokenizer.json but a sentencepiece model: use --tokenizer-type SentencePieceTokenizer")
    if (model / "vocab.json").is_file() and (model / "merges.txt").is_file():
        raise UserError(f"{model} has no tokenizer.json but vocab.json and merges.txt: use --tokenizer-type GPT2BPETokenizer")
    state = "has no tokenizer.json" if model.is_dir() else "does not exist"
    raise UserError(
        f"the tokenizer {str(model)!r} {state}: give a folder with tokenizer.json, or that file"
        " (a tokenizer of the Hugging Face hub has to be downloaded or saved to a folder first)"
    )


def _load_fast(text: str, path: Path) -> Any:
    tokenizers = require("tokenizers", purpose="reading tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer the tokenizers library can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode_fast(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    return [np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _end_token(folder: Path, ids: Mapping[str, int]) -> str | None:
    """The end token that the configuration beside tokenizer.json names, else a known name that the vocabulary has."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        token = _json_object(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token in ids:
            return str(token)
    return next((name for name in _KNOWN_ENDS if name in ids), None)
