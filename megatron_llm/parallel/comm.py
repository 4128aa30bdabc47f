"""Raw collectives over a `Group`: the one place that calls `torch.distributed`'s collectives on tensors.

No autograd here (see `collectives` for the pairs with a backward). On a group of one rank every function is the
identity and needs no process group. Two facts live here and nowhere else: torch 2.13 renamed `reduce_scatter_tensor`
and `all_gather_into_tensor` to `..._single` (the old names warn, the new ones do not exist before), and gloo's
reduce-scatter is slower than its all-reduce, so code that may choose asks `scatters_natively`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.groups import Group

ReduceName = Literal["sum", "max", "min"]

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Pending:
    """A collective under way; `wait` returns its result. `work` is None when there was nothing to send."""

    tensor: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """Block until the result is in place (on GPUs: make the current stream wait) and return it."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def _handle(group: Group) -> dist.ProcessGroup:
    """The process group of a group of several ranks."""
    if group.pg is None:
        raise ValueError(f"group of ranks {group.ranks} was made without a process group")
    return group.pg


def scatters_natively(group: Group) -> bool:
    """Whether a reduce-scatter over this group is cheaper than an all-reduce: true on NCCL and shm, not on gloo."""
    return group.size > 1 and dist.get_backend(_handle(group)) in ("nccl", "shm")


@overload
def all_reduce(tensor: Tensor, group: Group, op: ReduceName = "sum", async_op: Literal[False] = False) -> Tensor: ...
@overload
def all_reduce(tensor: Tensor, group: Group, op: ReduceName = "sum", *, async_op: Literal[True]) -> Pending: ...
def all_reduce(tensor: Tensor, group: Group, op: ReduceName = "sum", async_op: bool = False) -> Tensor | Pending:
    """Reduce `tensor` (contiguous, any shape) over the group, in place; returns it, or a `Pending` when `async_op`."""
    if group.size == 1:
        return Pending(tensor) if async_op else tensor
    work = dist.all_reduce(tensor, op=_REDUCE_OPS[op], group=_handle(group), async_op=async_op)
    return Pending(tensor, work) if async_op else tensor


def all_gather_first_dim(tensor: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's `tensor` [n, ...] in group order: a new [n * size, ...], or `tensor` itself when alone."""
    if group.size == 1:
        return tensor
    output = tensor.new_empty((tensor.shape[0] * group.size, *tensor.shape[1:]))
    _all_gather(output, tensor.contiguous(), group=_handle(group))
    return output


def all_gather_into(output: Tensor, shard: Tensor, group: Group, *, async_op: bool = False) -> Pending:
    """Gather flat `shard` [n] of every rank into flat `output` [n * size]; `shard` may be this rank's part of `output`."""
    if group.size == 1:
        output.copy_(shard)
        return Pending(output)
    return Pending(output, _all_gather(output, shard, group=_handle(group), async_op=async_op))


def reduce_scatter_first_dim(tensor: Tensor, group: Group) -> Tensor:
    """Sum `tensor` [n * size, ...] over the group and return this rank's [n, ...] of it (`tensor` itself when alone)."""
    if group.size == 1:
        return tensor
    if tensor.shape[0] % group.size:
        raise ValueError(f"first dimension {tensor.shape[0]} does not divide over {group.size} ranks")
    rows = tensor.shape[0] // group.size
    output = tensor.new_empty((rows, *tensor.shape[1:]))
    _reduce_scatter(output, tensor.contiguous(), group=_handle(group))
    return output


def reduce_scatter_into(shard: Tensor, tensor: Tensor, group: Group, *, async_op: bool = False) -> Pending:
    """Sum flat `tensor` [n * size] over the group into flat `shard` [n], which may be this rank's part of `tensor`."""
    if group.size == 1:
        shard.copy_(tensor)
        return Pending(shard)
    return Pending(shard, _reduce_scatter(shard, tensor, group=_handle(group), async_op=async_op))


def broadcast(tensor: Tensor, group: Group, src_index: int = 0) -> Tensor:
    """Overwrite `tensor` with that of the group's rank number `src_index`, in place; returns it."""
    if group.size > 1:
        dist.broadcast(tensor, src=group.ranks[src_index], group=_handle(group))
    return tensor


def exchange(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group) -> None:
    """Send and receive contiguous tensors, each with the other end's number in the group, all at once; wait for all.

    At most one tensor in each direction between two ranks; a rank that sends and receives nothing need not call it.
    """
    operations = [dist.P2POp(dist.isend, tensor, group=_handle(group), group_peer=peer) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, group=_handle(group), group_peer=peer) for tensor, peer in receives]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    if group.size == 1:
        return
    if dist.get_backend(_handle(group)) == "nccl":
        # NCCL has no barrier of its own and torch would have to guess the device: say which.
        dist.barrier(group=_handle(group), device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier(group=_handle(group))
