"""What is left out changes no result."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_llm.lora.merge_proof_memory import IdentityWithoutMemory, MergeWithoutCopies, _Identity

_SIZE = 7


def _through_factors(dtype: torch.dtype) -> tuple[object, torch.Tensor]:
    torch.manual_seed(0)
    down, up = nn.Linear(_SIZE, 3, bias=False, dtype=dtype), nn.Linear(3, 5, bias=False, dtype=dtype)
    eye = torch.eye(_SIZE, device=down.weight.device, dtype=dtype)
    return eye, up(down(eye)).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_it_is_the_matrix(dtype: torch.dtype) -> None:
    _, expected = _through_factors(dtype)
    with IdentityWithoutMemory():
        eye, found = _through_factors(dtype)
    assert isinstance(eye, _Identity)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_whatever_else_is_asked_of_it_makes_it() -> None:
    weight, bias = torch.randn(3, _SIZE), torch.randn(3)
    whole = torch.eye(_SIZE)
    with IdentityWithoutMemory():
        eye = torch.eye(_SIZE)
        assert isinstance(eye, _Identity)
        found = [F.linear(eye, weight, bias), torch.add(eye, 1.0), eye.sum(), eye @ weight.t()]
        assert torch.equal(torch.eye(3, 4), whole[:3, :4]), "only square ones are left out"
    for got, expected in zip(found, [weight.t() + bias, whole + 1.0, whole.sum(), weight.t()], strict=True):
        torch.testing.assert_close(got, expected)
    with IdentityWithoutMemory(), pytest.raises(RuntimeError):
        F.linear(torch.eye(_SIZE + 1), weight)


def test_a_clone_and_the_product_with_one_are_the_tensor_and_other_products_are_not() -> None:
    x = torch.arange(4.0)
    with MergeWithoutCopies():
        assert (1 * x) is x and (x * 1) is x and x.mul(1) is x and x.clone() is x
        others = [2 * x, 1.0 * x, x * True, x * x]
    for found, expected in zip(others, [x + x, x, x, x.square()], strict=True):
        assert found is not x
        torch.testing.assert_close(found, expected)
