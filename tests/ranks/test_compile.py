"""A compiled model is the model: the layers as one graph, with the tensor-parallel operators inside it."""

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.traceable import column_linear, scatter_sum, sum_over_group
from megatron_llm.testing.ranks import run_ranks
from tests.ranks.equivalence import Point, answer_of, assert_same, reference, run_point

COMPILED = (("compile", True), ("kernels", "torch"))


def traced(groups: ParallelGroups, point: Point, options: tuple[tuple[str, Any], ...] = COMPILED) -> Any:
    """Two steps with the graph traced, differentiated and run as it is, whole or not at all; no C++ is generated."""
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)):
        torch.compiler.reset()
        return run_point(groups, replace(point, options=(*point.options, *options)))


LAYOUTS = {
    "tp2": Point(tp=2, options=(("num_layers", 2),)),
    "tp2-sp-tied": Point(tp=2, sp=True, tied=True),
    "tp2-pp2-sp-gpt": Point(tp=2, pp=2, sp=True, family="gpt"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_layouts_equal_one_process(name: str) -> None:
    point = LAYOUTS[name]
    results = run_ranks(traced, point, tp=point.tp, pp=point.pp, dp=point.dp, timeout=120)
    assert_same(answer_of(results), reference(point.family, point.tied, point.vocab, point.options))


@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("default", marks=pytest.mark.full)])  # alike on a CPU
def test_the_compiler_s_own_code_equals_eager(mode: str) -> None:
    """One process, the C++ that the compiler writes, and the spelled-out attention and fused loss that go with it."""
    point = Point(options=(("num_layers", 2), ("compile", True), ("compile_mode", mode)))
    (result,) = run_ranks(run_point, point, timeout=240)
    assert_same(answer_of([result]), reference("llama", False, 97, (("num_layers", 2), ("kernels", "torch"))))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_the_mode_reaches_the_compiler(mode: str) -> None:
    """And the model runs under what the compiler made, here the layers as they are."""
    options = (("num_layers", 2), ("kernels", "torch"))
    with mock.patch.object(torch, "compile", side_effect=lambda layers, **options: layers) as compiler:
        answer = reference("llama", False, 97, (*options, ("compile", True), ("compile_mode", mode)))
    assert [call.kwargs["mode"] for call in compiler.call_args_list] == [mode]
    assert answer.losses == reference("llama", False, 97, options).losses


def test_recorded_kernels_leave_out_what_communicates() -> None:
    operators = torch.ops.megatron_llm
    names = ("column_linear", "column_linear_backward", "sum_over_group", "scatter_sum", "gather_sequence")
    assert all(torch.Tag.cudagraph_unsafe in getattr(operators, name).default.tags for name in names)


def check_operators(groups: ParallelGroups) -> None:
    """torch's own checks: schemas, shapes for the compiler, gradients through both."""
    weight = torch.randn(5, 4, requires_grad=True)
    for sequence_parallel in (False, True):
        x = torch.randn(6, 3, 4, requires_grad=True)
        for products in ("torch", "onednn", "fp8"):
            torch.library.opcheck(column_linear, (x, weight, groups.tp.name, sequence_parallel, products))
    torch.library.opcheck(sum_over_group, (torch.randn(6, 3, requires_grad=True), groups.tp.name))
    torch.library.opcheck(scatter_sum, (torch.randn(6, 3, requires_grad=True), groups.tp.name))


def test_the_operators_pass_torch_s_checks() -> None:
    run_ranks(check_operators, tp=2)
