"""Plain torch forms of the operations that may have a fused form: the definition that fused kernels are tested against.

Statistics (norms, softmax, losses) are computed in fp32 whatever the input's precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension, computed in fp32, result in the type of `x`."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout.

    `x` [S, B, heads, D]; `cos`, `sin` [S, B or 1, 1, D / 2] in fp32. Element d is rotated with element d + D / 2.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the layout of the paper (and of GLM): element 2i is rotated with element 2i + 1.

    `x` [S, B, heads, D]; `cos`, `sin` [S, B or 1, 1, D / 2] in fp32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU."""
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """GELU, exact."""
    return F.gelu(x)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) x up (Shazeer 2020) of gate and up, the halves of `x` [..., 2 F]: [..., F]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as GPT-2 uses it."""
    return F.gelu(x, approximate="tanh")


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention with grouped heads.

    query [B, heads, S, D], key and value [B, kv_heads, T, D]; `mask` [B, 1, S, T] is true where a token may look, or an
    additive bias [B or 1, heads, S, T] in the type of `query`; None means causal (which needs S = T). Dropout draws from
    torch's default generator of the device.
    """
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


def softmax_statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """What a cross-entropy needs of rows of logits [N, V]: fp32 [3, N].

    The maximum of the first `valid` columns (the others are padding), the sum of exp(logit - maximum), and the logit of
    the label; column 0 is vocabulary id `first`, and a label that is not among the columns has 0.
    """
    wide = logits[:, :valid].float()
    maximum = wide.amax(-1) if valid else wide.new_full((len(wide),), -torch.inf)
    total = (wide - maximum.unsqueeze(-1)).exp_().sum(-1)
    columns = labels - first
    here = (columns >= 0) & (columns < valid)
    if not valid:
        return torch.stack((maximum, total, total))
    target = wide.gather(-1, columns.masked_fill(~here, 0).unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
    return torch.stack((maximum, total, target))


def softmax_gradient_(logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, valid: int) -> None:
    """Turn logits [N, V] into the gradient of sum over rows of scale x cross-entropy, in place.

    (exp(logit - log_sum_exp) - 1 at the label) x scale; 0 in the columns from `valid` on. `log_sum_exp`, `scale` fp32 [N].
    """
    wide = (logits.float() - log_sum_exp.unsqueeze(-1)).exp_()
    columns = labels - first
    here = (columns >= 0) & (columns < valid)
    rows = here.nonzero().squeeze(-1)
    wide[rows, columns[rows]] -= 1.0
    wide.mul_(scale.unsqueeze(-1))
    wide[:, valid:] = 0.0
    logits.copy_(wide)


@torch.no_grad()
def adamw_(
    main: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rounded: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """One update of AdamW (Loshchilov and Hutter 2019) on flat tensors [n]: main and moments fp32, in place.

    The gradient counts times `grad_scale`, `step` is the number of this update from 1, and `rounded`, when given, gets
    the new main in its own type.
    """
    scaled = grad.float() * grad_scale
    steps = torch.tensor(float(step), device=main.device)
    torch._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls
        [main], [scaled], [exp_avg], [exp_avg_sq], [], [steps],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if rounded is not None:
        rounded.copy_(main)


_ROW = 256  # elements whose squares are added in fp32, before fp64: keeps the error near 1e-7 at full speed


def sum_of_squares(flat: Tensor) -> Tensor:
    """Sum of the squares of a flat tensor, an fp64 scalar."""
    whole = flat.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    return norms.double().square().sum() + torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).double().square()


# Adding 16 bits to fp32 is converted through a temporary by torch: pieces that stay in the cache are 4 times as fast.
_PIECE = 1 << 17


@torch.no_grad()
def accumulate_(total: Tensor, addend: Tensor, overwrite: bool) -> None:
    """total += addend, or total = addend with `overwrite`: an fp32 total and an addend of any layout and type."""
    if overwrite:
        total.copy_(addend)
    elif total.device.type != "cpu" or total.numel() <= _PIECE:
        total.add_(addend)
    else:
        for piece, part in zip(total.view(-1).split(_PIECE), addend.reshape(-1).split(_PIECE), strict=True):
            piece.add_(part)
