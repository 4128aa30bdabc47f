"""Which parameters decay, and the flat ranges of a bucket that share their optimizer settings.

Weight decay pulls matrices towards zero; biases and norm weights are left alone, as is usual since GPT-2. Because
one-dimensional parameters lie in buckets of their own, a bucket's shard is normally one run: the optimizer then updates
one flat tensor instead of hundreds of small ones.
"""

from dataclasses import dataclass

from torch import nn

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.parallel.buffers import Bucket


@dataclass(frozen=True)
class Run:
    """Elements [start, end) of a bucket's flat buffers, all with the same weight decay."""

    start: int
    end: int
    weight_decay: float


def weight_decay_of(parameter: nn.Parameter, config: OptimizerConfig) -> float:
    """The decoupled weight decay of one parameter: none for biases and norm weights, which have one dimension."""
    return config.weight_decay if parameter.dim() > 1 else 0.0


def runs_of(bucket: Bucket, config: OptimizerConfig) -> list[Run]:
    """Cut the bucket's owned range where the weight decay changes. Gaps between parameters go with the run before."""
    low, high = bucket.owned
    runs: list[Run] = []
    for segment in bucket.segments():
        decay = weight_decay_of(segment.parameter, config)
        if not runs:
            runs.append(Run(low, high, decay))
        elif runs[-1].weight_decay != decay:
            runs[-1:] = [Run(runs[-1].start, segment.offset, runs[-1].weight_decay), Run(segment.offset, high, decay)]
    return runs
