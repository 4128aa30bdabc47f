"""Operators on flat buffers in C++: AdamW, sum of squares, accumulation."""

import math

import pytest
import torch
from torch import Tensor

from megatron_llm.kernels import reference

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 15, 64, 1009, 70001]
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 7, "grad_scale": 0.37}


def state(size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """main, exp_avg, exp_avg_sq in fp32 and a gradient."""
    generator = torch.Generator().manual_seed(size)
    main, average, gradient = (torch.randn(size, generator=generator) for _ in range(3))
    return [main, average * 1e-2, torch.rand(size, generator=generator) * 1e-4, (gradient * 1e-2).to(dtype)]


def exact_adamw(main: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, s: dict[str, float]) -> list[Tensor]:
    """Loshchilov and Hutter's update in fp64."""
    g = grad.double() * s["grad_scale"]
    exp_avg = s["beta1"] * exp_avg.double() + (1 - s["beta1"]) * g
    exp_avg_sq = s["beta2"] * exp_avg_sq.double() + (1 - s["beta2"]) * g * g
    step = (exp_avg / (1 - s["beta1"] ** s["step"])) / ((exp_avg_sq / (1 - s["beta2"] ** s["step"])).sqrt() + s["eps"])
    return [main.double() * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * step, exp_avg, exp_avg_sq]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["C++", "torch"])
def test_adamw(capability: str, form: str, size: int, dtype: torch.dtype) -> None:
    tensors = state(size, dtype)
    exact = exact_adamw(*tensors, SETTINGS)
    run = torch.ops.megatron_llm.adamw_ if form == "C++" else reference.adamw_
    run(*tensors, None, **SETTINGS)
    for found, wanted in zip(tensors[:3], exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0, "grad_scale": 1.0, "step": 1}, {"beta1": 0.4, "step": 1000}])
def test_adamw_is_torchs_to_the_last_bit(capability: str, settings: dict[str, float]) -> None:
    """Where torch runs the same vectors; its remainders, in fp64, are left out, and what no fused multiply-add is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch computes the ends of every thread's part in another way
    try:
        ours, theirs = state(1 << 14), state(1 << 14)
        torch.ops.megatron_llm.adamw_(*ours, None, **SETTINGS | settings)
        reference.adamw_(*theirs, None, **SETTINGS | settings)
    finally:
        torch.set_num_threads(threads)
    for found, wanted in zip(ours[:3], theirs[:3], strict=True):
        if capability == "baseline" or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("rounded", TYPES[1:], ids=str)
def test_adamw_rounds_main_as_torch_does(capability: str, rounded: torch.dtype) -> None:
    tensors, copy = state(1009), torch.empty(1009, dtype=rounded)
    for index, value in enumerate((1e-40, -1e-41, 6e-8, 3e-8, 1e-7, 65519.9, 65520.0, 1e38, torch.inf, -torch.inf, torch.nan, -0.0)):
        tensors[0][index], tensors[1][index], tensors[3][index] = value, 0.0, 0.0
    torch.ops.megatron_llm.adamw_(*tensors, copy, **SETTINGS | {"weight_decay": 0.0})
    assert torch.equal(copy.nan_to_num(nan=7.0), tensors[0].to(rounded).nan_to_num(nan=7.0))


def test_a_shard_gets_what_the_whole_gets(capability: str) -> None:
    """Cut at multiples of 64 elements, and with any number of threads."""
    whole, threads = state(70001), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parts = [tensor.clone() for tensor in state(70001)]
            for start, end in ((0, 64), (64, 6400), (6400, 70001)):
                torch.ops.megatron_llm.adamw_(*(part[start:end] for part in parts), None, **SETTINGS)
            if count == 1:
                torch.ops.megatron_llm.adamw_(*whole, None, **SETTINGS)
            assert all(torch.equal(one, other) for one, other in zip(parts, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_adamw_says_what_does_not_fit(loaded: None) -> None:
    main, average, square, gradient = state(64)
    with pytest.raises(ValueError, match="grad must be contiguous and have 64 elements"):
        torch.ops.megatron_llm.adamw_(main, average, square, gradient[:63], None, **SETTINGS)
    with pytest.raises(ValueError, match="first update is step 1"):
        torch.ops.megatron_llm.adamw_(main, average, square, gradient, None, **SETTINGS | {"step": 0})
    with pytest.raises(TypeError, match="has 16 bits"):
        torch.ops.megatron_llm.adamw_(main, average, square, gradient, torch.empty(64), **SETTINGS)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sum_of_squares(size: int, dtype: torch.dtype) -> None:
    flat = state(size, dtype)[0].to(dtype)
    found = reference.sum_of_squares(flat)
    assert found.dtype == torch.float64 and found.shape == ()
    assert float(found) == pytest.approx(math.fsum(value * value for value in flat.tolist()), rel=1e-6)


def views(dtype: torch.dtype) -> list[Tensor]:
    """Addends of several layouts: contiguous, transposed, transposed with a gap, every other element, three dimensions."""
    return [
        torch.randn(1009).to(dtype),
        torch.randn(131, 67).to(dtype),
        torch.randn(131, 67).to(dtype).t(),
        torch.randn(131, 99).to(dtype)[:, 3:70].t(),
        torch.randn(131, 67).to(dtype)[:, ::2],
        torch.randn(3, 5, 7).to(dtype).transpose(0, 2),
        torch.randn(1, 67).to(dtype).t(),
        torch.randn(0, 67).to(dtype).t(),
    ]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("form", ["C++", "torch"])
def test_accumulate(capability: str, form: str, overwrite: bool, dtype: torch.dtype) -> None:
    run = torch.ops.megatron_llm.accumulate_ if form == "C++" else reference.accumulate_
    for addend in views(dtype):
        total = torch.randn(addend.shape)
        wanted = addend.float() if overwrite else total + addend.float()
        run(total, addend, overwrite)
        assert torch.equal(total, wanted)
    apart = torch.randn(9, 14)[:, ::2]
    wanted = apart + 1
    torch.ops.megatron_llm.accumulate_(apart, torch.ones(9, 7, dtype=dtype), False)
    assert torch.equal(apart, wanted)


def test_operators_are_registered_well(loaded: None) -> None:
    check, operators = torch.library.opcheck, torch.ops.megatron_llm
    check(operators.adamw_.default, (*state(70), torch.empty(70, dtype=torch.bfloat16)), SETTINGS)
    check(operators.adamw_.default, (*state(70), None), SETTINGS)
    check(operators.accumulate_.default, (torch.randn(7, 5), torch.randn(5, 7).t(), False))
