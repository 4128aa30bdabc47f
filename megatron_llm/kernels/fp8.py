"""Matrix products in 8-bit floating point, with one scale a tensor (Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
arXiv:2209.05433).

Values of a forward are rounded to e4m3 (3 bits of fraction), gradients to e5m2 (2 bits and more range). A tensor is divided
by its scale first, which its largest element alone decides, at the moment of the product: nothing is remembered between
steps, so there is no state to save and a resumed run computes what an uninterrupted one does. Scales are powers of two:
the division is then exact, and only the smallest elements of a tensor (below 2^-14 of the largest in e4m3, below 2^-29 in
e5m2) are rounded otherwise under another scale. Hence tensor-parallel ranks may scale their own shards by their own largest
elements: no collective is needed, and a layout changes results by little more than it does in fp32.

On NVIDIA GPUs from compute capability 8.9 on the products run on the matrix units; sums are kept in fp32. On a CPU torch
computes the same from the same rounded numbers, slowly. Matrix units want sizes that are multiples of 16: others are padded
with zeros, which changes no result.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.utils.errors import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
UNIT = 16  # what the matrix units want sizes to be multiples of
_LEAST = 2.0**-100  # scale of a tensor of zeros; its reciprocal is finite
_CAPABILITY = (8, 9)
_FRACTION, _EXPONENT = 0x7FFFFF, 0x7F800000  # bits of an fp32 number


class Scaled(NamedTuple):
    """A tensor in 8 bits: it stands for `data` [..., columns] times `scale` (fp32 scalar), a tensor of type `dtype`."""

    data: Tensor
    scale: Tensor
    dtype: torch.dtype

    def transposed(self) -> "Scaled":
        """[columns, rows], all dimensions but the last being rows; laid out anew, as `product` wants its operands."""
        return Scaled(self.data.flatten(0, -2).t().contiguous(), self.scale, self.dtype)

    def wide(self) -> Tensor:
        """What it stands for, in fp32."""
        return self.data.float() * self.scale


def scale_of(x: Tensor, kind: torch.dtype) -> Tensor:
    """The smallest power of two by which `x` can be divided to fit into `kind`, an fp32 scalar.

    Infinite or NaN where `x` holds an infinity or NaN, which every product with it then is too.
    """
    low, high = torch.aminmax(x)
    ratio = (torch.maximum(-low, high).float() / torch.finfo(kind).max).clamp(min=_LEAST)
    power = ((ratio.view(torch.int32) + _FRACTION) & _EXPONENT).view(torch.float32)
    return torch.where(ratio.isfinite(), power, ratio)


def rounded(x: Tensor, scale: Tensor, kind: torch.dtype) -> Scaled:
    """`x` [..., columns] in 8 bits under a scale that is known."""
    exact = x if x.dtype == torch.bfloat16 else x.float()  # both have the range that a power of two needs to change no bit
    return Scaled((exact.contiguous() * scale.reciprocal().to(exact.dtype)).to(kind), scale, x.dtype)


def scaled(x: Tensor, kind: torch.dtype) -> Scaled:
    """`x` [..., columns] in 8 bits, under the scale of its own largest element."""
    return rounded(x, scale_of(x, kind), kind)


def product(a: Scaled, b: Scaled, *, fast: bool = False) -> Tensor:
    """a b^T of `a` [..., K] and `b` [N, K]: [..., N] of `a`'s type. At most one of the two is e5m2.

    `fast`: sums inside the matrix units may keep fewer bits, which a forward bears and a gradient should not.
    """
    flat, columns = _padded(a.data.flatten(0, -2), 1), b.data.shape[0]
    found = torch._scaled_mm(flat, _padded(b.data, UNIT).t(), a.scale, b.scale, out_dtype=a.dtype, use_fast_accum=fast)
    if columns % UNIT:
        found = found[:, :columns].contiguous()
    return found.view(*a.data.shape[:-1], columns)


def _padded(data: Tensor, unit: int) -> Tensor:
    """[rows, columns] with zeros up to multiples of `unit` rows and of UNIT columns."""
    below, right = -data.shape[0] % unit, -data.shape[1] % UNIT
    if not below and not right:
        return data
    return F.pad(data.view(torch.uint8), (0, right, 0, below)).view(data.dtype)  # a byte of zeros is 0.0


def forward_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, [..., in] to [..., out]."""
    return product(scaled(x, E4M3), scaled(weight, E4M3), fast=True)


def input_product(gradient: Scaled, weight: Tensor) -> Tensor:
    """dy W, [..., out] to [..., in]: the gradient of the input."""
    return product(gradient, scaled(weight, E4M3).transposed())


def weight_product(gradient: Scaled, source: Tensor | Scaled) -> Tensor:
    """dy^T x, [..., out] and [..., in] to [out, in]: the gradient of the weight."""
    narrow = source if isinstance(source, Scaled) else scaled(source, E4M3)
    return product(gradient.transposed(), narrow.transposed())


def require(device: torch.device) -> None:
    """UserError where this device has no products in 8 bits."""
    reason = missing(device)
    if reason is not None:
        raise UserError(f"--fp8 was given, but {reason}: use --fp8 none, which computes in the type of the weights")


def missing(device: torch.device) -> str | None:
    """Why there are no products in 8 bits on this device; None where there are."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its products need an NVIDIA GPU or a CPU, and this device is {device.type if torch.version.hip is None else 'an AMD GPU'}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= _CAPABILITY:
        return None
    return (
        f"its products need an NVIDIA GPU of compute capability {'.'.join(map(str, _CAPABILITY))} or higher (Ada, Hopper, Blackwell), "
        f"and {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    )
