"""Rounding to 8 bits and the products of what was rounded, against casts and fp64 products."""

import math

import pytest
import torch
from torch import Tensor

from megatron_llm.kernels import fp8
from megatron_llm.kernels.fp8 import E4M3, E5M2, Scaled
from megatron_llm.utils.errors import UserError

CPU = torch.device("cpu")
FRACTION = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # largest relative error of rounding: half of the last bit
LEAST = {E4M3: 2.0**-9, E5M2: 2.0**-16}  # smallest number above zero


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Normally distributed, with a few elements that are much larger, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * size
    return (x * torch.where(torch.rand(*shape, generator=generator) < 0.02, 30.0, 1.0)).to(dtype)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_scale_is_the_smallest_power_of_two_that_fits(kind: torch.dtype, dtype: torch.dtype) -> None:
    most = torch.finfo(kind).max
    for largest in (1.0, most, most * 2**-7, 3.14, 2.0**-10, 65504.0, 2.0**-14):
        for sign in (1.0, -1.0):
            x = torch.tensor([[0.0, sign * largest, largest / 3]], dtype=dtype)
            scale, size = fp8.scale_of(x, kind), x.abs().max().float().item()
            assert scale.dtype == torch.float32 and scale.dim() == 0 and math.frexp(scale.item())[0] == 0.5
            assert size / scale.item() <= most < 2 * size / scale.item(), (largest, scale)


def test_one_bit_above_what_fits_takes_the_next_scale() -> None:
    fits = torch.tensor([448.0])
    assert fp8.scale_of(fits, E4M3) == 1.0 and fp8.scale_of(fits.nextafter(torch.tensor([449.0])), E4M3) == 2.0


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_rounding_is_that_of_the_cast(kind: torch.dtype, dtype: torch.dtype, size: float) -> None:
    x = random(7, 3, 33, seed=1, dtype=dtype, size=size)
    narrow = fp8.scaled(x, kind)
    expected = (x.double() / narrow.scale.double()).float().to(kind)
    assert torch.equal(narrow.data.view(torch.uint8), expected.view(torch.uint8))
    assert narrow.dtype == dtype and narrow.data.shape == x.shape
    error = (narrow.wide() - x.float()).abs()
    bound = torch.maximum(FRACTION[kind] * x.float().abs(), LEAST[kind] / 2 * narrow.scale)
    assert bool((error <= bound).all()) and error.max() > 0


def test_a_shard_is_rounded_as_the_whole_is() -> None:
    """But for elements below the normal numbers of the coarser scale: why ranks need not agree on a scale."""
    whole = random(64, 48, seed=2, dtype=torch.bfloat16)
    whole[:, 0] *= 50
    together = fp8.scaled(whole, E4M3)
    shard = fp8.scaled(whole[:, 24:], E4M3)
    assert shard.scale < together.scale
    one, other = together.wide()[:, 24:], shard.wide()
    normal = whole[:, 24:].float().abs() >= 2.0**-6 * together.scale
    assert bool(normal.any()) and not bool(normal.all())
    assert torch.equal(one[normal], other[normal]) and not torch.equal(one, other)


SIZES = [(1, 1, 1), (3, 5, 7), (16, 32, 48), (17, 31, 33), (2, 64, 16), (50, 16, 17)]


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_products_of_rounded_numbers_equal_fp64(rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, grad = (random(*shape, seed=n, dtype=dtype) for n, shape in enumerate(((rows, inner), (columns, inner), (rows, columns))))
    x8, weight8, grad8 = fp8.scaled(x, E4M3), fp8.scaled(weight, E4M3), fp8.scaled(grad, E5M2)
    wide = {"x": x8.wide().double(), "w": weight8.wide().double(), "g": grad8.wide().double()}
    for got, left, right in (
        (fp8.forward_product(x, weight), wide["x"], wide["w"].t()),
        (fp8.input_product(grad8, weight), wide["g"], wide["w"]),
        (fp8.weight_product(grad8, x), wide["g"].t(), wide["x"]),
        (fp8.weight_product(grad8, x8), wide["g"].t(), wide["x"]),
    ):
        expected, size = left @ right, left.abs() @ right.abs()
        assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
        # Sums of `inner` terms in fp32, and the rounding of the result to its type.
        assert bool(((got.double() - expected).abs() <= 1e-6 * size + torch.finfo(dtype).eps * expected.abs() + 1e-6).all())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(layout: str) -> None:
    base = random(6, 5, 40, seed=3)
    x = {"transposed": base.transpose(0, 1), "strided": base[:, :, ::2], "expanded": base[:1].expand(6, 5, 40)}[layout]
    weight = random(9, x.shape[-1], seed=4).t().contiguous().t()
    assert not x.is_contiguous() and not weight.is_contiguous()
    assert fp8.scaled(x, E4M3).data.is_contiguous() and fp8.scaled(weight, E4M3).data.is_contiguous()  # as GPUs need it
    got = fp8.forward_product(x, weight)
    assert torch.equal(got, fp8.forward_product(x.contiguous(), weight.contiguous())) and got.shape == (*x.shape[:-1], 9)


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of the right answer."""
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_are_as_exact_as_the_formats(dtype: torch.dtype) -> None:
    """Independent roundings of both operands: a few percent in e4m3, more with a gradient; e5m2 all over would not pass the first."""
    x, weight, grad = (random(*shape, seed=n, dtype=dtype) for n, shape in enumerate(((111, 255), (95, 255), (111, 95)), 5))
    grad8 = fp8.scaled(grad, E5M2)
    exact = [tensor.double() for tensor in (x, weight, grad)]
    assert 0.01 < relative(fp8.forward_product(x, weight), exact[0] @ exact[1].t()) < 0.05
    assert 0.02 < relative(fp8.input_product(grad8, weight), exact[2] @ exact[1]) < 0.08
    assert 0.02 < relative(fp8.weight_product(grad8, x), exact[2].t() @ exact[0]) < 0.08


def test_every_element_is_within_the_bound_of_its_terms() -> None:
    x, weight = random(33, 65, seed=8), random(47, 65, seed=9)
    a, b = fp8.scaled(x, E4M3), fp8.scaled(weight, E4M3)
    half = FRACTION[E4M3]
    below = [LEAST[E4M3] / 2 * narrow.scale.double() for narrow in (a, b)]
    large_x, large_weight = (1 + half) * x.double().abs() + below[0], weight.double().abs()
    bound = (half * x.double().abs() + below[0]) @ large_weight.t() + large_x @ (half * large_weight + below[1]).t()
    error = (fp8.forward_product(x, weight).double() - x.double() @ weight.double().t()).abs()
    assert bool((error <= bound + 1e-6).all())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_what_is_not_finite_stays_visible(bad: float, dtype: torch.dtype) -> None:
    """An overflow must reach the gradient's norm, which then skips the step."""
    grad = torch.ones(4, 16, dtype=dtype)
    grad[2, 3] = bad
    grad8 = fp8.scaled(grad, E5M2)
    assert not bool(grad8.scale.isfinite())
    assert not bool(fp8.input_product(grad8, torch.ones(16, 5, dtype=dtype)).isfinite().any())
    assert not bool(fp8.weight_product(grad8, torch.ones(4, 5, dtype=dtype)).isfinite().any())


def test_zeros_give_zeros() -> None:
    found = fp8.forward_product(torch.zeros(3, 20), random(5, 20, seed=1))
    assert torch.equal(found, torch.zeros(3, 5))


def test_the_transposed_matrix_is_the_same_numbers() -> None:
    narrow = fp8.scaled(random(3, 4, 5, seed=1), E4M3)
    assert torch.equal(narrow.transposed().wide(), narrow.wide().flatten(0, 1).t()) and narrow.transposed().data.is_contiguous()
    assert isinstance(narrow.transposed(), Scaled)


def test_the_cpu_has_it() -> None:
    assert fp8.missing(CPU) is None
    fp8.require(CPU)


def test_older_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (fp8.missing(gpu) is not None) == refused
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"--fp8 was given, but .* capability 8\.9 or higher .* A100 has 8\.0: use --fp8 none"):
        fp8.require(gpu)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "this device is mps" in str(fp8.missing(torch.device("mps")))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "AMD" in str(fp8.missing(torch.device("cuda")))
