"""Pipeline schedules as data: which stage runs, sends or receives what, in which order.

A schedule is made in two steps. An *order* says for each pipeline rank in which order it runs the forward and backward
of its model chunks; GPipe, 1F1B, interleaved 1F1B and ZB-H1 differ only in that. `weave` then adds the communication: it plays
all ranks' orders at once, each step of equal length, and writes every transfer into the sender's and the receiver's
list at the same moment. All lists are thus parts of one common sequence of events, so they cannot deadlock even where a
send blocks until its receive is posted and where both directions between two ranks share one queue, as NCCL has it:
the earliest event not yet done can always be done next. `simulator.py` checks this for every plan it is given.

With `chunks` model chunks a rank, virtual stage s = chunk * stages + rank, so the chunks of one rank are spread over the
depth of the model (Narayanan et al. 2021, arXiv:2104.04473). GPipe is Huang et al. 2019, arXiv:1811.06965; 1F1B without
flushes between micro-batches of a step is the PipeDream-Flush of arXiv:2006.09503. The zero-bubble schedules of Qi et al.
2023, arXiv:2401.10241, split a backward into the input's gradient, which the stage before waits for, and the weights'
gradients, which fill the time a stage would wait. In a plan that has WEIGHT actions, BACKWARD is the first part alone.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from megatron_llm.utils.errors import UserError


class ActionKind(StrEnum):
    """What a pipeline rank does. BACKWARD is a whole backward, or where the plan has WEIGHT the input's gradient alone."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"
    SEND_FORWARD = "send F"
    RECV_FORWARD = "recv F"
    SEND_BACKWARD = "send B"
    RECV_BACKWARD = "recv B"


class Action(NamedTuple):
    """One entry of a rank's list. `chunk` is the rank's own model chunk, `peer` the other pipeline rank of a transfer (None: computes)."""

    kind: ActionKind
    chunk: int
    micro: int
    peer: int | None = None

    def __str__(self) -> str:
        where = f"{self.kind.value} of micro-batch {self.micro}, chunk {self.chunk}"
        return where if self.peer is None else f"{where} ({'to' if self.kind.value.startswith('send') else 'from'} stage {self.peer})"


class Place(NamedTuple):
    """Where a virtual stage lives: pipeline rank and chunk on that rank."""

    rank: int
    chunk: int


Plan = tuple[tuple[Action, ...], ...]
Step = tuple[ActionKind, int, int]  # kind, chunk, micro
FORWARD, BACKWARD, WEIGHT = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT


def place_before(place: Place, stages: int) -> Place | None:
    """The place of the previous virtual stage; None for the first."""
    virtual = place.chunk * stages + place.rank
    return Place((virtual - 1) % stages, (virtual - 1) // stages) if virtual > 0 else None


def place_after(place: Place, stages: int, chunks: int) -> Place | None:
    """The place of the next virtual stage; None for the last."""
    virtual = place.chunk * stages + place.rank
    return Place((virtual + 1) % stages, (virtual + 1) // stages) if virtual < stages * chunks - 1 else None


def gpipe_order(rank: int, stages: int, micro_batches: int, chunks: int) -> list[Step]:
    """All forwards, then all backwards: simplest, and keeps every micro-batch's activations."""
    forwards = [(FORWARD, 0, micro) for micro in range(micro_batches)]
    return forwards + [(BACKWARD, 0, micro) for micro in range(micro_batches)]


def one_f_one_b_order(rank: int, stages: int, micro_batches: int, chunks: int) -> list[Step]:
    """Warm up by one forward for each later stage, then alternate: at most `stages - rank` activations live."""
    forwards = [(FORWARD, 0, micro) for micro in range(micro_batches)]
    backwards = [(BACKWARD, 0, micro) for micro in range(micro_batches)]
    return alternate(forwards, backwards, warmup=stages - rank - 1)


def interleaved_order(rank: int, stages: int, micro_batches: int, chunks: int) -> list[Step]:
    """1F1B over virtual stages: groups of `stages` micro-batches visit chunk after chunk, which shortens the bubble.

    When `stages` does not divide the number of micro-batches the order is made for the next multiple and the steps of
    micro-batches that do not exist are left out. What remains keeps its order, so it is as free of deadlock.
    """
    if chunks == 1:
        return one_f_one_b_order(rank, stages, micro_batches, 1)
    forwards, backwards = [], []
    for first in range(0, micro_batches, stages):
        group = range(first, first + stages)  # may run past the last micro-batch
        forwards += [(FORWARD, chunk, micro) for chunk in range(chunks) for micro in group]
        backwards += [(BACKWARD, chunk, micro) for chunk in reversed(range(chunks)) for micro in group]
    steps = alternate(forwards, backwards, warmup=2 * (stages - rank - 1) + (chunks - 1) * stages)
    return [step for step in steps if step[2] < micro_batches]


def zero_bubble_order(rank: int, stages: int, micro_batches: int, chunks: int) -> list[Step]:
    """ZB-H1: 1F1B with split backwards, in which stage `rank` computes weight gradients `rank` micro-batches late.

    Later stages can then pass on their inputs' gradients earlier, and all have weight gradients left for the time in
    which the pipe drains. The first stage defers none and warms up longest, the last the other way round, so no stage
    holds more than `stages` micro-batches: as many as 1F1B's first. Alone, a stage never waits and nothing is split.
    """
    steps = one_f_one_b_order(rank, stages, micro_batches, chunks)
    if stages == 1:
        return steps
    split: list[Step] = []
    for step in steps:
        split.append(step)
        if step[0] is BACKWARD and step[2] >= rank:
            split.append((WEIGHT, 0, step[2] - rank))
    return split + [(WEIGHT, 0, micro) for micro in range(max(0, micro_batches - rank), micro_batches)]


def alternate(forwards: list[Step], backwards: list[Step], warmup: int) -> list[Step]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steps = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        steps += [forward, backward]
    return steps + backwards[len(forwards) - warmup :]


ORDERS: dict[str, Callable[[int, int, int, int], list[Step]]] = {
    "gpipe": gpipe_order,
    "1f1b": one_f_one_b_order,
    "interleaved": interleaved_order,
    "zero-bubble": zero_bubble_order,
}


def make_schedule(name: str, stages: int, micro_batches: int, chunks: int = 1) -> Plan:
    """The action list of every pipeline rank; `name` is one of `ORDERS` or auto. Raises UserError on a bad request.

    auto is interleaved where there are several chunks, otherwise 1f1b. Only interleaved takes more than one chunk a rank;
    with one it is 1f1b. Any number of micro-batches works, fewer than stages too. Within a chunk both forwards and
    backwards go in ascending order of micro-batch, so gradients are added up in the same order under every schedule.
    """
    if name == "auto":
        name = "interleaved" if chunks > 1 else "1f1b"
    if name not in ORDERS:
        raise UserError(f"pipeline schedule {name!r} is not known: choose one of auto, {', '.join(ORDERS)}")
    if min(stages, micro_batches, chunks) < 1:
        raise UserError(f"a pipeline needs at least 1 stage, micro-batch and chunk, got {stages}, {micro_batches} and {chunks}")
    if chunks > 1 and name != "interleaved":
        raise UserError(f"schedule {name} runs one model chunk a rank, got {chunks}: use interleaved, or no virtual stages")
    orders = [ORDERS[name](rank, stages, micro_batches, chunks) for rank in range(stages)]
    return weave(orders, chunks)


def weave(orders: Sequence[Sequence[Step]], chunks: int) -> Plan:
    """Add sends and receives to every rank's compute order, in which each chunk's micro-batches ascend.

    ValueError when the orders wait for each other forever.
    """
    stages = len(orders)
    last = stages * chunks - 1
    plan: list[list[Action]] = [[] for _ in orders]
    position = [0] * stages
    forwards, backwards = [0] * (last + 1), [0] * (last + 1)  # how many each virtual stage has done
    left = sum(len(order) for order in orders)
    while left:
        fired = []
        for rank, order in enumerate(orders):
            if position[rank] == len(order):
                continue
            kind, chunk, micro = order[position[rank]]
            virtual = chunk * stages + rank
            if kind is WEIGHT:
                ready = backwards[virtual] > micro
            elif kind is FORWARD:
                ready = virtual == 0 or forwards[virtual - 1] > micro
            else:
                ready = backwards[virtual + 1] > micro if virtual < last else forwards[virtual] > micro
            if ready:
                fired.append((kind, rank, chunk, micro))
        if not fired:
            stuck = [rank for rank in range(stages) if position[rank] < len(orders[rank])]
            waiting = "; ".join(f"stage {rank}: {Action(*orders[rank][position[rank]])}" for rank in stuck)
            raise ValueError(f"the compute orders wait for each other: {waiting}")
        for kind, rank, chunk, micro in fired:
            position[rank] += 1
            plan[rank].append(Action(kind, chunk, micro))
            if kind is not WEIGHT:
                (forwards if kind is FORWARD else backwards)[chunk * stages + rank] += 1
        for kind, rank, chunk, micro in fired:
            if kind is not WEIGHT:
                add_transfer(plan, kind, rank, chunk, micro, last)
        left -= len(fired)
    return tuple(tuple(actions) for actions in plan)


def add_transfer(plan: list[list[Action]], kind: ActionKind, rank: int, chunk: int, micro: int, last: int) -> None:
    """Append the send of what a stage has just computed and the matching receive, unless the next chunk is on the same rank."""
    stages = len(plan)
    if kind is FORWARD:
        target, send, receive = chunk * stages + rank + 1, ActionKind.SEND_FORWARD, ActionKind.RECV_FORWARD
    else:
        target, send, receive = chunk * stages + rank - 1, ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD
    target_chunk, target_rank = divmod(target, stages)
    if 0 <= target <= last and target_rank != rank:
        plan[rank].append(Action(send, chunk, micro, target_rank))
        plan[target_rank].append(Action(receive, target_chunk, micro, rank))


def is_split(actions: Sequence[Action]) -> bool:
    """Whether backwards are split: the weights' gradients have actions of their own."""
    return any(action.kind is WEIGHT for action in actions)


def forward_part(actions: Sequence[Action]) -> tuple[Action, ...]:
    """One rank's list without its backward half, for evaluation. What is left keeps its order on all ranks alike."""
    backward = (BACKWARD, WEIGHT, ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD)
    return tuple(action for action in actions if action.kind not in backward)


def post_early(actions: Sequence[Action]) -> tuple[Action, ...]:
    """One rank's list with every receive posted a computation earlier, so that the transfer runs beside it.

    Only for transfers that are matched by tag: the lists are then no longer parts of one sequence of events.
    """
    receives = (ActionKind.RECV_FORWARD, ActionKind.RECV_BACKWARD)
    early: list[Action] = []
    last = 0  # where the latest computation stands
    for action in actions:
        if action.kind in receives:
            early.insert(last, action)
            last += 1
        else:
            last = len(early) if action.peer is None else last
            early.append(action)
    return tuple(early)
