"""How much arithmetic a token costs, how much the device could do, and the share that is reached (MFU).

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) counts what the mathematics needs, not what is
executed: recomputed activations, padding of the vocabulary and the masked half of attention are not credited.

A training step costs three times its forward pass, since the backward computes two products for each one. Per token:

    matrices   6 x N, N the weights that multiply activations: attention, MLP and output layer (tied or not), but not the
               embedding tables, which are looked up
    attention  6 x layers x heads x head size x sequence length: scores and weighted values are 2 x 2 x length x width
               forward, of which the causal mask leaves half
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_llm.config.schema import ModelConfig
from megatron_llm.utils.progress import amount

# Words of the device's name, then dense TFLOP/s of 16-bit products with fp32 accumulation, then of fp32 without tensor
# cores. From the vendors' data sheets, without sparsity. The first line whose words are all in the name counts.
GPU_PEAKS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("B200",), 2250.0, 75.0),
    (("H200", "NVL"), 835.0, 60.0),
    (("H200",), 989.4, 66.9),
    (("GH200",), 989.4, 66.9),
    (("H100", "PCIE"), 756.0, 51.2),
    (("H100", "NVL"), 835.0, 60.0),
    (("H100",), 989.4, 66.9),
    (("H800", "PCIE"), 756.0, 51.2),
    (("H800",), 989.4, 66.9),
    (("H20",), 148.0, 44.0),
    (("A100",), 312.0, 19.5),
    (("A800",), 312.0, 19.5),
    (("A40",), 149.7, 37.4),
    (("A10",), 125.0, 31.2),
    (("L40S",), 362.0, 91.6),
    (("L40",), 181.0, 90.5),
    (("L4",), 121.0, 30.3),
    (("RTX", "4090"), 165.2, 82.6),
    (("RTX", "3090"), 71.0, 35.6),
)


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank's device, None where it is not known; `source` says which and whence, to follow "MFU against"."""

    flops: float | None
    source: str


def matrix_parameters(model: ModelConfig, *, gated_mlp: bool) -> int:
    """Weights of a resolved model that multiply activations; `gated_mlp` counts three MLP matrices instead of two."""
    hidden, ffn, heads, groups = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.num_query_groups
    channels, vocabulary = model.kv_channels, model.vocab_size
    if ffn is None or groups is None or channels is None or vocabulary is None:
        raise ValueError("the model configuration must be resolved")
    attention = hidden * channels * (heads + 2 * groups) + heads * channels * hidden
    mlp = (3 if gated_mlp else 2) * hidden * ffn
    return model.num_layers * (attention + mlp) + hidden * vocabulary


def flops_per_token(model: ModelConfig, seq_length: int, *, gated_mlp: bool) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_length` tokens (see the module's text)."""
    channels = model.kv_channels
    if channels is None:
        raise ValueError("the model configuration must be resolved")
    attention = 6.0 * model.num_layers * model.num_attention_heads * channels * seq_length
    return 6.0 * matrix_parameters(model, gated_mlp=gated_mlp) + attention


def mfu(tokens_per_second: float, token_flops: float, peak_flops: float | None) -> float | None:
    """Share of the peak of all ranks together that is reached, in [0, 1]; None when the peak is not known."""
    return tokens_per_second * token_flops / peak_flops if peak_flops else None


def local_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> Peak:
    """The peak of this rank's device in `dtype`: from the table on a GPU, measured by matrix products on a CPU.

    Call it on all ranks at once and add up the results: ranks that share a machine's cores then measure their share.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype, tf32=torch.get_float32_matmul_precision() != "highest")
    if device.type == "cpu":
        flops = measure_matmul(dtype, seconds)
        return Peak(flops, f"{amount(flops, 'FLOP/s')} a rank, measured by {name} matrix products on this machine")
    return Peak(None, f"no peak: none is known for {device.type}")


def gpu_peak(name: str, dtype: torch.dtype, *, tf32: bool = False) -> Peak:
    """The peak of a GPU by its name; `tf32`: fp32 products use the tensor cores at half the 16-bit rate."""
    words = set(name.upper().replace("-", " ").split())
    half, single = next(((half, single) for wanted, half, single in GPU_PEAKS if words.issuperset(wanted)), (None, None))
    if half is None or single is None or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Peak(None, f"no peak: none is known for {name} in {str(dtype).removeprefix('torch.')}")
    if dtype == torch.float32:
        teraflops, kind = (half / 2, "tf32") if tf32 else (single, "fp32")
    else:
        teraflops, kind = half, "16-bit"
    return Peak(teraflops * 1e12, f"{teraflops:g} TFLOP/s a rank, data sheet of {name}, {kind}")


def measure_matmul(dtype: torch.dtype, seconds: float = 0.2, size: int = 384, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of square matrix products on the CPU with the threads torch now uses, over about `seconds`."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = left @ right  # the first product prepares kernels and memory
    start, count = clock(), 0
    while True:
        torch.mm(left, right, out=out)
        count += 1
        elapsed = clock() - start
        if elapsed >= seconds:
            return 2.0 * size**3 * count / elapsed
