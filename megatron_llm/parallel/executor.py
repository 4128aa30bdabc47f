"""Runs a pipeline plan: one short interpreter for every schedule.

Between its forward and its backward a (chunk, micro-batch) holds only what autograd saved and its input. The output is
let go as soon as it is sent: the backward starts from a `GradientEdge`, which names the place in the graph and not the
tensor, so its memory returns when the send is over (other engines shrink the tensor's storage behind autograd's back).

Where the plan splits backwards, BACKWARD computes the input's gradient and leaves the weights' to a `DeferredGradients`
of the chunk, and WEIGHT computes those.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_llm.parallel.deferred import DeferredGradients
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.p2p import Mailbox, Receipt, matches_tags
from megatron_llm.parallel.schedules import (
    Action,
    ActionKind,
    Place,
    forward_part,
    is_split,
    make_schedule,
    place_after,
    place_before,
    post_early,
)
from megatron_llm.parallel.simulator import Span

Key = tuple[int, int]  # chunk, micro-batch
Box = list[Tensor]  # what is to come, at most one
BeforeLast = Callable[[int, Collection[nn.Parameter] | None], None]


class Outlet(torch.autograd.Function):
    """A scalar to call backward on in place of the output of a stage, whose gradient is put into `box` before that.

    The gradient could be given to `torch.autograd.backward` itself. That imports sympy, at the first call, to compare two
    shapes: half a second of every process at the start of a run.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, box: Box) -> Tensor:
        """A scalar; nothing of the output is kept."""
        ctx.box = box
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        """The gradient in the box, untouched."""
        return ctx.box.pop(), None


class Stage(Protocol):
    """One model chunk."""

    def __call__(self, batch: Any, hidden: Tensor | None) -> Tensor:
        """The next hidden state, or on the last virtual stage a scalar to call backward on; `hidden` is None on the first."""
        ...


class PipelineExecutor:
    """Runs the model chunks of one pipeline rank over micro-batches, by any schedule. With one stage nothing is sent."""

    def __init__(
        self,
        stages: Sequence[Stage],
        groups: ParallelGroups,
        schedule: str,
        hidden_dtype: torch.dtype,
        on_action: Callable[[Action], None] | None = None,
        *,
        deferred: Sequence[DeferredGradients] = (),
        on_span: Callable[[Span], None] | None = None,
    ) -> None:
        """`stages[chunk]` is virtual stage chunk * pp + rank, `deferred[chunk]` where its layers leave weight gradients.

        `on_action` is told each action before it starts. `on_span` is told each computation when it is done, from the
        moment its input was there (`time.perf_counter`, which on a GPU sees launches only), and as a receive the time
        it waited for that. Without `deferred`, or where it is not asked for, a split backward computes all in its first part.
        """
        self.stages = stages
        self.groups = groups
        self.schedule = schedule
        self.hidden_dtype = hidden_dtype
        self.on_action, self.on_span = on_action, on_span
        self.deferred = tuple(deferred) or tuple(DeferredGradients() for _ in stages)
        self.plan = functools.lru_cache(maxsize=4)(self._plan)  # training and evaluation, with one number of micro-batches each

    def _plan(self, micro_batches: int, forward_only: bool) -> tuple[Action, ...]:
        """This rank's actions."""
        actions = make_schedule(self.schedule, self.groups.pp.size, micro_batches, len(self.stages))[self.groups.pp.rank]
        actions = forward_part(actions) if forward_only else actions
        return post_early(actions) if matches_tags(self.groups.pp) else actions

    def run(
        self,
        batches: Sequence[Any],
        hidden_shape: tuple[int, int, int],
        *,
        forward_only: bool = False,
        before_last_backward: BeforeLast | None = None,
    ) -> list[Tensor]:
        """Run all micro-batches forward and, unless `forward_only`, backward; gradients are added to `.grad`.

        `hidden_shape` is the shape of what passes between stages on this rank, [S, B, H] ([S/tp, B, H] under sequence
        parallelism). `before_last_backward(chunk, parameters)` is called before the chunk's last gradients are computed,
        with the parameters that still get one: None, which is all, before the last backward; where backwards are split,
        before the last weight gradients, with those. Returns the last virtual stage's outputs, detached and in order of
        micro-batch; an empty list on the other ranks.
        """
        plan = self.plan(len(batches), forward_only)
        run = Run(self, batches, hidden_shape, before_last_backward, split=is_split(plan))
        with torch.set_grad_enabled(not forward_only):
            for action in plan:
                if self.on_action is not None:
                    self.on_action(action)
                run.perform[action.kind](action)
            run.mailbox.finish()
        return run.outputs


class Run:
    """State of one `PipelineExecutor.run`: what has arrived, what is to be sent, and what waits for its backward."""

    def __init__(
        self,
        executor: PipelineExecutor,
        batches: Sequence[Any],
        hidden_shape: tuple[int, int, int],
        before_last_backward: BeforeLast | None,
        *,
        split: bool,
    ) -> None:
        pp = executor.groups.pp
        self.stages, self.hidden_dtype, self.hidden_shape = executor.stages, executor.hidden_dtype, hidden_shape
        self.batches, self.before_last_backward, self.split = batches, before_last_backward, split
        self.deferred, self.on_span = executor.deferred, executor.on_span
        for deferred in self.deferred:
            deferred.clear()
            deferred.enabled = split
        self.size, self.rank, self.depth = pp.size, pp.rank, pp.size * len(executor.stages)
        self.mailbox = Mailbox(pp, executor.groups.device)
        self.inputs: dict[Key, Tensor | Receipt] = {}
        self.gradients: dict[Key, Tensor | Receipt] = {}
        self.to_send: dict[ActionKind, dict[Key, Tensor]] = {ActionKind.SEND_FORWARD: {}, ActionKind.SEND_BACKWARD: {}}
        self.live: dict[Key, tuple[Tensor | None, GradientEdge | None, Box]] = {}
        self.outputs: list[Tensor] = []
        self.perform: dict[ActionKind, Callable[[Action], None]] = {
            ActionKind.FORWARD: self.forward,
            ActionKind.BACKWARD: self.backward,
            ActionKind.WEIGHT: self.weight,
            ActionKind.SEND_FORWARD: self.send,
            ActionKind.SEND_BACKWARD: self.send,
            ActionKind.RECV_FORWARD: self.receive,
            ActionKind.RECV_BACKWARD: self.receive,
        }

    def forward(self, action: Action) -> None:
        """Run one chunk on one micro-batch."""
        key = (action.chunk, action.micro)
        received = self.taken(self.inputs, ActionKind.RECV_FORWARD, key)
        hidden = None if received is None else received.requires_grad_(torch.is_grad_enabled())
        with self.timed(action):
            output = self.stages[action.chunk](self.batches[action.micro], hidden)
        after = place_after(Place(self.rank, action.chunk), self.size, len(self.stages))
        if torch.is_grad_enabled():
            box: Box = []
            scalar = output if after is None else Outlet.apply(output, box)
            self.live[key] = hidden, get_gradient_edge(scalar) if output.requires_grad else None, box
        if after is None:
            self.outputs.append(output.detach())
            return
        if output.shape != self.hidden_shape or output.dtype != self.hidden_dtype:
            raise ValueError(
                f"chunk {action.chunk} of stage {self.rank} returned {output.dtype} {tuple(output.shape)}, "
                f"the next stage expects {self.hidden_dtype} {tuple(self.hidden_shape)}"
            )
        if after.rank == self.rank:
            self.inputs[after.chunk, action.micro] = output.detach()
        else:
            self.to_send[ActionKind.SEND_FORWARD][key] = output.detach()

    def backward(self, action: Action) -> None:
        """Run one chunk's backward on one micro-batch; its saved activations are free afterwards, but for what WEIGHT needs."""
        key = (action.chunk, action.micro)
        gradient = self.taken(self.gradients, ActionKind.RECV_BACKWARD, key)  # None on the last: a scalar
        if not self.split:
            self.announce(action, None)
        hidden, scalar, box = self.live.pop(key)
        deferred = self.deferred[action.chunk]
        with self.timed(action), deferred.collect(action.micro) if self.split else nullcontext():
            if scalar is not None:  # None: nothing to train here, as in a first stage with frozen weights
                box += [] if gradient is None else [gradient]
                torch.autograd.backward([scalar])
        before = place_before(Place(self.rank, action.chunk), self.size)
        if before is None:
            return
        if hidden is None or hidden.grad is None:
            raise ValueError(f"chunk {action.chunk} of stage {self.rank} did not use its input: it has no gradient to pass on")
        if before.rank == self.rank:
            self.gradients[before.chunk, action.micro] = hidden.grad
        else:
            self.to_send[ActionKind.SEND_BACKWARD][key] = hidden.grad

    def weight(self, action: Action) -> None:
        """Compute the weight gradients that one chunk's backward of one micro-batch left out."""
        deferred = self.deferred[action.chunk]
        self.announce(action, deferred.parameters(action.micro))
        with self.timed(action):
            deferred.run(action.micro)

    def announce(self, action: Action, parameters: Collection[nn.Parameter] | None) -> None:
        """Tell the caller when the chunk's last gradients come."""
        if self.before_last_backward is not None and action.micro == len(self.batches) - 1:
            self.before_last_backward(action.chunk, parameters)

    def send(self, action: Action) -> None:
        """Start sending what was computed for this key; it is then no longer held here."""
        assert action.peer is not None, "a transfer has a peer"
        tensor = self.to_send[action.kind].pop((action.chunk, action.micro))
        self.mailbox.post_send(tensor, action.peer, action.kind.value, self.tag(action))

    def receive(self, action: Action) -> None:
        """Start receiving; whoever needs the tensor waits for it."""
        assert action.peer is not None, "a transfer has a peer"
        arrived = self.inputs if action.kind is ActionKind.RECV_FORWARD else self.gradients
        receipt = self.mailbox.post_receive(self.hidden_shape, self.hidden_dtype, action.peer, self.tag(action))
        arrived[action.chunk, action.micro] = receipt

    def tag(self, action: Action) -> int:
        """A number that both ends of a transfer compute alike and no other transfer of the run has."""
        virtual = action.chunk * self.size + self.rank
        backward = action.kind in (ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD)
        sends = action.kind in (ActionKind.SEND_FORWARD, ActionKind.SEND_BACKWARD)
        sender = virtual if sends else virtual + (1 if backward else -1)
        return (action.micro * self.depth + sender) * 2 + int(backward)

    def taken(self, source: dict[Key, Tensor | Receipt], kind: ActionKind, key: Key) -> Tensor | None:
        """The tensor of a receive in flight, or what a neighbouring chunk left on this rank; None where nothing comes in."""
        found = source.pop(key, None)
        if not isinstance(found, Receipt):
            return found
        with self.timed(Action(kind, *key)):
            return found.take()

    @contextmanager
    def timed(self, action: Action) -> Iterator[None]:
        """Report how long this took, if anybody wants to know."""
        start = time.perf_counter()
        yield
        if self.on_span is not None:
            self.on_span(Span(action, start, time.perf_counter()))
