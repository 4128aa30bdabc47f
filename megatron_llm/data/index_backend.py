"""The one choice between the C++ builders and readers and their numpy equivalents. Results are the same; only speed differs.

`MEGATRON_LLM_INDEX_BACKEND=numpy` takes numpy even where the extension is built; `native` makes its absence an error.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data import index_numpy
from megatron_llm.utils.errors import UserError

VARIABLE = "MEGATRON_LLM_INDEX_BACKEND"
MAX_DATASETS = int(np.iinfo(np.int16).max)
MAX_THREADS = 16  # more wait for memory together


class TokenArrays(Protocol):
    """The arrays of a corpus: see `indexed.IndexedDataset`."""

    @property
    def tokens(self) -> NDArray[Any]: ...
    @property
    def sequence_pointers(self) -> NDArray[np.int64]: ...
    @property
    def sequence_lengths(self) -> NDArray[np.int32]: ...


class IndexBackend:
    """Builders and readers: those of the extension when `native` is the module, numpy's when it is None.

    `threads` is how many the C++ builders use, by default as many as this process has processors.
    """

    def __init__(self, native: Any | None, why_not_native: str = "", threads: int | None = None) -> None:
        self._native = native
        self._why_not_native = why_not_native
        self.threads = threads or min(MAX_THREADS, _processors())

    @property
    def name(self) -> str:
        """`native` or `numpy`."""
        return "numpy" if self._native is None else "native"

    def describe(self) -> str:
        """One line for the start of a run: which builders are in use, and why."""
        if self._native is not None:
            return "index builder: native (C++ extension megatron_llm._C)"
        return f"index builder: numpy, same results as the C++ extension but slower ({self._why_not_native})"

    def sample_index(
        self, lengths: NDArray[np.int32], documents: NDArray[np.int32], seq_length: int, samples: int, extra: int
    ) -> NDArray[Any]:
        """Boundaries of the samples, [samples + 1, 2]: see `index_numpy.sample_index`. int32, or int64 where that is too small."""
        if len(documents) == 0 or seq_length < 1 or samples < 0 or extra not in (0, 1):
            raise ValueError(f"{len(documents)} documents, seq_length {seq_length}, {samples} samples, extra {extra}")
        documents = _plain(documents, np.int32)
        wide = len(documents) > np.iinfo(np.int32).max  # lengths are 32 bits wide
        if self._native is None:
            return index_numpy.sample_index(
                _plain(lengths, np.int32), documents, seq_length, samples, extra, np.int64 if wide else np.int32
            )
        build = self._native.sample_index_int64 if wide else self._native.sample_index_int32
        result: NDArray[Any] = build(np.require(lengths, np.int32, ["C"]), documents, seq_length, samples, extra, self.threads)
        return result

    def shuffle(self, order: NDArray[Any], random: np.random.RandomState) -> None:
        """`random.shuffle(order)` for a contiguous array of whole numbers: the same order, the same state of `random` afterwards."""
        if self._native is None or order.itemsize != 4 or len(order) > 1 << 32:
            random.shuffle(order)
            return
        state = random.get_state(legacy=False)
        key = np.array(state["state"]["key"], np.uint32)
        used = self._native.shuffle(order, key, int(state["state"]["pos"]))
        random.set_state({**state, "state": {"key": key, "pos": used}})

    def sample_reader(
        self, source: TokenArrays, index: Mapping[str, NDArray[Any]], seq_length: int, extra: int
    ) -> Callable[[int], NDArray[np.int64] | None] | None:
        """A function that reads the ids of a sample, [seq_length + extra], padded with -1; None when there is only numpy for it.

        The function gives None for a sample that the arrays have not, or at which they contradict each other.
        """
        if self._native is None or source.tokens.dtype.kind not in "iu":
            return None
        arrays = (source.tokens, source.sequence_pointers, source.sequence_lengths)
        reader = self._native.SampleReader(
            *arrays, index["document_index"], index["sample_index"], index["shuffle_index"], seq_length, extra
        )
        read: Callable[[int], NDArray[np.int64] | None] = reader.read
        return read

    def blend_index(self, weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Dataset and its sample for each of `size` samples of a blend: see `index_numpy.blend_index`."""
        _check_count(len(weights))
        weights = _plain(weights, np.float64)
        if self._native is None:
            return index_numpy.blend_index(weights, size)
        datasets, samples = self._native.blend_index(weights, size, self.threads)
        return datasets, samples

    def exhaustive_blend_index(self, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Every sample of every dataset once, in proportion to their sizes: see `index_numpy.exhaustive_blend_index`."""
        _check_count(len(sizes))
        sizes = _plain(sizes, np.int64)
        if self._native is None:
            return index_numpy.exhaustive_blend_index(sizes)
        datasets, samples = self._native.exhaustive_blend_index(sizes, self.threads)
        return datasets, samples

    def __reduce__(self) -> tuple[Callable[..., "IndexBackend"], tuple[Any, ...]]:
        # A module cannot be pickled: the copy takes what its own process has.
        if self._native is None:
            return IndexBackend, (None, self._why_not_native, self.threads)
        return load_backend, ()


def load_backend() -> IndexBackend:
    """The backend to use: the extension when it is there, unless the environment variable says otherwise."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "native", "numpy"):
        raise UserError(f"{VARIABLE} is {wanted!r}: expected auto, native or numpy")
    if wanted == "numpy":
        return IndexBackend(None, f"{VARIABLE}=numpy")
    try:
        return IndexBackend(importlib.import_module("megatron_llm._C"))
    except ImportError as error:
        if wanted == "native":
            raise UserError(
                f"{VARIABLE}=native, but the extension megatron_llm._C cannot be imported ({error}): build it with `pip install -e .`"
            ) from error
        reason = "it is not built" if isinstance(error, ModuleNotFoundError) else f"it cannot be imported: {error}"
        return IndexBackend(None, f"{reason}; `pip install -e .` builds it where there is a C++17 compiler")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    # The .idx header is 34 bytes long, so arrays mapped from it are not aligned, which not all C++ code takes.
    return np.require(array, dtype, ["C", "A"])


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_DATASETS:
        raise UserError(f"a blend has 1 to {MAX_DATASETS} datasets, got {count}")
