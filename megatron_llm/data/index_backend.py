"""The one choice between the C++ index builders and their numpy equivalents. Results are the same; only speed differs.

`MEGATRON_LLM_INDEX_BACKEND=numpy` takes numpy even where the extension is built; `native` makes its absence an error.
"""

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data import index_numpy
from megatron_llm.utils.errors import UserError

VARIABLE = "MEGATRON_LLM_INDEX_BACKEND"
MAX_DATASETS = int(np.iinfo(np.int16).max)


class IndexBackend:
    """Index builders: those of the extension when `native` is the module, numpy's when it is None."""

    def __init__(self, native: Any | None, why_not_native: str = "") -> None:
        self._native = native
        self._why_not_native = why_not_native

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
        lengths, documents = _plain(lengths, np.int32), _plain(documents, np.int32)
        wide = max(len(documents), int(lengths.max())) > np.iinfo(np.int32).max
        if self._native is None:
            return index_numpy.sample_index(lengths, documents, seq_length, samples, extra, np.int64 if wide else np.int32)
        build = self._native.sample_index_int64 if wide else self._native.sample_index_int32
        result: NDArray[Any] = build(lengths, documents, seq_length, samples, extra)
        return result

    def blend_index(self, weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Dataset and its sample for each of `size` samples of a blend: see `index_numpy.blend_index`."""
        _check_count(len(weights))
        datasets, samples = (self._native or index_numpy).blend_index(_plain(weights, np.float64), size)
        return datasets, samples

    def exhaustive_blend_index(self, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Every sample of every dataset once, in proportion to their sizes: see `index_numpy.exhaustive_blend_index`."""
        _check_count(len(sizes))
        datasets, samples = (self._native or index_numpy).exhaustive_blend_index(_plain(sizes, np.int64))
        return datasets, samples


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


def _plain(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    # The .idx header is 34 bytes long, so arrays mapped from it are not aligned; the C++ code needs them to be.
    return np.require(array, dtype, ["C", "A"])


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_DATASETS:
        raise UserError(f"a blend has 1 to {MAX_DATASETS} datasets, got {count}")
