"""Point-to-point transfers of the pipeline: posted at once, waited for when the tensor is needed.

Both ends post in the order of one common plan (see `schedules.py`), which is what NCCL requires: it has no tags, and one
queue serves both directions between two ranks. CPU backends do match tags, so every transfer gets its own: a plan that
disagreed with itself would stop with a timeout rather than mix up tensors, and receives may be posted earlier than the
common plan has them.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.groups import Group


def matches_tags(group: Group) -> bool:
    """Whether a receive finds its tensor by the tag, whatever the order of posting: all backends but NCCL."""
    return group.pg is not None and dist.get_backend(group.pg) != "nccl"


@dataclass(frozen=True)
class Receipt:
    """A receive in flight."""

    tensor: Tensor
    work: dist.Work

    def take(self) -> Tensor:
        """The tensor, when it is there (on a GPU: when the current stream may use it). Once: gloo would wait for another."""
        self.work.wait()
        return self.tensor


@dataclass
class Mailbox:
    """This rank's end of the transfers within a pipeline group.

    A sent tensor is kept until its send is over. That is asked when the next tensor goes the same way, so at most one
    sent tensor a direction is alive longer than needed.
    """

    group: Group
    device: torch.device
    sending: dict[tuple[int, str], Receipt] = field(default_factory=dict)

    def post_receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, tag: int) -> Receipt:
        """Start receiving a tensor from stage `source` of the group."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        work = dist.irecv(tensor, group=self.group.pg, group_src=source, tag=tag)
        assert work is not None, "this rank is a member of its own pipeline group"
        return Receipt(tensor, work)

    def post_send(self, tensor: Tensor, target: int, way: str, tag: int) -> None:
        """Start sending a tensor to stage `target`; `way` tells directions apart when both go to one stage."""
        previous = self.sending.pop((target, way), None)
        if previous is not None:
            previous.take()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=self.group.pg, group_dst=target, tag=tag)
        assert work is not None, "this rank is a member of its own pipeline group"
        self.sending[target, way] = Receipt(tensor, work)

    def finish(self) -> None:
        """Wait for all sends."""
        for sent in self.sending.values():
            sent.take()
        self.sending.clear()
