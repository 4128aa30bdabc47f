"""The C++ operators for CPU (csrc/cpu/): where the library comes from, whether it loads, what torch.compile must know of it.

The library registers `torch.ops.megatron_llm.*` when it is loaded, which happens once in a process and only when asked
for. `MEGATRON_LLM_CPU_CAPABILITY` (baseline, avx2, avx512 or avx512_bf16) takes another instruction set than the processor's best.
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor

from megatron_llm.utils.errors import UserError

CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")
OPERATORS = (
    "softmax_statistics",
    "softmax_gradient_",
    "adamw_",
    "accumulate_",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "swiglu",
    "swiglu_backward",
    "causal_attention",
    "causal_attention_backward",
)


@functools.cache
def load() -> str | None:
    """Load the operators; None when they can be used, else why not, in words that fit behind "because".

    UserError when MEGATRON_LLM_CPU_CAPABILITY names something that this processor does not have.
    """
    spec = importlib.util.find_spec("megatron_llm._kernels")
    if spec is None or spec.origin is None:
        return "they are not built: `pip install --no-build-isolation -e .` builds them where there is a C++20 compiler"
    rebuild = "build them again with `pip install --no-build-isolation -e .`"
    try:
        torch.ops.load_library(spec.origin)
        built_for = torch.ops.megatron_llm.built_for()
    except OSError as error:
        return f"{spec.origin} cannot be loaded ({str(error).splitlines()[0]}): {rebuild}"
    if built_for != torch.__version__.split("+")[0]:
        return f"they were built for torch {built_for} and this is torch {torch.__version__}: {rebuild}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.megatron_llm, name)]
    if missing:
        return f"they were built from older sources without {missing[0]}: {rebuild}"
    try:
        torch.ops.megatron_llm.cpu_capability()
    except RuntimeError as error:
        raise UserError(f"MEGATRON_LLM_CPU_CAPABILITY: {str(error).splitlines()[0]}") from error
    _register_fakes()
    return None


def capability() -> str:
    """The instruction set in use, one of CAPABILITIES."""
    return str(torch.ops.megatron_llm.cpu_capability())


def use_capability(name: str) -> None:
    """Use another instruction set from now on, in this process; UserError when the processor lacks it."""
    try:
        torch.ops.megatron_llm.use_cpu_capability(name)
    except RuntimeError as error:
        raise UserError(str(error).splitlines()[0]) from error


def _register_fakes() -> None:
    """Shapes of what each operator returns, for torch.compile."""
    fake = torch.library.register_fake

    @fake("megatron_llm::softmax_statistics")
    def _(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
        return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)

    @fake("megatron_llm::softmax_gradient_")
    def _(logits: Tensor, labels: Tensor, log_sum_exp: Tensor, scale: Tensor, first: int, valid: int) -> None:
        return None

    @fake("megatron_llm::adamw_")
    def _(*arguments: object) -> None:
        return None

    @fake("megatron_llm::accumulate_")
    def _(total: Tensor, addend: Tensor, overwrite: bool) -> None:
        return None

    @fake("megatron_llm::rms_norm")
    def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32)

    @fake("megatron_llm::rms_norm_backward")
    def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    @fake("megatron_llm::rotary")
    def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
        return x.new_empty(x.shape)

    @fake("megatron_llm::swiglu")
    def _(gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty(gate.shape)

    @fake("megatron_llm::swiglu_backward")
    def _(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))

    def like_projection(x: Tensor) -> Tensor:
        batch, heads, tokens, size = x.shape
        return x.new_empty((tokens, batch, heads, size)).permute(1, 2, 0, 3)

    @fake("megatron_llm::causal_attention")
    def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return like_projection(query), query.new_empty(query.shape[:3], dtype=torch.float32)

    @fake("megatron_llm::causal_attention_backward")
    def _(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return like_projection(query), like_projection(key), like_projection(value)
