"""Plays a pipeline plan without processes: proves that it is in order and cannot hang, and says what it costs.

Three passes. `check_order` reads each rank's list alone: each action once, tensors received before they are used and sent
after they are made. `check_transfers` plays all lists with the strictest transfers there are: a send or receive holds its
whole rank until the peer stands at the matching entry, so both directions between two ranks share one ordered queue. A
plan that passes cannot hang on NCCL or gloo, whose transfers wait for less. `time_plan` plays it as the executor
runs it (transfers overlap with work) and measures, in ticks or, with measured `Costs`, in seconds.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_llm.parallel.schedules import Action, ActionKind, Place, Plan, is_split, place_after, place_before

FORWARD, BACKWARD, WEIGHT = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT
SEND_FORWARD, RECV_FORWARD = ActionKind.SEND_FORWARD, ActionKind.RECV_FORWARD
SEND_BACKWARD, RECV_BACKWARD = ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD

# Kinds that must come earlier in the same rank's list, for the same chunk and micro-batch (where the stage has them).
NEEDS: dict[ActionKind, tuple[ActionKind, ...]] = {
    FORWARD: (RECV_FORWARD,),
    BACKWARD: (FORWARD, RECV_BACKWARD),
    WEIGHT: (BACKWARD,),
    SEND_FORWARD: (FORWARD,),
    SEND_BACKWARD: (BACKWARD,),
    RECV_FORWARD: (),
    RECV_BACKWARD: (),
}
MATCHING = {SEND_FORWARD: RECV_FORWARD, RECV_FORWARD: SEND_FORWARD, SEND_BACKWARD: RECV_BACKWARD, RECV_BACKWARD: SEND_BACKWARD}
BACKWARD_HALF = (BACKWARD, WEIGHT, SEND_BACKWARD, RECV_BACKWARD)


class ScheduleError(ValueError):
    """A plan that is out of order, incomplete or would hang."""


@dataclass(frozen=True)
class Costs:
    """Durations of a virtual stage's forward, of the two parts of its backward, and of one transfer.

    The defaults are ticks: each of the three products of a linear layer takes as long as the others.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0

    def of(self, kind: ActionKind, split: bool) -> float:
        """Duration of a computing action; a backward that is not `split` has both parts."""
        if kind is FORWARD:
            return self.forward
        if kind is WEIGHT:
            return self.backward_weight
        return self.backward_input + (0.0 if split else self.backward_weight)


class Span(NamedTuple):
    """An action on the time axis."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What a plan costs.

    ticks             time from the first to the last action over all ranks
    busy              ticks each rank computes
    peak_activations  most (chunk, micro-batch) activations alive at once on each rank: from their forward to the end of
                      their backward (where it is split, the weights' gradients: of what they need, part lives so long)
    peak_buffers      most tensors received and not yet used at once on each rank
    spans             each rank's computing actions in time
    transfers         each rank's receives in time
    """

    ticks: float
    busy: tuple[float, ...]
    peak_activations: tuple[int, ...]
    peak_buffers: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    transfers: tuple[tuple[Span, ...], ...]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time spent waiting, 0 to 1."""
        return 1.0 - sum(self.busy) / (self.ticks * len(self.busy))


def simulate(plan: Plan, micro_batches: int, chunks: int = 1, costs: Costs | Sequence[Costs] | None = None) -> Simulation:
    """Check a plan and measure it; ScheduleError says which rank does what wrong. Plans without backwards are fine too.

    `costs` are those of every virtual stage, or a list with those of each: measured ones predict a run.
    """
    check_plan(plan, micro_batches, chunks)
    each = [costs or Costs()] * (len(plan) * chunks) if costs is None or isinstance(costs, Costs) else list(costs)
    if len(each) != len(plan) * chunks:
        raise ValueError(f"{len(each)} costs for {len(plan) * chunks} virtual stages")
    ticks, spans, transfers = time_plan(plan, each)
    return Simulation(
        ticks=ticks,
        busy=tuple(sum(span.end - span.start for span in rank_spans) for rank_spans in spans),
        peak_activations=tuple(peak_activations(actions) for actions in plan),
        peak_buffers=tuple(peak_buffers(actions) for actions in plan),
        spans=spans,
        transfers=transfers,
    )


def measured_costs(spans: Sequence[Sequence[Span]], chunks: int = 1) -> list[Costs]:
    """The median durations of each virtual stage in what the ranks of a pipeline recorded (`PipelineExecutor`'s `on_span`).

    Transfers count as free: what ranks record of them is how long they waited, for the other rank's work as well. Where
    backwards were not split they are `backward_input`, and `backward_weight` is 0.
    """
    costs = []
    for chunk, rank in itertools.product(range(chunks), range(len(spans))):
        own = [span for span in spans[rank] if span.action.chunk == chunk]
        found = {kind: [span.end - span.start for span in own if span.action.kind is kind] for kind in (FORWARD, BACKWARD, WEIGHT)}
        costs.append(Costs(*(statistics.median(durations) if durations else 0.0 for durations in found.values())))
    return costs


def check_plan(plan: Plan, micro_batches: int, chunks: int = 1) -> None:
    """ScheduleError unless every rank's list is complete and in order and the lists together cannot hang."""
    forward_only = all(action.kind not in BACKWARD_HALF for actions in plan for action in actions)
    if not forward_only and len({is_split(actions) for actions in plan}) > 1:
        raise ScheduleError("backwards are split on some stages only")
    for rank in range(len(plan)):
        check_order(plan, rank, micro_batches, chunks, forward_only)
    check_transfers(plan)


def kinds_of(place: Place, stages: int, chunks: int, split: bool) -> dict[ActionKind, int | None]:
    """The kinds of action that a virtual stage has, with the peer of each: it exchanges nothing with its own rank."""
    kinds: dict[ActionKind, int | None] = {FORWARD: None, BACKWARD: None}
    if split:
        kinds[WEIGHT] = None
    before, after = place_before(place, stages), place_after(place, stages, chunks)
    if before is not None and before.rank != place.rank:
        kinds |= {RECV_FORWARD: before.rank, SEND_BACKWARD: before.rank}
    if after is not None and after.rank != place.rank:
        kinds |= {SEND_FORWARD: after.rank, RECV_BACKWARD: after.rank}
    return kinds


def check_order(plan: Plan, rank: int, micro_batches: int, chunks: int, forward_only: bool = False) -> None:
    """Every action of one rank exactly once, after what it needs, with the right peer, micro-batches ascending."""
    stages = len(plan)
    exists = [kinds_of(Place(rank, chunk), stages, chunks, is_split(plan[rank])) for chunk in range(chunks)]
    following = [dict.fromkeys(ActionKind, 0) for _ in range(chunks)]  # next micro-batch of each kind, for each chunk
    for action in plan[rank]:
        kind, chunk, micro, peer = action
        if not 0 <= chunk < chunks:
            raise ScheduleError(f"stage {rank}: {action}: there are {chunks} chunks")
        if micro != following[chunk][kind]:
            raise ScheduleError(f"stage {rank}: {action}: expected micro-batch {following[chunk][kind]}, each once and in order")
        if kind not in exists[chunk] or peer != exists[chunk][kind]:
            raise ScheduleError(f"stage {rank}: {action}: this stage has no such transfer with that peer")
        for need in NEEDS[kind]:
            if need in exists[chunk] and following[chunk][need] <= micro:
                raise ScheduleError(f"stage {rank}: {action} comes before '{need.value}', which it needs")
        if stages == 1:
            check_local_neighbour(action, following, chunks)
        following[chunk][kind] += 1
    for chunk in range(chunks):
        for kind in exists[chunk]:
            if following[chunk][kind] != micro_batches and not (forward_only and kind in BACKWARD_HALF):
                raise ScheduleError(f"stage {rank}, chunk {chunk}: {following[chunk][kind]} of {micro_batches} '{kind.value}'")


def check_local_neighbour(action: Action, following: Sequence[dict[ActionKind, int]], chunks: int) -> None:
    """With one rank the neighbouring chunk is on the same rank and nothing is received; its computation must come first."""
    if action.kind is WEIGHT:
        return
    chunk = action.chunk - 1 if action.kind is FORWARD else action.chunk + 1
    if 0 <= chunk < chunks and following[chunk][action.kind] <= action.micro:
        raise ScheduleError(f"stage 0: {action} comes before that of chunk {chunk}, which it needs")


def check_transfers(plan: Plan) -> None:
    """Play all lists with transfers that hold both ranks until they meet; ScheduleError when nobody can go on."""
    queues = [[action for action in actions if action.peer is not None] for actions in plan]
    position = [0] * len(plan)
    todo = list(range(len(plan)))
    while todo:
        rank = todo.pop()
        if position[rank] == len(queues[rank]):
            continue
        mine = queues[rank][position[rank]]
        assert mine.peer is not None, "transfers have a peer"
        if position[mine.peer] < len(queues[mine.peer]) and meet(rank, mine, queues[mine.peer][position[mine.peer]], len(plan)):
            position[rank] += 1
            position[mine.peer] += 1
            todo += [rank, mine.peer]
    stuck = [f"stage {rank} at {queue[position[rank]]}" for rank, queue in enumerate(queues) if position[rank] < len(queue)]
    if stuck:
        raise ScheduleError("deadlock: " + "; ".join(stuck))


def meet(rank: int, mine: Action, theirs: Action, stages: int) -> bool:
    """Whether two transfers at the heads of two ranks' lists are the two ends of one."""
    if theirs.peer != rank or theirs.kind is not MATCHING[mine.kind] or theirs.micro != mine.micro:
        return False
    assert mine.peer is not None, "transfers have a peer"
    step = 1 if mine.kind in (SEND_FORWARD, RECV_BACKWARD) else -1
    return theirs.chunk * stages + mine.peer == mine.chunk * stages + rank + step


@dataclass
class Channel:
    """The one ordered queue between two ranks: the n-th entry of one side meets the n-th of the other."""

    posts: dict[int, list[tuple[float, Action]]] = field(default_factory=lambda: defaultdict(list))
    free_at: float = 0.0

    def post(self, rank: int, moment: float, action: Action, peer: int, transfer: float) -> tuple[int, Action, float] | None:
        """Add one side's entry; when that completes a transfer, its receiver, the receive and the moment it is there."""
        mine, theirs = self.posts[rank], self.posts[peer]
        mine.append((moment, action))
        if len(theirs) < len(mine):
            return None
        posted, other = theirs[len(mine) - 1]
        self.free_at = max(self.free_at, moment, posted) + transfer
        return (rank, action, self.free_at) if action.kind in (RECV_FORWARD, RECV_BACKWARD) else (peer, other, self.free_at)


Spans = tuple[tuple[Span, ...], ...]  # of each rank


def time_plan(plan: Plan, costs: Sequence[Costs]) -> tuple[float, Spans, Spans]:
    """Total time, computations and receives when transfers are posted without waiting and a computation waits for its input."""
    split = any(is_split(actions) for actions in plan)
    channels: dict[frozenset[int], Channel] = defaultdict(Channel)
    arrivals: list[dict[tuple[ActionKind, int, int], float]] = [{} for _ in plan]  # moments that received tensors are there
    posted: list[set[tuple[ActionKind, int, int]]] = [set() for _ in plan]
    clocks, position = [0.0] * len(plan), [0] * len(plan)
    spans: list[list[Span]] = [[] for _ in plan]
    transfers: list[list[Span]] = [[] for _ in plan]
    todo = list(range(len(plan)))
    while todo:
        rank = todo.pop()
        while position[rank] < len(plan[rank]):
            action = plan[rank][position[rank]]
            if action.peer is None:
                needed = (RECV_FORWARD if action.kind is FORWARD else RECV_BACKWARD, action.chunk, action.micro)
                if needed in posted[rank] and needed not in arrivals[rank]:
                    break
                start = max(clocks[rank], arrivals[rank].get(needed, 0.0))
                clocks[rank] = start + costs[action.chunk * len(plan) + rank].of(action.kind, split)
                spans[rank].append(Span(action, start, clocks[rank]))
            else:
                posted[rank].add(action[:3])
                transfer = costs[action.chunk * len(plan) + rank].transfer
                done = channels[frozenset((rank, action.peer))].post(rank, clocks[rank], action, action.peer, transfer)
                if done is not None:
                    side, receive, moment = done
                    arrivals[side][receive[:3]] = moment
                    transfers[side].append(Span(receive, moment - transfer, moment))
                    todo.append(side)
            position[rank] += 1
    return max(clocks), tuple(map(tuple, spans)), tuple(map(tuple, transfers))


def peak_activations(actions: Sequence[Action]) -> int:
    """Most (chunk, micro-batch) pairs that have run forward and not yet backward, weights' gradients included, at once."""
    last = WEIGHT if is_split(actions) else BACKWARD
    live = most = 0
    for action in actions:
        live += (action.kind is FORWARD) - (action.kind is last)
        most = max(most, live)
    return most


def peak_buffers(actions: Sequence[Action]) -> int:
    """Most tensors that are received (or have a receive posted) and not yet consumed at once."""
    waiting: set[tuple[ActionKind, int, int]] = set()
    most = 0
    for kind, chunk, micro, _ in actions:
        if kind in (RECV_FORWARD, RECV_BACKWARD):
            waiting.add((kind, chunk, micro))
            most = max(most, len(waiting))
        elif kind in (FORWARD, BACKWARD):
            waiting.discard((RECV_FORWARD if kind is FORWARD else RECV_BACKWARD, chunk, micro))
    return most
