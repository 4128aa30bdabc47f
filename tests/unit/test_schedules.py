"""Every pipeline plan up to 8 stages, 32 micro-batches and 4 chunks, proved by simulation; and broken plans are caught."""

import re
from collections.abc import Callable

import pytest

from megatron_llm.parallel.schedules import ORDERS, Action, ActionKind, Plan, forward_part, make_schedule, post_early, weave
from megatron_llm.parallel.simulator import Costs, ScheduleError, check_plan, peak_activations, peak_buffers, simulate
from megatron_llm.utils.errors import UserError

F, B, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT
SF, RF = ActionKind.SEND_FORWARD, ActionKind.RECV_FORWARD
SB, RB = ActionKind.SEND_BACKWARD, ActionKind.RECV_BACKWARD
EVERY_STAGES, EVERY_MICROS = range(1, 9), range(1, 33)


def known_peak(name: str, stages: int, micro_batches: int, chunks: int, rank: int) -> int:
    """The published bounds on live activations: all for GPipe, the warm-up and one more for the other two."""
    if name == "gpipe":
        return micro_batches
    if chunks == 1:
        return min(micro_batches, stages - rank)
    return min(micro_batches * chunks, 2 * (stages - rank - 1) + (chunks - 1) * stages + 1)


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4)])
def test_every_plan_is_in_order_and_cannot_hang(name: str, chunks: int) -> None:
    for stages in EVERY_STAGES:
        for micro_batches in EVERY_MICROS:
            plan = make_schedule(name, stages, micro_batches, chunks)
            check_plan(plan, micro_batches, chunks)  # raises when the plan is wrong

            computed = 2 * stages * chunks * micro_batches
            transfers = 4 * (stages * chunks - 1) * micro_batches if stages > 1 else 0  # forward and backward, two ends each
            assert sum(len(actions) for actions in plan) == computed + transfers
            for rank, actions in enumerate(plan):
                bound = known_peak(name, stages, micro_batches, chunks, rank)
                if chunks == 1 or micro_batches % stages == 0:
                    assert peak_activations(actions) == bound, (stages, micro_batches, rank)
                else:
                    assert peak_activations(actions) <= bound, (stages, micro_batches, rank)


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_the_bubble_is_the_published_one(name: str, chunks: int) -> None:
    for stages in EVERY_STAGES:
        for micro_batches in (1, 2, 3, 5, 7, stages, stages + 1, 2 * stages, 3 * stages - 1, 4 * stages):
            result = simulate(make_schedule(name, stages, micro_batches, chunks), micro_batches, chunks)
            # Every rank works 3 ticks a micro-batch and chunk; filling and draining the pipe costs one chunk a stage.
            ideal = 3 * (micro_batches * chunks + stages - 1)
            assert result.busy == (3 * micro_batches * chunks,) * stages
            if chunks == 1 or micro_batches % stages == 0:
                assert result.ticks == ideal, (stages, micro_batches)
                assert result.bubble == pytest.approx((stages - 1) / (micro_batches * chunks + stages - 1))
            else:
                plain = 3 * chunks * (micro_batches + stages - 1)
                assert ideal < result.ticks <= plain, "with micro-batches left over it is still no slower than 1F1B"


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_the_forward_part_alone_is_a_plan_too(name: str) -> None:
    chunks = 3 if name == "interleaved" else 1
    for stages in (1, 2, 3, 8):
        for micro_batches in (1, 2, 5, 8, 11):
            plan = tuple(forward_part(actions) for actions in make_schedule(name, stages, micro_batches, chunks))
            result = simulate(plan, micro_batches, chunks)
            assert result.busy == (micro_batches * chunks,) * stages


def test_every_zero_bubble_plan_is_in_order_and_holds_no_more_than_1f1b() -> None:
    for stages in EVERY_STAGES:
        for micro_batches in EVERY_MICROS:
            plan = make_schedule("zero-bubble", stages, micro_batches)
            check_plan(plan, micro_batches)
            kinds = [[action.kind for action in actions] for actions in plan]
            assert all(kind.count(W) == (micro_batches if stages > 1 else 0) for kind in kinds)
            peaks = [peak_activations(actions) for actions in plan]
            assert peaks == [min(stages, micro_batches) if stages > 1 else 1] * stages
            assert max(peaks) == max(peak_activations(actions) for actions in make_schedule("1f1b", stages, micro_batches))


@pytest.mark.parametrize("costs", [Costs(), Costs(10, 12, 8), Costs(10, 14, 6), Costs(3, 5, 0)], ids=str)
def test_the_bubble_of_zb_h1_is_the_papers(costs: Costs) -> None:
    forward, inputs, weights = costs.forward, costs.backward_input, costs.backward_weight
    for stages in range(2, 9):
        for micro_batches in range(1, 17):
            busy = micro_batches * (forward + inputs + weights)
            plain = simulate(make_schedule("1f1b", stages, micro_batches), micro_batches, costs=costs)
            split = simulate(make_schedule("zero-bubble", stages, micro_batches), micro_batches, costs=costs)
            assert plain.busy == split.busy == (busy,) * stages
            assert plain.ticks - busy == (stages - 1) * (forward + inputs + weights)
            # With fewer micro-batches than stages there are too few weight gradients to fill the wait of the last stages.
            missing = max(0, stages - micro_batches) * weights
            assert split.ticks - busy == (stages - 1) * (forward + inputs - weights) + missing, (stages, micro_batches)


def test_measured_costs_are_those_of_each_virtual_stage() -> None:
    plan = make_schedule("interleaved", 2, 4, 2)
    costs = [Costs(1, 1, 1), Costs(1, 1, 1), Costs(1, 1, 1), Costs(2, 3, 4)]
    assert simulate(plan, 4, 2, costs).busy == (24, 12 + 36)
    with pytest.raises(ValueError, match="2 costs for 4 virtual stages"):
        simulate(plan, 4, 2, costs[:2])


def test_receives_may_be_posted_a_computation_earlier() -> None:
    for name, chunks in (("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)):
        plan = make_schedule(name, 4, 8, chunks)
        early = tuple(post_early(actions) for actions in plan)
        for before, after in zip(plan, early, strict=True):
            assert sorted(before) == sorted(after)
            assert [a for a in before if a.peer is None] == [a for a in after if a.peer is None]
            assert peak_buffers(before) <= peak_buffers(after) <= peak_buffers(before) + 1
            for place, action in enumerate(after):
                if action.kind in (RF, RB) and place > 0:
                    computed = [a for a in before[: before.index(action)] if a.peer is None]
                    assert [a for a in after[:place] if a.peer is None] == computed[:-1]
    assert [str(a) for a in early[1][:2]] == [
        "recv F of micro-batch 0, chunk 0 (from stage 0)",
        "recv F of micro-batch 1, chunk 0 (from stage 0)",
    ]


def test_a_small_1f1b_plan_reads_as_drawn_in_the_paper() -> None:
    first, second = make_schedule("1f1b", 2, 3)
    assert [(a.kind, a.micro) for a in first if a.peer is None] == [(F, 0), (F, 1), (B, 0), (F, 2), (B, 1), (B, 2)]
    assert [(a.kind, a.micro) for a in second if a.peer is None] == [(F, 0), (B, 0), (F, 1), (B, 1), (F, 2), (B, 2)]
    assert first[:2] == (Action(F, 0, 0), Action(SF, 0, 0, 1))
    first, second = make_schedule("zero-bubble", 2, 3)
    assert [(a.kind, a.micro) for a in first if a.peer is None] == [(F, 0), (F, 1), (B, 0), (W, 0), (F, 2), (B, 1), (W, 1), (B, 2), (W, 2)]
    assert [(a.kind, a.micro) for a in second if a.peer is None] == [(F, 0), (B, 0), (F, 1), (B, 1), (W, 0), (F, 2), (B, 2), (W, 1), (W, 2)]
    assert str(first[1]) == "send F of micro-batch 0, chunk 0 (to stage 1)"


def test_transfers_that_take_time_make_the_plan_longer() -> None:
    plan = make_schedule("1f1b", 4, 8)
    quick, slow = simulate(plan, 8), simulate(plan, 8, costs=Costs(transfer=1.0))
    assert slow.ticks > quick.ticks
    assert slow.busy == quick.busy


def test_interleaving_one_chunk_is_1f1b_and_auto_chooses() -> None:
    assert make_schedule("interleaved", 4, 6) == make_schedule("1f1b", 4, 6) == make_schedule("auto", 4, 6)
    assert make_schedule("auto", 4, 6, 2) == make_schedule("interleaved", 4, 6, 2)


def first_index(plan: Plan, rank: int, kind: ActionKind) -> int:
    return next(i for i, action in enumerate(plan[rank]) if action.kind is kind)


def with_rank(plan: Plan, rank: int, actions: list[Action]) -> Plan:
    return tuple(tuple(actions) if r == rank else plan[r] for r in range(len(plan)))


def without(plan: Plan, rank: int, kind: ActionKind) -> Plan:
    actions = list(plan[rank])
    del actions[first_index(plan, rank, kind)]
    return with_rank(plan, rank, actions)


def twice(plan: Plan, rank: int, kind: ActionKind) -> Plan:
    actions = list(plan[rank])
    index = first_index(plan, rank, kind)
    return with_rank(plan, rank, [*actions[: index + 1], *actions[index:]])


def moved_first(plan: Plan, rank: int, kind: ActionKind) -> Plan:
    actions = list(plan[rank])
    action = actions.pop(first_index(plan, rank, kind))
    return with_rank(plan, rank, [action, *actions])


def changed(plan: Plan, rank: int, kind: ActionKind, change: Callable[[Action], Action]) -> Plan:
    actions = list(plan[rank])
    index = first_index(plan, rank, kind)
    actions[index] = change(actions[index])
    return with_rank(plan, rank, actions)


def exchanged(plan: Plan, rank: int, first: ActionKind, second: ActionKind) -> Plan:
    """The first place where `first` stands right before `second`, the other way round."""
    actions = list(plan[rank])
    index = next(i for i in range(len(actions) - 1) if actions[i].kind is first and actions[i + 1].kind is second)
    actions[index], actions[index + 1] = actions[index + 1], actions[index]
    return with_rank(plan, rank, actions)


BROKEN: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "missing-forward": (lambda p: without(p, 0, F), "stage 0: send F of micro-batch 0.* comes before 'F'"),
    "missing-receive": (lambda p: without(p, 1, RF), "stage 1: F of micro-batch 0, chunk 0 comes before 'recv F'"),
    "missing-send": (lambda p: without(p, 0, SF), "stage 0: send F of micro-batch 1.*expected micro-batch 0"),
    "missing-last-send": (lambda p: with_rank(p, 2, list(p[2][:-1])), "stage 2, chunk 0: 3 of 4 'send B'"),
    "forward-twice": (lambda p: twice(p, 1, F), "stage 1: F of micro-batch 0.*expected micro-batch 1"),
    "send-twice": (lambda p: twice(p, 1, SB), "stage 1: send B of micro-batch 0.*expected micro-batch 1"),
    "backward-before-forward": (lambda p: moved_first(p, 3, B), "stage 3: B of micro-batch 0, chunk 0 comes before 'F'"),
    "send-before-forward": (lambda p: moved_first(p, 0, SF), "stage 0: send F of micro-batch 0.* comes before 'F'"),
    "wrong-peer": (lambda p: changed(p, 0, SF, lambda a: a._replace(peer=2)), "stage 0: send F .*no such transfer with that peer"),
    "wrong-chunk": (lambda p: changed(p, 0, F, lambda a: a._replace(chunk=1)), "there are 1 chunks"),
    "send-from-the-last-stage": (lambda p: with_rank(p, 3, [*p[3], Action(SF, 0, 0, 0)]), "stage 3: send F.*no such transfer"),
    "swapped-send-and-receive": (lambda p: exchanged(p, 0, SF, RB), "deadlock: .*stage 0 at recv B.*stage 1 at recv F"),
    "send-before-a-receive": (lambda p: exchanged(p, 2, RF, SB), "deadlock: .*stage 1 at send F.*stage 2 at send B"),
}


BROKEN_SPLIT: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "missing-weights": (lambda p: without(p, 1, W), "stage 1: W of micro-batch 1.*expected micro-batch 0"),
    "missing-last-weights": (lambda p: with_rank(p, 3, list(p[3][:-1])), "stage 3, chunk 0: 3 of 4 'W'"),
    "weights-twice": (lambda p: twice(p, 0, W), "stage 0: W of micro-batch 0.*expected micro-batch 1"),
    "weights-before-backward": (lambda p: moved_first(p, 2, W), "stage 2: W of micro-batch 0, chunk 0 comes before 'B'"),
    "split-on-one-stage-only": (lambda p: with_rank(p, 0, [a for a in p[0] if a.kind is not W]), "split on some stages only"),
}


@pytest.mark.parametrize("broken", BROKEN_SPLIT)
def test_a_broken_split_is_caught(broken: str) -> None:
    plan = make_schedule("zero-bubble", 4, 4)
    damage, words = BROKEN_SPLIT[broken]
    with pytest.raises(ScheduleError, match=words):
        simulate(damage(plan), 4)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_plan_is_caught(broken: str) -> None:
    plan = make_schedule("1f1b", 4, 4)
    simulate(plan, 4)
    damage, words = BROKEN[broken]
    with pytest.raises(ScheduleError, match=words):
        simulate(damage(plan), 4)


def naive_plan(stages: int, micro_batches: int) -> Plan:
    """1F1B as one writes it first: receive, compute, send, each where it is needed. Both neighbours then send at once."""
    plan = make_schedule("1f1b", stages, micro_batches)
    lists = []
    for rank, actions in enumerate(plan):
        naive: list[Action] = []
        for kind, chunk, micro, _ in (action for action in actions if action.peer is None):
            source, target = (rank - 1, rank + 1) if kind is F else (rank + 1, rank - 1)
            receive, send = (RF, SF) if kind is F else (RB, SB)
            naive += [Action(receive, chunk, micro, source)] if 0 <= source < stages else []
            naive += [Action(kind, chunk, micro)]
            naive += [Action(send, chunk, micro, target)] if 0 <= target < stages else []
        lists.append(tuple(naive))
    return tuple(lists)


def test_the_well_known_deadlock_of_naive_1f1b_is_found() -> None:
    with pytest.raises(ScheduleError, match=re.escape("stage 0 at send F of micro-batch 1, chunk 0 (to stage 1)")):
        simulate(naive_plan(2, 4), 4)
    simulate(naive_plan(2, 1), 1)  # with one micro-batch there is nothing to collide with


def test_orders_that_wait_for_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other: stage 0: B of micro-batch 0, chunk 0"):
        weave([[(B, 0, 0), (F, 0, 0)], [(F, 0, 0), (B, 0, 0)]], chunks=1)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("dualpipe", 2, 2, 1), "'dualpipe' is not known: choose one of auto, gpipe, 1f1b, interleaved, zero-bubble"),
        (("1f1b", 2, 0, 1), "at least 1 stage, micro-batch and chunk, got 2, 0 and 1"),
        (("gpipe", 2, 2, 2), "gpipe runs one model chunk a rank, got 2"),
        (("zero-bubble", 2, 2, 2), "zero-bubble runs one model chunk a rank, got 2"),
    ],
)
def test_a_bad_request_is_one_sentence(request_: tuple[str, int, int, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_schedule(*request_)
    assert set(ORDERS) == {"gpipe", "1f1b", "interleaved", "zero-bubble"}
