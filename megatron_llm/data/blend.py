"""Blends of corpora: what `--data-path` and `--split` mean, and the dataset that draws from several others.

A blend is "weight prefix weight prefix ...". The order of the samples is fixed by the weights alone: each sample comes
from the corpus furthest behind its share. Rules and numbers are megatron-core's (0.16), so that the same command line
gives the same samples in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.batch import Dataset, Sample
from megatron_llm.utils.errors import UserError

SPLITS = ("train", "valid", "test")
# A corpus of a blend is given this many more samples than its share, for the blend's rounding may ask for a few more.
SURPLUS = 0.005
PIECE = 1 << 16  # entries of an index that are looked at together


@dataclass(frozen=True)
class Blend:
    """Prefixes of corpora and their weights, which sum to 1; weights None: each corpus by its size, once."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_data_path(values: Sequence[str]) -> Blend:
    """Read `--data-path`: one or more prefixes, or weights and prefixes in turn.

    One value holding spaces is split at them (a quoted shell variable). UserError: nothing given, weights only for some,
    a weight that is not above 0.
    """
    if len(values) == 1 and not _exists(values[0]):
        values = values[0].split()
    if not values:
        raise UserError("--data-path is empty: give the prefix of a .bin/.idx pair, or weight prefix weight prefix ...")
    weights = [None if _exists(value) else _number(value) for value in values[::2]]
    if all(weight is None for weight in weights):
        return Blend(tuple(values), None)
    if len(values) % 2 or any(weight is None for weight in weights):
        raise UserError(f"--data-path {' '.join(values)}: give a weight before every prefix, or before none")
    if any(weight is None or not 0 < weight < math.inf for weight in weights):
        raise UserError(f"--data-path {' '.join(values)}: weights must be above 0; leave out a corpus that is not to be used")
    return Blend(tuple(values[1::2]), tuple(normalized([weight for weight in weights if weight is not None])))


def _exists(prefix: str) -> bool:
    return Path(f"{prefix}.idx").exists()


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    array = np.asarray(weights, np.float64)
    return [float(weight) for weight in array / np.sum(array)]


def parse_split(split: str) -> list[float]:
    """Read `--split`: shares of train, valid and test, divided by their sum; what is left out is 0."""
    numbers = [_number(part) for part in split.split(",")]
    if not 1 <= len(numbers) <= len(SPLITS) or any(number is None or not 0 <= number < math.inf for number in numbers):
        raise UserError(f"--split {split!r}: expected up to three numbers from 0 on, for train, valid and test, as in 949,50,1")
    shares = [number or 0.0 for number in numbers] + [0.0] * (len(SPLITS) - len(numbers))
    if not any(shares):
        raise UserError(f"--split {split!r}: at least one of the shares must be above 0")
    return normalized(shares)


def split_documents(split: str, documents: int) -> list[range]:
    """The documents of train, valid and test: ranges that follow each other; empty where the share is 0 or too small."""
    ranges, before = [], 0.0
    for share in parse_split(split):
        after = before + share
        ranges.append(range(round(before * documents), round(after * documents)))
        before = after
    return ranges


def corpus_sizes(weights: Sequence[float], samples: int) -> tuple[list[int], list[int]]:
    """For a blend of `samples` samples: how many come from each corpus, and for how many each corpus is to be built."""
    targets = [math.ceil(samples * weight) for weight in weights]
    return targets, [math.ceil(target * (1 + SURPLUS)) for target in targets]


class BlendedDataset:
    """Draws from several datasets along an index: "dataset_index" [samples] and "sample_index" [samples] (see index_numpy.py).

    The numbers of each dataset's samples ascend. UserError when the index asks a dataset for more samples than it has.
    """

    def __init__(self, datasets: Sequence[Dataset], index: Mapping[str, NDArray[Any]]) -> None:
        self.datasets = list(datasets)
        self.index = index
        for number, (dataset, count) in enumerate(zip(self.datasets, _wanted(index, len(self.datasets)), strict=True)):
            if len(dataset) < count:
                raise UserError(f"the blend wants {count} samples of corpus number {number}, which was built for {len(dataset)}")

    def __len__(self) -> int:
        return len(self.index["dataset_index"])

    def place(self, index: int) -> tuple[int, int]:
        """Which dataset, and which of its samples, sample `index` is."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(self.index["dataset_index"][index]), int(self.index["sample_index"][index])

    def __getitem__(self, index: int) -> Sample:
        dataset, sample = self.place(index)
        return self.datasets[dataset][sample]


def _wanted(index: Mapping[str, NDArray[Any]], count: int) -> list[int]:
    """How many samples the index wants of each of `count` datasets: one more than the last number it has of it.

    The index is read from its end, and only as far as is needed to meet every dataset: it may be large and on a slow disk.
    """
    wanted = np.zeros(count, np.int64)
    for end in range(len(index["dataset_index"]), 0, -PIECE):
        piece = slice(max(0, end - PIECE), end)
        np.maximum.at(wanted, index["dataset_index"][piece], index["sample_index"][piece] + 1)
        if wanted.all():
            break
    return [int(number) for number in wanted]
