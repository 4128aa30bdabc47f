"""Runs a pipeline plan: one short interpreter for every schedule.

Between its forward and its backward a (chunk, micro-batch) holds only what autograd saved and its input. The output is
let go as soon as it is sent: the backward starts from a `GradientEdge`, which names the place in the graph and not the
tensor, so its memory returns when the send is over (other engines shrink the tensor's storage behind autograd's back).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.p2p import Mailbox, Receipt
from megatron_llm.parallel.schedules import Action, ActionKind, Place, forward_part, make_schedule, place_after, place_before

Key = tuple[int, int]  # chunk, micro-batch


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
    ) -> None:
        """`stages[chunk]` is virtual stage chunk * pp + rank; `on_action` is told each action before it starts."""
        self.stages = stages
        self.groups = groups
        self.schedule = schedule
        self.hidden_dtype = hidden_dtype
        self.on_action = on_action
        self.plan = functools.lru_cache(maxsize=4)(self._plan)  # training and evaluation, with one number of micro-batches each

    def _plan(self, micro_batches: int, forward_only: bool) -> tuple[Action, ...]:
        """This rank's actions."""
        actions = make_schedule(self.schedule, self.groups.pp.size, micro_batches, len(self.stages))[self.groups.pp.rank]
        return forward_part(actions) if forward_only else actions

    def run(
        self,
        batches: Sequence[Any],
        hidden_shape: tuple[int, int, int],
        *,
        forward_only: bool = False,
        before_last_backward: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Run all micro-batches forward and, unless `forward_only`, backward; gradients are added to `.grad`.

        `hidden_shape` is the shape of what passes between stages on this rank, [S, B, H] ([S/tp, B, H] under sequence
        parallelism). `before_last_backward(chunk)` is called right before the chunk's last backward. Returns the last
        virtual stage's outputs, detached and in order of micro-batch; an empty list on the other ranks.
        """
        run = Run(self, batches, hidden_shape, before_last_backward)
        with torch.set_grad_enabled(not forward_only):
            for action in self.plan(len(batches), forward_only):
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
        before_last_backward: Callable[[int], None] | None,
    ) -> None:
        pp = executor.groups.pp
        self.stages, self.hidden_dtype, self.hidden_shape = executor.stages, executor.hidden_dtype, hidden_shape
        self.batches, self.before_last_backward = batches, before_last_backward
        self.size, self.rank, self.depth = pp.size, pp.rank, pp.size * len(executor.stages)
        self.mailbox = Mailbox(pp, executor.groups.device)
        self.inputs: dict[Key, Tensor | Receipt] = {}
        self.gradients: dict[Key, Tensor | Receipt] = {}
        self.to_send: dict[ActionKind, dict[Key, Tensor]] = {ActionKind.SEND_FORWARD: {}, ActionKind.SEND_BACKWARD: {}}
        self.live: dict[Key, tuple[Tensor | None, GradientEdge | None]] = {}
        self.outputs: list[Tensor] = []
        self.perform: dict[ActionKind, Callable[[Action], None]] = {
            ActionKind.FORWARD: self.forward,
            ActionKind.BACKWARD: self.backward,
            ActionKind.SEND_FORWARD: self.send,
            ActionKind.SEND_BACKWARD: self.send,
            ActionKind.RECV_FORWARD: self.receive,
            ActionKind.RECV_BACKWARD: self.receive,
        }

    def forward(self, action: Action) -> None:
        """Run one chunk on one micro-batch."""
        key = (action.chunk, action.micro)
        hidden = taken(self.inputs.pop(key)).requires_grad_(torch.is_grad_enabled()) if key in self.inputs else None
        output = self.stages[action.chunk](self.batches[action.micro], hidden)
        if torch.is_grad_enabled():
            self.live[key] = hidden, get_gradient_edge(output) if output.requires_grad else None
        after = place_after(Place(self.rank, action.chunk), self.size, len(self.stages))
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
        """Run one chunk's backward on one micro-batch; its saved activations are free afterwards."""
        key = (action.chunk, action.micro)
        if self.before_last_backward is not None and action.micro == len(self.batches) - 1:
            self.before_last_backward(action.chunk)
        hidden, output = self.live.pop(key)
        gradient = taken(self.gradients.pop(key)) if key in self.gradients else None  # None on the last: a scalar
        if output is not None:  # None: nothing to train here, as in a first stage with frozen weights
            torch.autograd.backward([output], None if gradient is None else [gradient])
        before = place_before(Place(self.rank, action.chunk), self.size)
        if before is None:
            return
        if hidden is None or hidden.grad is None:
            raise ValueError(f"chunk {action.chunk} of stage {self.rank} did not use its input: it has no gradient to pass on")
        if before.rank == self.rank:
            self.gradients[before.chunk, action.micro] = hidden.grad
        else:
            self.to_send[ActionKind.SEND_BACKWARD][key] = hidden.grad

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


def taken(source: Tensor | Receipt) -> Tensor:
    """The tensor of a receive in flight, or the tensor that a neighbouring chunk left on this rank."""
    return source.take() if isinstance(source, Receipt) else source
