"""Keys and values of all running answers in one cache, padded on the left, so that one forward pass serves them all.

All rows end at the same column, where the next token of each is written. An answer joins with the cache of its prompt,
which is copied into free rows; when one leaves, the last row takes its place. The buffers have room for some tokens more
than there are: only when that is used up is everything copied into new ones.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megatron_llm.serve.language_model import LanguageModel

Owner = TypeVar("Owner")
_ROWS_AT_ONCE = 8
_LEAST_ROOM, _MOST_ROOM = 64, 256  # columns


class KeyValueBatch(Generic[Owner]):
    """Rows [keys and values of one answer], each with its owner, who is any object."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.owners: list[Owner] = []
        self._clear()

    def _clear(self) -> None:
        self.owners.clear()
        self._lengths: list[int] = []
        self._layers: list[Any] = []
        self._cache: Any = None
        self._span: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._model.device)  # [rows, columns]; 0 is padding

    def add(self, cache: Any, owners: Sequence[Sequence[Owner]], lengths: Sequence[int]) -> None:
        """Let answers join. Row r of `cache` holds a prompt of `lengths[r]` tokens, padded on the left, for all `owners[r]`."""
        columns = int(cache.get_seq_length())
        source = [row for row, group in enumerate(owners) for _ in group]
        first, count = len(self.owners), len(source)
        self._make_room(cache, first + count, columns)
        end = self._span.end
        for mine, new in zip(self._layers, cache.layers, strict=True):
            same = count == len(owners)
            mine.write(first, end, new.keys if same else new.keys[source], new.values if same else new.values[source])
        self._mask[first : first + count] = 0
        for row, place in enumerate(source, start=first):
            self._mask[row, end - lengths[place] : end] = 1
            self._lengths.append(lengths[place])
        self.owners += [owner for group in owners for owner in group]
        self._set_span()

    def drop(self, rows: Sequence[int]) -> None:
        """Let the owners of these rows leave. The order of the others changes."""
        if len(rows) == len(self.owners):
            self._clear()
            return
        for row in sorted(rows, reverse=True):
            last = len(self.owners) - 1
            if row != last:
                for layer in self._layers:
                    layer.copy_row(last, row)
                self._mask[row] = self._mask[last]
                self._lengths[row], self.owners[row] = self._lengths[last], self.owners[last]
            self._lengths.pop()
            self.owners.pop()
        if rows:
            self._set_span()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row; logits [rows, vocabulary] of what comes next."""
        self._make_room(None, len(self.owners), 0)
        span = self._span
        ids = torch.tensor(tokens, dtype=torch.long, device=self._mask.device)[:, None]
        positions = torch.tensor(self._lengths, dtype=torch.long, device=self._mask.device)[:, None]
        self._mask[: span.rows, span.end] = 1
        logits = self._model.forward(ids, self._cache, self._mask[: span.rows, span.start : span.end + 1], positions)
        self._lengths = [length + 1 for length in self._lengths]
        span.end += 1
        return logits

    def _set_span(self) -> None:
        self._span.rows, self._span.start = len(self.owners), self._span.end - max(self._lengths)

    def _make_room(self, cache: Any, rows: int, columns: int) -> None:
        """Room for so many rows, for columns of newcomers before the end, and for one token behind it."""
        held_rows, held_columns = self._mask.shape
        if self._span is not None and rows <= held_rows and columns <= self._span.end < held_columns:
            return
        from megatron_llm.serve.kv_layers import Span, roomy_cache, roomy_layer

        old = self._span or Span()
        end = max(columns, old.end - old.start)
        rows = -(-rows // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
        room = min(max(end // 2, _LEAST_ROOM), _MOST_ROOM)
        span = Span(old.rows, end - (old.end - old.start), end)
        mask = torch.zeros(rows, end + room, dtype=torch.long, device=self._mask.device)
        mask[: old.rows, span.start : end] = self._mask[: old.rows, old.start : old.end]
        if self._layers:
            # One after the other, so that only one layer is held twice.
            for number, layer in enumerate(self._layers):
                self._layers[number] = layer.moved(span, rows, end + room)
        else:
            make = roomy_layer()
            self._layers = [make(span, layer.keys, layer.values, rows, end + room) for layer in cache.layers]
            self._cache = roomy_cache(self._layers)  # holds the list itself, and with it what is put there later
        self._mask, self._span = mask, span
