"""What a preprocessing worker does: a block of input lines in, arrays of ids out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.indexed import token_dtype
from megatron_llm.data.records import parse_block
from megatron_llm.data.sentences import SentenceSplitter
from megatron_llm.data.sources import Block
from megatron_llm.data.tokenizer_backends import BackendRecipe, TextEncoder


@dataclass(frozen=True)
class EncodedTexts:
    """The documents of one key, as IndexedWriter.add takes them."""

    ids: NDArray[Any]
    lengths: NDArray[np.int32]
    sequences: NDArray[np.int32]


@dataclass(frozen=True)
class EncodedBlock:
    """A block's documents by key, and what was passed over: the number of empty texts, and the bad lines with their reasons.

    `end` and `consumed` are the block's. `lines` is the number of its lines; those of bad ones count from 1 at its beginning.
    """

    file: int
    path: str
    unit: str
    end: int
    consumed: int
    lines: int
    texts: dict[str, EncodedTexts]
    empty: int
    bad: list[tuple[int, str]]

    def same_ids(self, other: "EncodedBlock") -> bool:
        """Whether another encoding of the block has the same documents of the same ids."""
        pairs = ((texts, other.texts[key]) for key, texts in self.texts.items())
        return all(
            np.array_equal(one.ids, two.ids) and np.array_equal(one.lengths, two.lengths) and np.array_equal(one.sequences, two.sequences)
            for one, two in pairs
        )


@dataclass(frozen=True)
class EncoderRecipe:
    """How a worker makes its encoder (picklable, unlike the tokenizer itself). Calling it gives the encoder.

    `vocab_size` bounds the ids, `eod_id` ends each document unless it is None; with a `splitter` each sentence is a sequence.
    """

    backend: BackendRecipe
    keys: tuple[str, ...]
    vocab_size: int
    eod_id: int | None
    splitter: SentenceSplitter | None

    def __call__(self) -> "BlockEncoder":
        return BlockEncoder(self, self.backend())


class BlockEncoder:
    """Encodes blocks. A text of white space alone, or whose ids are none, is empty and left out."""

    def __init__(self, recipe: EncoderRecipe, encoder: TextEncoder) -> None:
        self.keys = recipe.keys
        self._recipe = recipe
        self._encoder = encoder
        self._dtype = token_dtype(recipe.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        records = parse_block(block, self._recipe.keys)
        encoded: dict[str, EncodedTexts] = {}
        empty = 0
        for key, texts in records.texts.items():
            encoded[key] = self._whole(texts) if self._recipe.splitter is None else self._cut(texts, self._recipe.splitter)
            empty += len(texts) - len(encoded[key].sequences)
        return EncodedBlock(block.file, block.path, block.unit, block.end, block.consumed, records.lines, encoded, empty, records.bad)

    def _whole(self, texts: Sequence[str]) -> EncodedTexts:
        """Each text a sequence."""
        documents = [ids for ids in self._encoder([text for text in texts if text and not text.isspace()]) if ids.size]
        lengths = np.fromiter(map(len, documents), np.int32, len(documents))
        pieces = documents
        if documents and self._recipe.eod_id is not None:
            pieces = [self._end(documents)] * (2 * len(documents))
            pieces[::2] = documents
            lengths += 1
        return EncodedTexts(self._join(pieces), lengths, np.ones(len(documents), np.int32))

    def _cut(self, texts: Sequence[str], splitter: SentenceSplitter) -> EncodedTexts:
        """Each sentence a sequence."""
        sentences = [splitter.split(text) for text in texts]
        encoded = iter(self._encoder([sentence for group in sentences for sentence in group]))
        documents = [ids for ids in ([one for one in islice(encoded, len(group)) if one.size] for group in sentences) if ids]
        lengths = np.array([ids.size for document in documents for ids in document], np.int32)
        sequences = np.array([len(document) for document in documents], np.int32)
        if documents and self._recipe.eod_id is not None:
            for document in documents:
                document.append(self._end(document))
            lengths[np.cumsum(sequences) - 1] += 1
        return EncodedTexts(self._join([ids for document in documents for ids in document]), lengths, sequences)

    def _end(self, ids: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The end-of-document id, in the type of these."""
        return np.array([self._recipe.eod_id], ids[0].dtype)

    def _join(self, pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
        ids: NDArray[Any] = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        # An id outside the vocabulary must not wrap around before the writer checks it.
        least = int(ids.min()) if ids.size and ids.dtype.kind == "i" else 0
        if ids.size and (least < 0 or int(ids.max()) >= self._recipe.vocab_size):
            return ids
        return ids.astype(self._dtype, copy=False)
