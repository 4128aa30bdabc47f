"""Two training steps over shared memory give what they give over gloo, and how a run chooses between the two."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel import shm
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.session import choose_backend
from megatron_llm.utils.errors import UserError
from tests.ranks.equivalence import Point, answer_of, assert_same, run_point

pytestmark = pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")


@pytest.mark.parametrize(
    ("point", "exact"),
    [(Point(tp=2), True), (Point(tp=2, sp=True), True), (Point(pp=2, tied=True), True), (Point(dp=2), False)],
    ids=lambda value: value.id if isinstance(value, Point) else "",
)
def test_a_training_step_equals_gloo(point: Point, exact: bool) -> None:
    """Of two ranks to the last bit: a sum of two does not depend on its order. A reduce-scatter divides buffers otherwise than gloo's."""
    answers = [
        answer_of(run_ranks(run_point, point, tp=point.tp, pp=point.pp, dp=point.dp, timeout=120, backend=backend))
        for backend in ("shm", "gloo")
    ]
    if exact:
        assert answers[0].losses == answers[1].losses
        assert answers[0].norms == answers[1].norms
        for key, weight in answers[1].weights.items():
            assert torch.equal(answers[0].weights[key], weight), key
    assert_same(answers[0], answers[1], relative=1e-6)


def choices(groups: ParallelGroups) -> list[str]:
    """What auto, gloo and shm become when all is well, on two hosts, and where the extension is missing on one rank."""
    found, cpu, root = [], torch.device("cpu"), dist.distributed_c10d._get_default_store()

    def choose(name: str, configured: str) -> str:
        try:
            return choose_backend(configured, cpu, dist.PrefixStore(name, root), groups.rank, 2)
        except UserError as error:
            return str(error)

    found += [choose("well", "auto"), choose("asked", "shm"), choose("gloo", "gloo")]
    with mock.patch.object(shm, "host_identity", lambda: f"node{groups.rank} boot"):
        found += [choose("hosts", "auto"), choose("hosts asked", "shm")]
    with mock.patch.object(shm, "why_not_here", lambda: "the extension is not built" if groups.rank else ""):
        found += [choose("missing", "auto"), choose("missing asked", "shm")]
    with mock.patch.object(shm, "_self_test", lambda store, rank, size: "its self-test gave a wrong sum" if rank else ""):
        found += [choose("wrong", "auto")]
    return found


def test_all_ranks_choose_alike(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_ranks(choices, dp=2)
    assert first == second
    sentence = "--distributed-backend shm cannot be used, {}: use gloo (or auto)"
    hosts = "the ranks are on 2 hosts or in separate containers (node0, node1)"
    assert first == [
        "shm", "shm", "gloo",
        "gloo", sentence.format(hosts),
        "gloo", sentence.format("the extension is not built"),
        "gloo",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count(f"distributed backend: gloo and not the faster shm, {hosts}") == 1, "by one rank"
    assert "its self-test gave a wrong sum" in printed


def test_gpus_keep_nccl() -> None:
    gpu = torch.device("cuda", 0)
    assert choose_backend("auto", gpu, dist.HashStore(), 0, 2) == "nccl"
    assert choose_backend("gloo", gpu, dist.HashStore(), 0, 2) == "gloo"
    with pytest.raises(UserError, match="moves CPU memory only"):
        choose_backend("shm", gpu, dist.HashStore(), 0, 2)


def test_the_default_group_and_what_is_made_from_it() -> None:
    assert run_ranks(backends, dp=2, backend="shm") == [["shm", "shm"]] * 2


def backends(groups: ParallelGroups) -> list[str]:
    return [dist.get_backend(), dist.get_backend(groups.dp.pg)]
