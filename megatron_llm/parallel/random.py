"""Random numbers that do not depend on the layout, nor on what was drawn before.

Weights: each logical tensor is drawn in blocks of rows, every block from a generator seeded by (seed, name, block). A
rank draws only the blocks it holds, and the model is the same under any TP x PP x DP.

Dropout: nothing is drawn from a running stream. The seed of a mask is a hash of (run seed, step, first sample of the
micro-batch, layer, site, TP rank where the activations differ between TP ranks). So a mask is the same when a block is
recomputed in the backward, the same after a resume, the same under any PP and DP, and there is no generator state to
save. Where activations are replicated over TP (outside the matrix products, without sequence parallelism) the TP rank
stays out of the hash and all ranks drop the same elements; where they are sharded it is in and the masks differ.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.parallel.groups import Group
from megatron_llm.parallel.placement import Part

_BLOCK_ELEMENTS = 1 << 20


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts; equal parts give equal seeds, on every machine."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def fill_normal_(local: Tensor, part: Part, std: float, seed: int, name: str) -> None:
    """Fill a part's rows of `local` with its rectangle of the logical tensor N(0, std^2) seeded by (seed, name, part).

    Draws in fp32 on the CPU, a block of rows at a time, so memory stays small and the values are those of any layout.
    """
    if part.numel == 0:
        return
    total_rows = part.global_shape[0]
    width = 1
    for size in part.global_shape[1:]:
        width *= size
    rows_per_block = max(1, _BLOCK_ELEMENTS // width)
    target = part.view(local)
    first, last = part.global_start[0], part.global_start[0] + part.shape[0]
    for block in range(first // rows_per_block, (last - 1) // rows_per_block + 1):
        start = block * rows_per_block
        stop = min(start + rows_per_block, total_rows)
        generator = torch.Generator().manual_seed(derive_seed(seed, name, part.name, block))
        values = torch.empty(stop - start, width).normal_(0.0, std, generator=generator).view(stop - start, *part.global_shape[1:])
        for dim in range(1, values.dim()):
            values = values.narrow(dim, part.global_start[dim], part.shape[dim])
        low, high = max(start, first), min(stop, last)
        target[low - first : high - first].copy_(values[low - start : high - start])


@dataclass(frozen=True)
class DropoutKey:
    """What seeds the dropout of one micro-batch: the run's seed, the step, the number of its first sample."""

    seed: int
    step: int
    sample: int


class Dropout:
    """Dropout at one site of one layer. `sharded`: the activations differ between TP ranks, so their masks must too."""

    def __init__(self, probability: float, layer: int, site: str, tp: Group, *, sharded: bool) -> None:
        self.probability = probability
        self.layer = layer
        self.site = site
        self.stream = tp.rank if sharded else -1

    def seed(self, key: DropoutKey) -> int:
        """The seed of this site's mask for one micro-batch."""
        return derive_seed(key.seed, key.step, key.sample, self.layer, self.site, self.stream)

    def __call__(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        """Drop elements of `x` and scale the rest; without a key (evaluation) or probability, `x` itself."""
        if key is None or self.probability == 0.0:
            return x
        generator = torch.Generator(device=x.device).manual_seed(self.seed(key))
        keep = torch.empty_like(x).bernoulli_(1.0 - self.probability, generator=generator)
        return x * keep.div_(1.0 - self.probability)

    def prepare_default_generator(self, key: DropoutKey | None, device: torch.device) -> float:
        """Seed torch's default generator of `device` for a kernel that draws from it; the probability to pass on."""
        if key is None or self.probability == 0.0:
            return 0.0
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(self.seed(key))
        else:
            torch.default_generator.manual_seed(self.seed(key))
        return self.probability
