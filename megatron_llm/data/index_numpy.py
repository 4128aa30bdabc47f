"""Builders of the sample index and of the blending index in numpy: the same functions as the C++ extension.

They are what runs where the extension could not be built, and what the extension is tested against: results are equal
bit for bit. The sample index is vectorised in pieces of bounded memory. A blend is a recurrence (each choice depends on
all before it), so a piece of it is guessed from the choices a near-period earlier, checked with array operations, and
walked one sample at a time only where the guess is wrong.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

DOCUMENT_PIECE = 1 << 22
BLEND_PIECE = 1 << 15
BAD_GUESS = 0.05  # with more of a guess wrong than this, walking over the whole piece is faster than correcting it


def sample_index(
    lengths: NDArray[np.int32], documents: NDArray[np.int32], seq_length: int, samples: int, extra: int, dtype: type[np.signedinteger[Any]]
) -> NDArray[Any]:
    """Boundaries of the samples: [samples + 1, 2] of (place in `documents`, offset inside that document).

    The documents, in the given order, form one stream of tokens; sample k is the stream tokens
    [k * seq_length, (k + 1) * seq_length + extra). Boundary k > 0 lies at the last token of sample k - 1: with the extra
    token (extra 1) that is also the first of sample k; without it (0), just past its last. Boundary 0 is (0, 0). A
    boundary past the end of the stream (the partial last sample) lies at the end of the last document.
    """
    out = np.zeros((samples + 1, 2), dtype)
    boundary, start = 1, 0  # next boundary to place; stream position where the piece starts
    for first in range(0, len(documents), DOCUMENT_PIECE):
        piece = lengths[documents[first : first + DOCUMENT_PIECE]]
        ends = start + np.cumsum(piece, dtype=np.int64)
        # Boundary k lies at stream token k * seq_length + extra - 1.
        last = min(samples, (int(ends[-1]) - extra) // seq_length)
        if last >= boundary:
            targets = np.arange(boundary, last + 1, dtype=np.int64) * seq_length + (extra - 1)
            places = np.searchsorted(ends, targets, side="right")
            out[boundary : last + 1, 0] = first + places
            out[boundary : last + 1, 1] = targets - (ends[places] - piece[places]) + 1 - extra
            boundary = last + 1
        start = int(ends[-1])
        if boundary > samples:
            return out
    out[boundary:] = (len(documents) - 1, int(lengths[documents[-1]]) - extra)
    return out


def blend_index(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which dataset gives each of `size` samples of a blend, and which of that dataset's samples it is.

    Sample n comes from the dataset that is furthest behind its share: the largest weight * max(n, 1) - taken, the first
    of equals.
    """
    datasets = np.empty(size, np.int16)
    taken = np.zeros(len(weights))  # whole numbers below 2^53, so exact
    back = _near_period(weights) if size > BLEND_PIECE else 0
    for first in range(0, size, BLEND_PIECE):
        last = min(first + BLEND_PIECE, size)
        if 0 < back <= first:
            guess = np.resize(datasets[first - back : first], last - first)
            datasets[first:last] = _correct(weights, first, taken, guess)
        else:
            datasets[first:last] = _walk(weights, first, last, taken)
    return datasets, _count_up(datasets, len(weights))


def exhaustive_blend_index(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The blend that takes every sample of every dataset once, in proportion to their sizes; a dataset used up drops out."""
    total = int(sizes.sum())
    weights = sizes / np.float64(max(total, 1))
    taken = np.where(sizes > 0, 0.0, np.inf)
    datasets = _walk(weights, 0, total, taken, sizes.tolist())
    return datasets, _count_up(datasets, len(sizes))


def _walk(
    weights: NDArray[np.float64], first: int, last: int, taken: NDArray[np.float64], sizes: list[int] | None = None
) -> NDArray[np.int16]:
    """Choices of samples [first, last), one after the other; `taken` (samples taken from each dataset) is brought up to date.

    With `sizes`, a dataset used up counts as infinitely far ahead, so that it is not chosen again.
    """
    choices: list[int] = []
    deficits = np.empty(len(weights))
    for start in range(first, last, BLEND_PIECE):
        for shares in _shares(weights, start, min(start + BLEND_PIECE, last)):
            best = int(np.subtract(shares, taken, out=deficits).argmax())
            taken[best] += 1.0
            choices.append(best)
            if sizes is not None and taken[best] == sizes[best]:
                taken[best] = np.inf
    return np.asarray(choices, np.int16)


def _shares(weights: NDArray[np.float64], first: int, last: int) -> NDArray[np.float64]:
    """What each dataset should have given by each of the samples [first, last): [last - first, datasets]."""
    positions = np.maximum(np.arange(first, last), 1).astype(np.float64)
    return np.asarray(weights * positions[:, None])


def _correct(weights: NDArray[np.float64], first: int, taken: NDArray[np.float64], guess: NDArray[np.int16]) -> NDArray[np.int16]:
    """Choices of the samples from `first` on, given a guess of them; `taken` is brought up to date."""
    choices, count = guess.copy(), len(weights)
    picked = guess[:, None] == np.arange(count, dtype=np.int16)
    before = taken + (np.cumsum(picked, axis=0) - picked)
    wrong = np.flatnonzero(np.argmax(_shares(weights, first, first + len(guess)) - before, axis=1) != guess)
    if len(wrong) > BAD_GUESS * len(guess):
        return _walk(weights, first, first + len(guess), taken)
    settled = 0
    for place in wrong.tolist():
        if place < settled:
            continue
        # The guess was right up to here, hence the counts before this place too. Walk until they meet the guess again.
        counts, settled = before[place].copy(), place
        while settled < len(guess) and (settled == place or not np.array_equal(counts, before[settled])):
            choices[settled : settled + 1] = _walk(weights, first + settled, first + settled + 1, counts)
            settled += 1
    taken += np.bincount(choices, minlength=count)
    return choices


def _near_period(weights: NDArray[np.float64]) -> int:
    """How far back to look for a guess: the shift at which every dataset's share is closest to a whole number of samples."""
    shifts = np.arange(BLEND_PIECE // 2, BLEND_PIECE + 1)
    shares = weights * shifts[:, None]
    return int(shifts[np.abs(shares - np.round(shares)).max(axis=1).argmin()])


def _count_up(datasets: NDArray[np.int16], count: int) -> NDArray[np.int64]:
    """For each place, how often the same dataset occurs before it."""
    samples = np.empty(len(datasets), np.int64)
    for dataset in range(count):
        places = np.flatnonzero(datasets == dataset)
        samples[places] = np.arange(len(places))
    return samples
