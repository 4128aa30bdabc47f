"""Layers of a transformers cache with room ahead: a new token is written into a buffer, where `DynamicCache` copies everything.

The class that transformers asks for is derived when a model is there: deriving it here would import transformers together
with this module.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Span:
    """The part of the buffers that is in use: the first `rows` rows, and of these the columns from `start` up to `end`."""

    rows: int = 0
    start: int = 0
    end: int = 0


class RoomyBuffers:
    """Keys and values [rows, heads, columns, width] of one layer.

    What lies before an answer's first column is zero, not left over: a weight of 0 times a NaN would still be a NaN.
    """

    is_initialized = True

    def __init__(self, span: Span, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        self._span = span
        self.keys, self.values = _zeros(keys, rows, columns), _zeros(values, rows, columns)
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns behind the span, and return what the span and they hold, as views."""
        span, end = self._span, self._span.end + key_states.shape[-2]
        self.keys[: span.rows, ..., span.end : end, :] = key_states
        self.values[: span.rows, ..., span.end : end, :] = value_states
        return self.keys[: span.rows, ..., span.start : end, :], self.values[: span.rows, ..., span.start : end, :]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self._span.end - self._span.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and which is the first."""
        return self.get_seq_length() + query_length, 0

    def write(self, row: int, end: int, keys: Tensor, values: Tensor) -> None:
        """Put the columns of new rows [new rows, heads, columns, width] up to column `end`, and zeros before them."""
        for buffer, new in ((self.keys, keys), (self.values, values)):
            rows, begin = buffer[row : row + new.shape[0]], end - new.shape[-2]
            rows[..., :begin, :] = 0
            rows[..., begin:end, :] = new

    def copy_row(self, source: int, target: int) -> None:
        """Let a row be as another one."""
        end = self._span.end
        for buffer in (self.keys, self.values):
            buffer[target, ..., :end, :] = buffer[source, ..., :end, :]

    def moved(self, span: Span, rows: int, columns: int) -> "RoomyBuffers":
        """A layer of another size with the same content, which ends at `span`'s end."""
        layer = type(self)(span, self.keys, self.values, rows, columns)
        old, width = self._span, self.get_seq_length()
        for mine, new in ((self.keys, layer.keys), (self.values, layer.values)):
            new[: old.rows, ..., span.end - width : span.end, :] = mine[: old.rows, ..., old.start : old.end, :]
        return layer


@functools.cache
def roomy_layer() -> type[RoomyBuffers]:
    """The class of layers, derived from the one of transformers whose behaviour it has."""
    from transformers.cache_utils import DynamicLayer

    return type("RoomyLayer", (RoomyBuffers, DynamicLayer), {})


def roomy_cache(layers: list[Any]) -> Any:
    """What a model takes as `past_key_values`."""
    from transformers.cache_utils import Cache

    return Cache(layers=layers)


def _zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, *like.shape[1:-2], columns, like.shape[-1], dtype=like.dtype, device=like.device)
