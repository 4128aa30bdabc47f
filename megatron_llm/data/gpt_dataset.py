"""Samples for next-token prediction, cut from one corpus along a sample index (see sample_index.py).

Reading a sample copies a few slices of the memory-mapped corpus into one array; nothing is copied before that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data import index_numpy
from megatron_llm.data.batch import Sample
from megatron_llm.data.index_backend import IndexBackend, TokenArrays
from megatron_llm.utils.errors import UserError

PADDING = -1


class TokenSource(TokenArrays, Protocol):
    """What is read of a corpus; `indexed.IndexedDataset` is one."""

    prefix: str

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

    `index` holds document_index, sample_index and shuffle_index. `backend` reads the ids, numpy without one. Instances
    can be pickled when source and index can.
    """

    def __init__(
        self,
        source: TokenSource,
        index: Mapping[str, NDArray[Any]],
        seq_length: int,
        options: SampleOptions | None = None,
        backend: IndexBackend | None = None,
    ) -> None:
        self.source = source
        self.index = index
        self.seq_length = seq_length
        self.options = options or SampleOptions()
        self._backend = backend or IndexBackend(None, "none was given")
        self._prepare()

    def _prepare(self) -> None:
        self._size = len(self.index["shuffle_index"])
        extra = int(self.options.extra_token)
        self._read: Callable[[int], NDArray[np.int64] | None] | None = self._backend.sample_reader(
            self.source, self.index, self.seq_length, extra
        )
        seq_length = self.seq_length
        self._positions = np.arange(seq_length, dtype=np.int64)
        self._ones = np.ones(seq_length, np.float32)
        self._positions.flags.writeable = self._ones.flags.writeable = False  # samples share them

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("source", "index", "seq_length", "options", "_backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def __len__(self) -> int:
        return self._size

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Where sample `index` lies in the corpus: (document, offset, tokens), the extra token included."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index_numpy.pieces(self.index, self.source.sequence_lengths, index, int(self.options.extra_token))

    def text(self, index: int) -> NDArray[np.int64]:
        """The ids of sample `index`, padded with -1 at the end of a partial one: [seq_length + 1], or without extra token [seq_length]."""
        ids = self._read(index) if self._read is not None else None
        if ids is None:  # also where the reader found something wrong: what follows has the words for it
            ids = self._gather(index)
        limit = self.options.vocab_size
        if limit is not None and int(ids.max()) >= limit:
            raise UserError(
                f"{self.source.prefix} holds token id {int(ids.max())} (in sample {index}), the model's vocabulary has {limit}:"
                " give the tokenizer the data was made with, or a larger --vocab-size"
            )
        return ids

    def _gather(self, index: int) -> NDArray[np.int64]:
        ids = np.empty(self.seq_length + int(self.options.extra_token), np.int64)
        filled = 0
        for document, offset, count in self.pieces(index):
            ids[filled : filled + count] = self.source.get(document, offset, count)
            filled += count
        ids[filled:] = PADDING
        return ids

    def __getitem__(self, index: int) -> Sample:
        ids = self.text(index)
        if self.options.extra_token:
            tokens, labels = ids[:-1], ids[1:]
        else:
            tokens, labels = ids, np.append(ids[1:], PADDING)
        options = self.options
        loss_mask, positions, documents = self._ones, self._positions, None
        resets = options.reset_position_ids or options.reset_attention_mask
        ends = np.flatnonzero(tokens == options.eod_id) if resets or options.eod_mask_loss else self._positions[:0]
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
