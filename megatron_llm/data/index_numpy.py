"""Builders of orders and indices of samples and blends in numpy: the same functions as the C++ extension.

They are what runs where the extension could not be built, and what the extension is tested against: results are equal
bit for bit. The sample index is vectorised in pieces of bounded memory. A blend is a recurrence (each choice depends on
all before it), but only through the counts of samples taken, which are nearly known in advance: many stretches of it are
walked side by side, from counts that are checked afterwards.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOCUMENT_PIECE = 1 << 22
EARLY = 512  # a stretch of a blend begins so many samples before its place; see _foreseen


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


def pieces(index: Mapping[str, NDArray[Any]], lengths: NDArray[np.int32], number: int, extra: int) -> list[tuple[int, int, int]]:
    """Where sample `number` of an index lies in its corpus: (document, offset, tokens), the extra token included."""
    piece = int(index["shuffle_index"][number])
    (first, offset), (last, end) = index["sample_index"][piece : piece + 2].tolist()
    found = []
    for document in index["document_index"][first : last + 1].tolist():
        found.append((document, offset, int(lengths[document]) - offset))
        offset = 0
    document, offset, _ = found[-1]
    found[-1] = (document, offset, end + extra - offset)
    return found


def blend_index(weights: NDArray[np.float64], size: int, early: int = EARLY) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which dataset gives each of `size` samples of a blend, and which of that dataset's samples it is.

    Sample n comes from the dataset that is furthest behind its share: the largest weight * max(n, 1) - taken, the first
    of equals. `early` changes the time it takes, not the result.
    """
    datasets, samples = np.empty(size, np.int16), np.empty(size, np.int64)
    taken = np.zeros(len(weights))  # whole numbers below 2^53, so exact
    early = max(early, 4 * len(weights)) if early == EARLY else early
    length = 8 * early  # of a stretch
    # Only shares that sum to 1 can be foreseen. Sample 0 has the position of sample 1, so it stands outside the stretches.
    stretches = (size - 1) // length if (weights >= 0).all() and abs(weights.sum() - 1) < 1e-9 else 0
    if stretches < 4:
        _walk(weights, range(size), taken, datasets, samples)
        return datasets, samples
    _walk(weights, range(1), taken, datasets, samples)
    starts = 1 + np.arange(stretches) * length
    counts = np.stack([taken, *(_foreseen(weights, start - early) for start in starts[1:].tolist())])
    shape, end = (stretches, length), 1 + stretches * length
    _walk_together(weights, starts[1:] - early, counts[1:], np.empty((early, stretches - 1), np.int16), np.empty((early, stretches - 1)))
    begins = counts.copy()
    _walk_together(weights, starts, counts, datasets[1:end].reshape(shape).T, samples[1:end].reshape(shape).T)
    taken = counts[0]
    for stretch, start in list(enumerate(starts.tolist()))[1:]:
        walked = (begins[stretch], counts[stretch])
        taken = _mended(weights, range(start, start + length), taken, walked, datasets, samples)
    _walk(weights, range(end, size), taken, datasets, samples)
    return datasets, samples


def exhaustive_blend_index(sizes: NDArray[np.int64], early: int = EARLY) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The blend that takes every sample of every dataset once, in proportion to their sizes; a dataset used up drops out."""
    total = int(sizes.sum())
    numbers = np.flatnonzero(sizes)  # of the datasets that have samples left
    left = sizes[numbers]
    weights = left / np.float64(max(total, 1))
    datasets, samples = blend_index(weights, total, early)
    # Right up to the sample with which the first dataset is used up; from there on with one dataset less, and so on.
    last = np.flatnonzero(samples == left[datasets] - 1)
    done = int(last[0]) + 1 if len(last) else 0
    taken = np.bincount(datasets[:done], minlength=len(left)).astype(np.float64)
    taken[taken == left] = np.inf
    _walk(weights, range(done, total), taken, datasets, samples, left)
    return numbers.astype(np.int16)[datasets], samples


def _walk(
    weights: NDArray[np.float64],
    numbers: range,
    taken: NDArray[np.float64],
    datasets: NDArray[np.int16],
    samples: NDArray[np.int64],
    sizes: NDArray[np.int64] | None = None,
) -> None:
    """The plain walk over the samples `numbers`, one after the other; `taken` [datasets] is brought up to date.

    With `sizes`, a dataset used up counts as infinitely far ahead, so that it is not chosen again.
    """
    deficits = np.empty(len(weights))
    for number in numbers:
        np.multiply(weights, float(max(number, 1)), out=deficits)
        best = int(np.subtract(deficits, taken, out=deficits).argmax())
        datasets[number], samples[number] = best, taken[best]
        taken[best] += 1.0
        if sizes is not None and taken[best] == sizes[best]:
            taken[best] = np.inf


def _foreseen(weights: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """About what is taken of each dataset before sample `number`: its share rounded down, and one more of those that lost most by it.

    A walk from these counts comes, almost always after few samples, to exactly the counts of the walk from the beginning.
    """
    shares = weights * number
    counts = np.asarray(np.floor(shares))
    more = max(0, number - int(counts.sum()))
    counts[np.argsort(counts - shares, kind="stable")[:more]] += 1.0
    return counts


def _walk_together(
    weights: NDArray[np.float64], starts: NDArray[np.int64], counts: NDArray[np.float64], chosen: NDArray[Any], before: NDArray[Any]
) -> None:
    """Walks from each of `starts` (none of them 0), side by side; `counts` [walks, datasets] is brought up to date.

    Fills `chosen` (the dataset) and `before` (how much was taken of it before), [steps, walks] each.
    """
    positions = starts.astype(np.float64)[:, None]
    deficits = np.empty_like(counts)
    flat, rows = counts.reshape(-1), np.arange(len(starts)) * len(weights)
    for step in range(len(chosen)):
        np.multiply(weights, positions + step, out=deficits)
        best = np.subtract(deficits, counts, out=deficits).argmax(axis=1)
        chosen[step] = best
        places = best + rows
        before[step] = flat[places]
        flat[places] += 1.0


def _mended(
    weights: NDArray[np.float64],
    numbers: range,
    taken: NDArray[np.float64],
    walked: tuple[NDArray[np.float64], NDArray[np.float64]],
    datasets: NDArray[np.int16],
    samples: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Counts after a stretch that was `walked` from the first to the second, when `taken` is what it should have begun with.

    Its samples are walked again from there, up to where the two walks meet.
    """
    begin, end = walked
    taken, guessed = taken.copy(), begin.copy()
    for number in numbers:
        if np.array_equal(taken, guessed):
            return end
        guessed[datasets[number]] += 1.0
        _walk(weights, range(number, number + 1), taken, datasets, samples)
    return end if np.array_equal(taken, guessed) else taken
