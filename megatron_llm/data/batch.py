"""Samples and batches: what a dataset gives, what a training step takes.

A dataset is any object with `len(dataset)` and `dataset[i] -> Sample`. Nothing here knows where tokens come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One sequence of S tokens.

    tokens        [S] int64    what the model reads
    labels        [S] int64    what it should predict at each position: the next token
    loss_mask     [S] float32  1 where the prediction counts, 0 elsewhere
    position_ids  [S] int64    position of each token in its sequence or, when positions are reset, in its document
    document_ids  [S] int64    tokens attend only to earlier ones of the same id; None: to all earlier ones
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int64] | None = None


class Dataset(Protocol):
    """What the loader needs of a dataset. Item i is the same whenever and wherever it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """B samples: the fields of `Sample` as tensors [B, S], all on one device."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on `device`; `non_blocking` as in torch (of use from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(
            change(self.tokens),
            change(self.labels),
            change(self.loss_mask),
            change(self.position_ids),
            None if self.document_ids is None else change(self.document_ids),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal length; either all or none of them have document ids."""
    documents = [sample.document_ids for sample in samples if sample.document_ids is not None]
    if len(documents) not in (0, len(samples)):
        raise ValueError(f"{len(documents)} of {len(samples)} samples have document ids: all or none of a batch must")
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        position_ids=torch.from_numpy(np.stack([sample.position_ids for sample in samples])),
        document_ids=torch.from_numpy(np.stack(documents)) if documents else None,
    )
