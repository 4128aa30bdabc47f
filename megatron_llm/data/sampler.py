"""From samples consumed to sample numbers. Pure arithmetic: no state, no randomness (the dataset's index is shuffled).

The position in the data is one integer, the number of samples consumed by all ranks together. It does not know how many
ranks there are, so a run may go on under another layout and see the same samples.
"""

import numpy as np
from numpy.typing import NDArray


def micro_batch_count(*, micro_batch_size: int, global_batch_size: int, dp_size: int) -> int:
    """Micro-batches each data-parallel rank runs in one step; ValueError when the sizes do not divide."""
    samples = micro_batch_size * dp_size
    if samples < 1 or global_batch_size < 1 or global_batch_size % samples:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of"
            f" micro_batch_size {micro_batch_size} x {dp_size} data-parallel ranks"
        )
    return global_batch_size // samples


def rank_samples(consumed: int, *, micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """Sample numbers of one rank in the global batch that starts at sample `consumed`: [micro-batches, micro_batch_size].

    Micro-batch m of the ranks together is the next micro_batch_size x dp_size samples, rank by rank: Megatron's order.
    """
    if not 0 <= dp_rank < dp_size or consumed < 0:
        raise ValueError(f"dp_rank {dp_rank} of {dp_size}, {consumed} samples consumed")
    count = micro_batch_count(micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, dp_size=dp_size)
    starts = consumed + np.arange(count, dtype=np.int64) * (micro_batch_size * dp_size) + dp_rank * micro_batch_size
    return starts[:, None] + np.arange(micro_batch_size, dtype=np.int64)
