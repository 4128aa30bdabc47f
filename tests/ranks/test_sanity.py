"""A copy that drifted away is found and named: over replicas, over TP, over tied stages."""

import pytest
import torch

from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.sanity import checksum, disagreements
from tests.ranks.equivalence import Point


def drift(groups: ParallelGroups, point: Point, name: str, rank: int) -> list[str]:
    """Disagreements before (there are none) and after one rank changes the last bit of one element of one weight."""
    from megatron_llm.models.registry import get_family

    engine = NativeEngine(point.config(), get_family(point.family), groups)
    assert disagreements(engine.chunks, groups) == []
    if groups.rank == rank:
        weight = next(p for chunk in engine.chunks for p in chunk.parameters() if p.placement.logical_name == name)  # type: ignore[attr-defined]
        with torch.no_grad():
            weight.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    return disagreements(engine.chunks, groups)


@pytest.mark.parametrize(
    ("point", "name", "kind"),
    [
        pytest.param(Point(dp=2), "layers.3.mlp.up.weight", "data-parallel replicas", id="dp2"),
        pytest.param(Point(tp=2), "layers.0.norm1.weight", "tensor-parallel replicas", id="tp2"),
        pytest.param(Point(pp=2, tied=True), "embedding.word.weight", "tied stages", id="pp2-tied"),
    ],
)
def test_drift_is_named(point: Point, name: str, kind: str) -> None:
    for found in run_ranks(drift, point, name, 1, tp=point.tp, pp=point.pp, dp=point.dp):
        assert found == [f"{name} ({kind})"]


def test_checksum_sees_order_and_every_bit() -> None:
    values = torch.arange(6, dtype=torch.float32)
    assert checksum(values) == checksum(values.clone())
    assert checksum(values) != checksum(values.flip(0))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(values.bfloat16()) != checksum((values + 1).bfloat16())
