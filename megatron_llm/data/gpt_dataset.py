"""Samples for next-token prediction, cut from one corpus along a sample index (see sample_index.py).

Reading a sample is a few slices of the memory-mapped corpus; nothing is copied before that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.batch import Sample
from megatron_llm.utils.errors import UserError

PADDING = -1


class TokenSource(Protocol):
    """What is read of a corpus; `indexed.IndexedDataset` is one."""

    prefix: str
    sequence_lengths: NDArray[np.int32]

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]: ...


@dataclass(frozen=True)
class SampleOptions:
    """How a stretch of tokens becomes a sample.

    `eod_id` ends a document; the three options after it need it. `reset_position_ids` restarts positions after it,
    `reset_attention_mask` gives document ids, `eod_mask_loss` takes it out of the loss where it is the input token.
    `vocab_size`: ids must be below it; None does not look. `extra_token` False: samples are `seq_length` tokens that do
    not overlap, and the last position, whose label lies outside, does not count.
    """

    eod_id: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    vocab_size: int | None = None
    extra_token: bool = True

    def __post_init__(self) -> None:
        if self.eod_id is None and (self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss):
            raise ValueError("reset_position_ids, reset_attention_mask and eod_mask_loss need eod_id")


class GPTDataset:
    """Samples of `seq_length` tokens of one split of one corpus, in the order of its index.

    `index` holds document_index, sample_index and shuffle_index. Instances can be pickled when both parts can.
    """

    def __init__(
        self, source: TokenSource, index: Mapping[str, NDArray[Any]], seq_length: int, options: SampleOptions | None = None
    ) -> None:
        self.source = source
        self.index = index
        self.seq_length = seq_length
        self.options = options or SampleOptions()
        self._positions = np.arange(seq_length, dtype=np.int64)
        self._ones = np.ones(seq_length, np.float32)
        self._positions.flags.writeable = self._ones.flags.writeable = False  # samples share them

    def __len__(self) -> int:
        return len(self.index["shuffle_index"])

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Where sample `index` lies in the corpus: (document, offset, tokens), the extra token included."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(self.index["shuffle_index"][index])
        (first, offset), (last, end) = self.index["sample_index"][number : number + 2].tolist()
        extra = int(self.options.extra_token)
        found = []
        for document in self.index["document_index"][first : last + 1].tolist():
            found.append((document, offset, int(self.source.sequence_lengths[document]) - offset))
            offset = 0
        document, offset, _ = found[-1]
        found[-1] = (document, offset, end + extra - offset)
        return found

    def text(self, index: int) -> NDArray[np.int64]:
        """The ids of sample `index`, padded with -1 at the end of a partial one: [seq_length + 1], or without extra token [seq_length]."""
        size = self.seq_length + int(self.options.extra_token)
        ids = np.empty(size, np.int64)
        filled = 0
        for document, offset, count in self.pieces(index):
            ids[filled : filled + count] = self.source.get(document, offset, count)
            filled += count
        ids[filled:] = PADDING
        limit = self.options.vocab_size
        if limit is not None and int(ids.max()) >= limit:
            raise UserError(
                f"{self.source.prefix} holds token id {int(ids.max())} (in sample {index}), the model's vocabulary has {limit}:"
                " give the tokenizer the data was made with, or a larger --vocab-size"
            )
        return ids

    def __getitem__(self, index: int) -> Sample:
        ids = self.text(index)
        if self.options.extra_token:
            tokens, labels = ids[:-1], ids[1:]
        else:
            tokens, labels = ids, np.append(ids[1:], PADDING)
        options = self.options
        ends = np.flatnonzero(tokens == options.eod_id) if options.eod_id is not None else np.empty(0, np.int64)
        loss_mask, positions, documents = self._ones, self._positions, None
        if options.eod_mask_loss:
            loss_mask = self._ones.copy()
            loss_mask[ends] = 0.0
        if options.reset_position_ids and len(ends):
            # What to count from: the last start of a document at or before each token.
            starts = np.zeros(self.seq_length + 1, np.int64)
            starts[ends + 1] = ends + 1
            positions = self._positions - np.maximum.accumulate(starts)[:-1]
        if options.reset_attention_mask:
            begins = np.zeros(self.seq_length + 1, np.int64)
            begins[ends + 1] = 1
            documents = np.cumsum(begins)[:-1]
        if labels[-1] == PADDING:
            padded = labels == PADDING
            loss_mask = np.where(padded, np.float32(0.0), loss_mask)
            tokens, labels = np.maximum(tokens, 0), np.maximum(labels, 0)
        return Sample(tokens, labels, loss_mask, positions, documents)
