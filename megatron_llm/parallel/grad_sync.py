"""Gradient accumulation and reduction over all the ranks that hold a parameter.

Gradients accumulate over the micro-batches in flat fp32 buffers; the first of a step overwrites what the step before left
there, so that the buffers, the largest thing a step walks through, need not be cleared. Then, in this order:

1. Data parallel: each bucket is summed over the replicas that saw other samples, while the backward of the last
   micro-batch still runs. Sharded, each rank needs the sum of its share only: a reduce-scatter on NCCL. gloo's
   reduce-scatter is slower than its all-reduce, so there the bucket is all-reduced and the rest ignored.
2. Tensor parallel: partial gradients of replicated parameters are summed (`replica_sums`).
3. Weights that several pipeline stages hold are summed over them: tied embeddings over the first and the last.

Data parallel goes first because it is the large part and the only one worth hiding behind the backward, and because the
two other sums then move a rank's share only. It also makes copies agree to the last bit by construction: whatever order
a communicator adds in, the values that two stages or TP replicas end up with come out of one all-reduce.

Buckets are launched strictly in their order, on every rank the same, so a parameter that gets no gradient on one rank
cannot make two ranks wait for different buckets: its bucket and the later ones are then launched by `finish`.
"""

import weakref
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from megatron_llm.kernels.reference import accumulate_
from megatron_llm.parallel.buffers import Bucket, all_segments, build_buckets, main_grad
from megatron_llm.parallel.comm import Pending, all_gather_into, all_reduce, reduce_scatter_into, scatters_natively
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.placement import get_placement
from megatron_llm.parallel.replica_sums import ReplicaSums, require_agreement


class GradSync:
    """Owns the flat buffers of a rank's model chunks and reduces their gradients.

    One step: `zero_grad`, the micro-batches (their backwards accumulate into `parameter.main_grad`),
    `start_reduction(chunk)` before the last backward of each chunk, `finish`. Without `start_reduction`, or without
    `overlap`, everything is reduced in `finish`. A parameter without a gradient counts as one with a zero gradient.

    Parameters become views of the buffers, so build this when the modules are on their device and in their type.
    Collective: all ranks construct it, and call `finish`, at the same point.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        groups: ParallelGroups,
        *,
        shard: bool,
        overlap: bool,
        bucket_size: int,
        accumulate: Callable[[Tensor, Tensor, bool], None] = accumulate_,
    ) -> None:
        """`accumulate` is the form of `kernels.reference.accumulate_` to use."""
        self.groups, self._accumulate = groups, accumulate
        self.shard = shard and groups.dp.size > 1
        self._overlap = overlap and groups.dp.size > 1
        self.buckets = build_buckets(chunks, groups, shard=self.shard, bucket_size=bucket_size)
        self._check_layouts()
        self._replica_sums = ReplicaSums(self.buckets, groups.tp, groups.device)
        self._waiting: list[set[int]] = []
        self._absent: list[set[int]] = []  # slots that have no gradient of this step yet: their buffers hold old values
        self._armed: set[int] = set()
        self._pending: list[Pending] = []
        self._finished = False
        for bucket in self.buckets:
            for number, slot in enumerate(bucket.slots):
                slot.parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), bucket.index, number))
        self.zero_grad()

    def _check_layouts(self) -> None:
        """Collective: the ranks that will add their buffers to each other must have laid them out alike."""
        layout = [[(get_placement(slot.parameter).logical_name, slot.start, slot.end) for slot in b.slots] for b in self.buckets]
        require_agreement(repr(layout), self.groups.dp, self.groups.device, "the layout of their gradient buffers")
        for group in (self.groups.embedding, self.groups.pp):
            tied = [names for names, bucket in zip(layout, self.buckets, strict=True) if bucket.tied is group]
            require_agreement(repr(tied), group, self.groups.device, "the weights they tie")

    def zero_grad(self) -> None:
        """Forget the gradients and be ready for the next step's micro-batches."""
        if self._pending:
            raise RuntimeError("zero_grad while gradients are being reduced: call finish first")
        self._finished = False
        self._armed.clear()
        self._waiting = [set(range(len(bucket.slots))) for bucket in self.buckets]
        self._absent = [set(waiting) for waiting in self._waiting]
        for parameter in self.parameters():
            parameter.grad = None

    def start_reduction(self, chunk: int, awaited: Collection[nn.Parameter] | None = None) -> None:
        """Declare that the chunk's last gradients come now: a bucket is reduced as soon as its gradients are there.

        `awaited` names the parameters that still get one, where the others have theirs already (split backwards).
        """
        self._armed.add(chunk)
        if awaited is None or not self._overlap:
            return
        still = {id(parameter) for parameter in awaited}
        for bucket in self.buckets:
            if bucket.chunk == chunk:
                self._waiting[bucket.index] = {number for number, slot in enumerate(bucket.slots) if id(slot.parameter) in still}
        self._launch_complete()

    def finish(self) -> None:
        """Reduce what is not reduced yet and wait: the owned gradients are now complete sums. Idempotent."""
        if self._finished:
            return
        while len(self._pending) < len(self.buckets):
            self._launch_next()
        for pending in self._pending:
            pending.wait()
        self._pending.clear()
        self._replica_sums.run()
        for bucket in self.buckets:
            if bucket.tied is not None:
                all_reduce(bucket.owned_grads, bucket.tied)
        self._finished = True

    def _launch_next(self) -> None:
        bucket, dp = self.buckets[len(self._pending)], self.groups.dp
        for number in self._absent[bucket.index]:
            main_grad(bucket.slots[number].parameter).zero_()
        if self.shard and scatters_natively(dp):
            self._pending.append(reduce_scatter_into(bucket.owned_grads, bucket.grads, dp, async_op=True))
        else:
            self._pending.append(all_reduce(bucket.grads, dp, async_op=True))

    def _gradient_arrived(self, bucket: Bucket, number: int) -> None:
        """Take a parameter's new gradient into the buffer, and launch the buckets that are complete now."""
        parameter = bucket.slots[number].parameter
        if parameter.grad is None:
            return  # torch calls the hook for an undefined gradient too: that of a split backward, which comes later
        if self._finished or bucket.index < len(self._pending):
            raise RuntimeError(
                f"{_name(parameter)} got a gradient after its reduction began: start_reduction came too early, or zero_grad is missing"
            )
        absent = self._absent[bucket.index]
        self._accumulate(main_grad(parameter), parameter.grad, number in absent)
        absent.discard(number)
        parameter.grad = None
        if not self._overlap or bucket.chunk not in self._armed:
            return
        self._waiting[bucket.index].discard(number)
        self._launch_complete()

    def _launch_complete(self) -> None:
        while len(self._pending) < len(self.buckets) and not self._waiting[len(self._pending)]:
            self._launch_next()

    def gather_parameters(self, bucket: Bucket) -> Pending:
        """Start collecting a sharded bucket's parameters from their owners into every rank's buffer."""
        if not self.shard:
            return Pending(bucket.params)
        return all_gather_into(bucket.params, bucket.owned_params, self.groups.dp, async_op=True)

    def gather_gradients(self) -> None:
        """After `finish`: make every `main_grad` complete on every rank, also where sharded. For checks and tests."""
        if not self._finished:
            raise RuntimeError("gather_gradients before finish: gradients are not reduced yet")
        for bucket in self.buckets if self.shard else ():
            all_gather_into(bucket.grads, bucket.owned_grads, self.groups.dp).wait()

    def parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter of this rank once, in bucket order."""
        return [slot.parameter for bucket in self.buckets for slot in bucket.slots]

    def first_nonfinite(self) -> nn.Parameter | None:
        """The first parameter, in the backward's order, whose owned gradient holds an infinity or NaN."""
        for bucket, segment in all_segments(self.buckets):
            gradient = bucket.grads[segment.offset : segment.offset + segment.end - segment.start]
            if not bool(torch.isfinite(gradient).all()):
                return segment.parameter
        return None


def _hook(owner: "weakref.ref[GradSync]", index: int, number: int) -> Callable[[Tensor], None]:
    """The hook of one parameter. It holds its GradSync weakly: parameters must not keep the buffers of a dropped one alive."""

    def on_gradient(parameter: Tensor) -> None:
        sync = owner()
        if sync is not None:
            sync._gradient_arrived(sync.buckets[index], number)

    return on_gradient


def _name(parameter: nn.Parameter) -> str:
    return get_placement(parameter).logical_name
