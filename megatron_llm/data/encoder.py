"""What a preprocessing worker does: a block of input lines in, arrays of ids out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.indexed import token_dtype
from megatron_llm.data.records import parse_block
from megatron_llm.data.sentences import SentenceSplitter
from megatron_llm.data.sources import Block, Position
from megatron_llm.data.tokenizers import Tokenizer, build_tokenizer

# Texts handed to the tokenizer library at once: its results take some hundred bytes a token until they are arrays.
_BATCH_CHARACTERS = 64 * 1024


@dataclass(frozen=True)
class EncodedTexts:
    """The documents of one key, as IndexedWriter.add takes them."""

    ids: NDArray[Any]
    lengths: NDArray[np.int32]
    sequences: NDArray[np.int32]


@dataclass(frozen=True)
class EncodedBlock:
    """A block's documents by key, and what was passed over: the number of empty texts, and the bad lines with their reasons."""

    file: int
    path: str
    unit: str
    end: Position
    consumed: int
    texts: dict[str, EncodedTexts]
    empty: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class EncoderRecipe:
    """How a worker makes its encoder (picklable, unlike the tokenizer itself). Calling it gives the encoder.

    `tokenizer` are the arguments of `build_tokenizer`; with a `splitter` each sentence is a sequence.
    """

    tokenizer: tuple[str, str | None, str | None, str | None]
    keys: tuple[str, ...]
    append_eod: bool
    splitter: SentenceSplitter | None

    def __call__(self) -> "BlockEncoder":
        return BlockEncoder(self, build_tokenizer(*self.tokenizer))


class BlockEncoder:
    """Encodes blocks. A text of white space alone, or whose ids are none, is empty and left out."""

    def __init__(self, recipe: EncoderRecipe, tokenizer: Tokenizer) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = [np.array([tokenizer.eod_id], np.int32)] if recipe.append_eod else []

    def __call__(self, block: Block) -> EncodedBlock:
        records = parse_block(block, self._recipe.keys)
        encoded: dict[str, EncodedTexts] = {}
        empty = 0
        for key, texts in records.texts.items():
            encoded[key] = self._encode(texts)
            empty += len(texts) - len(encoded[key].sequences)
        return EncodedBlock(block.file, block.path, block.unit, block.end, block.consumed, encoded, empty, records.bad)

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        pieces, lengths, sequences = [], [], []
        for document in self._documents(texts):
            if not document:
                continue
            parts = [*document, *self._end]
            pieces += parts
            sizes = [len(ids) for ids in document]
            sizes[-1] += len(self._end)
            lengths += sizes
            sequences.append(len(sizes))
        ids = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        return EncodedTexts(self._narrow(ids), np.array(lengths, np.int32), np.array(sequences, np.int32))

    def _narrow(self, ids: NDArray[Any]) -> NDArray[Any]:
        # An id outside the vocabulary must not wrap around before the writer checks it.
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self._tokenizer.vocab_size):
            return ids
        return ids.astype(self._dtype, copy=False)

    def _documents(self, texts: Sequence[str]) -> list[list[NDArray[np.int32]]]:
        """For each text the ids of its sequences that have any."""
        splitter = self._recipe.splitter
        if splitter is None:
            pieces = [[text] if text.strip() else [] for text in texts]
        else:
            pieces = [splitter.split(text) for text in texts]
        encoded = self._batches([piece for group in pieces for piece in group])
        documents, at = [], 0
        for group in pieces:
            documents.append([ids for ids in encoded[at : at + len(group)] if len(ids)])
            at += len(group)
        return documents

    def _batches(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        encoded: list[NDArray[np.int32]] = []
        start = size = 0
        for end, text in enumerate(texts, start=1):
            size += len(text)
            if size >= _BATCH_CHARACTERS or end == len(texts):
                encoded += self._tokenizer.encode_batch(texts[start:end])
                start, size = end, 0
        return encoded
