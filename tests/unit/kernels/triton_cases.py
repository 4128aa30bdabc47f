"""Checks of the Triton kernels against the plain form in fp64, on any device: the interpreter's CPU, or a GPU.

The plain form is written here in torch, computed in fp64 and differentiated by autograd. A case passes when the kernel's
error is at most a few roundings of its type.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llm.kernels.triton import flat, loss, norm, rotary, swiglu

# The largest error allowed, relative to the largest element of the answer: a few times the type's rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
TYPES = tuple(TOLERANCE)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, low: float = -2.0, high: float = 2.0) -> Tensor:
    """Uniform values that the type holds exactly, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return (torch.rand(*shape, generator=generator) * (high - low) + low).to(dtype).to(device)


def assert_near(what: str, got: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """`got` differs from `exact` (fp64) by at most the type's tolerance times the largest element."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    difference, scale = (got.double() - exact).abs().max().item(), exact.abs().max().item()
    assert difference <= factor * TOLERANCE[dtype] * scale, f"{what} differs by {difference:.3g} at a scale of {scale:.3g} in {dtype}"


def check(
    fused: Callable[..., object], plain: Callable[..., object], inputs: list[Tensor], dtype: torch.dtype, *, factor: float = 1.0
) -> None:
    """Outputs and the gradients of all inputs, of a weighted sum of the outputs."""
    mine = [tensor.detach().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, expected = _tuple(fused(*mine)), _tuple(plain(*exact))
    # A sum's gradient is a constant expanded to the shape; a transposed weight gives gradients that are not contiguous.
    weights = [random(*reversed(e.shape), dtype=dtype, device=str(e.device), seed=7).permute(*reversed(range(e.dim()))) for e in expected]
    torch.autograd.backward(list(got), [w.to(g.dtype) for g, w in zip(got, weights, strict=True)])
    torch.autograd.backward(list(expected), [w.double() for w in weights])
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_near(f"output {number}", a.detach(), b.detach(), dtype, factor)
    for number, (a, b) in enumerate(zip(mine, exact, strict=True)):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == a.dtype
        assert_near(f"gradient of input {number}", a.grad, b.grad, dtype, factor)


def _tuple(result: object) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    assert isinstance(result, tuple)
    return result


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm without any rounding."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def check_norms(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Four forms; rows that are a slice of a wider tensor, and a transposed one whose rows cannot be seen as a matrix."""
    size = shape[-1]
    weight, bias = (random(size, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    wide = random(*shape[:-1], 2 * size, dtype=dtype, device=device, seed=3)
    x, residual = wide[..., :size], random(*shape, dtype=dtype, device=device, seed=4).transpose(0, 1).contiguous().transpose(0, 1)
    check(lambda x, w: norm.rms_norm(x, w, 1e-5), plain_rms, [x, weight], dtype)
    check(lambda x, w, b: norm.layer_norm(x, w, b, 1e-5), lambda x, w, b: F.layer_norm(x, (size,), w, b, 1e-5), [x, weight, bias], dtype)
    added = x + residual  # the sum is rounded before it is normalised: the plain form starts from what can be represented
    for which in (x, residual):
        other = (added - which).detach()
        if not torch.equal(which + other, which.double() + other.double()):
            other = torch.zeros_like(which)
        check(lambda x, r, w: norm.add_rms_norm(x, r, w, 1e-5), lambda x, r, w: (plain_rms(x + r, w), x + r), [which, other, weight], dtype)
    check(
        lambda x, r, w, b: norm.add_layer_norm(x, r, w, b, 1e-5),
        lambda x, r, w, b: (F.layer_norm(x + r, (size,), w, b, 1e-5), x + r),
        [x, torch.zeros_like(x), weight, bias],
        dtype,
    )


def check_mixed_norm(device: str) -> None:
    """A weight in fp32 over bf16 activations gives fp32, as the plain form does."""
    x, weight = random(3, 5, 33, dtype=torch.bfloat16, device=device), random(33, dtype=torch.float32, device=device)
    result = norm.rms_norm(x, weight, 1e-6)
    assert result.dtype == torch.float32
    assert_near("result", result, plain_rms(x.double(), weight.double()), torch.bfloat16)


def check_rotary(device: str, dtype: torch.dtype, shape: tuple[int, ...], *, batched: bool) -> None:
    """Both layouts, on heads that are a slice of a wider tensor with only a part of their channels turned."""
    length, batch, heads, channels = shape
    angles = random(length, batch if batched else 1, 1, channels // 2, dtype=torch.float32, device=device, seed=5, high=100.0)
    cos, sin = angles.cos(), angles.sin()
    x = random(length, batch, heads + 2, channels + 6, dtype=dtype, device=device)[:, :, 1:-1, :channels]

    def half_split(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def interleaved(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos.double(), sin.double())
        return torch.view_as_real(turned).flatten(-2)

    check(lambda x: rotary.rotary(x, cos, sin), half_split, [x], dtype)
    check(lambda x: rotary.rotary_interleaved(x, cos, sin), interleaved, [x], dtype)


def check_learned_tables(device: str) -> None:
    """Cosines and sines that learn get their gradients."""
    x = random(3, 2, 2, 8, dtype=torch.float32, device=device)
    angles = random(3, 1, 1, 4, dtype=torch.float32, device=device).requires_grad_()
    for turn in (rotary.rotary, rotary.rotary_interleaved):
        (grad,) = torch.autograd.grad(
            turn(x, angles.cos(), angles.sin()).square().sum() + turn(x, angles.cos(), angles.sin())[0].sum(), angles
        )
        assert grad.abs().max() > 0.01


def check_swiglu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Contiguous, and in another layout."""

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    x = random(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)
    check(swiglu.swiglu, plain, [x], dtype)
    check(swiglu.swiglu, plain, [x.transpose(0, 1)], dtype)


def check_cross_entropy(device: str, dtype: torch.dtype, rows: int, columns: int, *, shards: int) -> None:
    """The whole loss over a vocabulary of shards x columns - 3 from the two passes, and its gradient with weighted rows."""
    vocabulary = shards * columns - 3
    whole = random(rows, shards * columns, dtype=dtype, device=device, low=-30.0, high=30.0)
    labels = (torch.arange(rows, device=device) * 7919 + vocabulary - 1) % vocabulary
    weights = random(rows, dtype=torch.float32, device=device, low=0.1)
    weights[::3] = 0.0
    parts = [whole[:, i * columns : (i + 1) * columns].clone() for i in range(shards)]
    parts[0] = whole[:, :columns]  # rows that are not adjacent in memory
    valid = [min(columns, vocabulary - i * columns) for i in range(shards)]
    statistics = torch.stack([loss.softmax_statistics(p, labels, i * columns, valid[i]) for i, p in enumerate(parts)])
    maximum = statistics[:, 0].amax(0)
    log_sum_exp = (statistics[:, 1] * (statistics[:, 0] - maximum).exp()).sum(0).log() + maximum
    exact = whole[:, :vocabulary].double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    losses.backward(weights.double())
    assert_near("loss", log_sum_exp - statistics[:, 2].sum(0), losses.detach(), torch.float32)
    assert exact.grad is not None
    log_sum_exp[weights == 0] = float("inf")
    for i, part in enumerate(parts):
        loss.softmax_gradient_(part, labels, log_sum_exp, weights, i * columns, valid[i])
    got = torch.cat(parts, 1)
    assert_near("gradient", got[:, :vocabulary], exact.grad, dtype)
    assert not got[:, vocabulary:].any() and not got[weights == 0].any()


def check_statistics_edges(device: str) -> None:
    """No valid column, rows of minus infinity, and values that only a shifted exponential can hold."""
    logits = torch.full((3, 5), float("-inf"), device=device)
    logits[1] = 3e38
    logits[2, 4] = float("nan")
    labels = torch.tensor([0, 1, 2], device=device)
    nothing = loss.softmax_statistics(logits, labels, 0, 0)
    assert torch.equal(nothing.cpu(), torch.tensor([[float("-inf")] * 3, [0.0] * 3, [0.0] * 3]))
    some = loss.softmax_statistics(logits, labels, 0, 5).cpu()
    assert some[0, 0] == float("-inf") and some[1, 0] == 0
    assert some[1, 1] == 5 and some[2, 1] == torch.tensor(3e38)
    assert some[1, 2].isnan()


def check_adamw(device: str, grad_dtype: torch.dtype, count: int) -> None:
    """Three updates beside torch's AdamW in fp64, with the gradient scaled on the way and a copy rounded to bf16.

    The interpreter cuts bf16 off instead of rounding it, so the copy is exact on a GPU only.
    """
    main = random(count, dtype=torch.float32, device=device)
    exact = torch.nn.Parameter(main.double())
    settings = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    peer = torch.optim.AdamW([exact], lr=3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [torch.zeros_like(main), torch.zeros_like(main)]
    rounded = torch.zeros(count, dtype=torch.bfloat16, device=device)
    for step in range(1, 4):
        grad = random(count, dtype=grad_dtype, device=device, seed=step)
        flat.adamw_(main, *moments, grad, rounded if step > 1 else None, **settings, step=step, grad_scale=0.25)
        exact.grad = grad.double() * 0.25
        peer.step()
        if step == 1:
            assert not rounded.any()
        elif device == "cpu":
            assert_near("rounded", rounded, main.double(), torch.bfloat16)
        else:
            assert torch.equal(rounded, main.bfloat16())
    assert_near("main", main, exact.detach(), torch.float32)
    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        assert_near(name, moment, peer.state[exact][name], torch.float32)


def check_shards_agree(device: str) -> None:
    """A range cut at a multiple of 64 elements is updated to the same bits as the whole."""
    count, cut = 2500, 1216
    state = [random(count, dtype=torch.float32, device=device, seed=seed, low=0.0) for seed in range(4)]
    apart = [tensor.clone() for tensor in state]
    arguments = (None, 1e-2, 0.9, 0.99, 1e-8, 0.1, 5, 0.5)
    flat.adamw_(*state, *arguments)
    for part in (slice(0, cut), slice(cut, count)):
        flat.adamw_(*(tensor[part] for tensor in apart), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(state, apart, strict=True))


def check_squares(device: str, dtype: torch.dtype, count: int) -> None:
    """Equal to fp64, to the last bits; squares that fp32 cannot hold are held."""
    x = random(count, dtype=dtype, device=device)
    got, exact = flat.sum_of_squares(x), x.double().square().sum()
    assert got.dtype == torch.float64 and got.shape == ()
    assert torch.allclose(got, exact, rtol=1e-13, atol=0.0)
    if dtype == torch.float32:
        assert flat.sum_of_squares(x * 1e30).isfinite()


def check_empty(device: str) -> None:
    """Nothing in, nothing out, no kernel started."""
    none = torch.empty(0, 3, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    for result in (
        norm.rms_norm(none, weight, 1e-5),
        swiglu.swiglu(none),
        loss.softmax_statistics(none[:, 0].detach(), none[:, 0, 0].long(), 0, 8),
    ):
        assert result.numel() == 0
    norm.rms_norm(none, weight, 1e-5).sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert flat.sum_of_squares(none.detach()) == 0


def check_compiled(device: str, backend: str) -> None:
    """torch.compile takes a function that uses all differentiable kernels as one graph, and its gradients are the eager ones."""

    def layer(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        normal = norm.rms_norm(x, weight, 1e-5)
        turned = rotary.rotary(normal.unflatten(-1, (-1, 16)), table, table).flatten(2)
        return swiglu.swiglu(*torch.cat((turned, normal), -1).chunk(2, -1))

    x = random(6, 2, 64, dtype=torch.float32, device=device).requires_grad_()
    weight = random(64, dtype=torch.float32, device=device).requires_grad_()
    table = random(6, 1, 1, 8, dtype=torch.float32, device=device)
    expected, got = layer(x, weight, table), torch.compile(layer, fullgraph=True, backend=backend)(x, weight, table)
    assert torch.allclose(got, expected, atol=1e-6)
    outer = random(*expected.shape, dtype=torch.float32, device=device, seed=9)
    for a, b in zip(torch.autograd.grad(got, (x, weight), outer), torch.autograd.grad(expected, (x, weight), outer), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
