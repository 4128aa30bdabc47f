"""Micro-batches of one data-parallel rank, in order, from any position.

The whole state of a loader is `consumed_samples`: a loader made with that number goes on exactly where another stopped,
under any number of ranks and any number of worker processes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch.utils.data import DataLoader

from megatron_llm.data.batch import Batch, Dataset, collate
from megatron_llm.data.sampler import micro_batch_count, rank_samples
from megatron_llm.utils.errors import UserError

PREFETCHED_BATCHES = 2  # global batches each worker keeps ready


class BatchLoader:
    """Iterates over global batches: each `next` gives this rank's micro-batches of the next one, as a list of `Batch`.

    `dataset` must have the samples of every step that is asked for: running past its end is a UserError. Batches are
    read ahead: the next global batch by a thread or, with `num_workers` processes, several by these. Order and content
    do not depend on it. `pin_memory` puts batches in page-locked memory (of use with a GPU). Call `close` (or drop the
    loader) to end the thread or the workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.consumed_samples = consumed_samples
        self.global_batch_size = global_batch_size
        self._dataset = dataset
        self._micro_batches = micro_batch_count(micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, dp_size=dp_size)
        self._sampler = _MicroBatchNumbers(len(dataset), consumed_samples, micro_batch_size, global_batch_size, dp_rank, dp_size)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._batches: Iterator[list[Batch]] | None = None

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> list[Batch]:
        end = self.consumed_samples + self.global_batch_size
        if end > len(self._dataset):
            raise UserError(
                f"the dataset has {len(self._dataset)} samples and the next step needs numbers {self.consumed_samples} to {end - 1}:"
                " it was built for fewer steps; build it for all of them (--train-iters) or add data"
            )
        if self._batches is None:
            self._batches = self._of_workers() if self._num_workers else self._of_thread()
        try:
            batches = next(self._batches)
        except UserError as error:
            # From a worker it arrives with the worker's stack before it; the sentence is the last line.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")) from None
        self.consumed_samples = end
        return batches

    def _of_workers(self) -> Iterator[list[Batch]]:
        loader: DataLoader[Batch] = DataLoader(
            self._dataset,  # type: ignore[arg-type]
            batch_sampler=self._sampler,
            collate_fn=collate,
            num_workers=self._num_workers,
            prefetch_factor=PREFETCHED_BATCHES * self._micro_batches,
            pin_memory=self._pin_memory,
            # Otherwise a seed for the workers would be drawn from torch's global stream, and dropout would depend on it.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        while True:
            yield [next(batches) for _ in range(self._micro_batches)]

    def _of_thread(self) -> Iterator[list[Batch]]:
        """Global batches, each read by a thread while the caller works with the one before it."""
        device = torch.cuda.current_device() if self._pin_memory else None
        numbers = iter(self._sampler)

        def read() -> list[Batch]:
            if device is not None:
                torch.cuda.set_device(device)  # of this thread; otherwise pinning would open a context on the first GPU
            batches = [_read(self._dataset, samples) for samples in islice(numbers, self._micro_batches)]
            return [batch.pin_memory() if self._pin_memory else batch for batch in batches]

        with ThreadPoolExecutor(1, "batches") as pool:
            ahead = pool.submit(read)
            while batches := ahead.result():
                ahead = pool.submit(read)
                yield batches

    def close(self) -> None:
        """End the thread or the worker processes; the loader can be used again afterwards only by making another one."""
        self._batches = None


class _MicroBatchNumbers:
    """The sample numbers of one rank's micro-batches, one list after the other, up to the last whole global batch."""

    def __init__(self, samples: int, consumed: int, micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int) -> None:
        self.samples, self.consumed = samples, consumed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[list[int]]:
        for consumed in range(self.consumed, self.samples - self.global_batch_size + 1, self.global_batch_size):
            yield from rank_samples(
                consumed,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=self.global_batch_size,
                dp_rank=self.dp_rank,
                dp_size=self.dp_size,
            ).tolist()


def evaluation_batches(
    dataset: Dataset, *, micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int, batches: int
) -> Iterator[list[Batch]]:
    """The first `batches` global batches of a dataset, the same at each call; fewer when it has fewer.

    Yields this rank's micro-batches of each. UserError when the dataset does not fill one global batch.
    """
    count = min(batches, len(dataset) // global_batch_size)
    if count < 1:
        raise UserError(
            f"the dataset has {len(dataset)} samples, one evaluation batch takes {global_batch_size}:"
            " give the validation split more documents (--split) or lower --global-batch-size"
        )
    for batch in range(count):
        numbers = rank_samples(
            batch * global_batch_size,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        yield [_read(dataset, micro_batch) for micro_batch in numbers.tolist()]


def _read(dataset: Dataset, numbers: Sequence[int]) -> Batch:
    return collate([dataset[number] for number in numbers])
