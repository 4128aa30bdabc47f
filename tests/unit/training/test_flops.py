"""The arithmetic of a token is counted as PyTorch's own counter counts it; peaks come from the name or a measurement."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_llm.config.fields import updated
from megatron_llm.config.resolve import with_defaults
from megatron_llm.config.schema import RunConfig
from megatron_llm.training.flops import flops_per_token, gpu_peak, local_peak, matrix_parameters, measure_matmul, mfu


def model_flops(tokens: int, shapes: list[tuple[int, int]], heads: int, channels: int, layers: int) -> int:
    """Forward and backward FLOPs that torch counts for products with these matrices and full attention."""
    weights = [torch.randn(rows, columns, requires_grad=True) for rows, columns in shapes]
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            (torch.randn(tokens, weight.shape[1], requires_grad=True) @ weight.t()).sum().backward()
        for _ in range(layers):
            query, key, value = (torch.randn(heads, tokens, channels, requires_grad=True) for _ in range(3))
            (F.softmax(query @ key.transpose(1, 2), -1) @ value).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_flops_agree_with_the_counter_of_torch(family: str) -> None:
    groups, channels = (2 if family == "llama" else 4), 8
    config = updated(
        RunConfig(), model=family, num_layers=3, hidden_size=32, num_query_groups=groups, vocab_size=97, ffn_hidden_size=96, seq_length=16
    )
    model = with_defaults(config, 1).model
    gated = family == "llama"
    up = (2 * 96 if gated else 96, 32)
    layer = [((4 + 2 * groups) * channels, 32), (32, 4 * channels), up, (32, 96)]
    counted = model_flops(16, [*layer * 3, (97, 32)], heads=4, channels=channels, layers=3)
    full_attention = 2 * 6 * 3 * 4 * channels * 16  # the counter sees the masked half too
    ours = flops_per_token(model, 16, gated_mlp=gated) + full_attention / 2
    assert 16 * ours == counted
    assert matrix_parameters(model, gated_mlp=gated) == sum(rows * columns for rows, columns in [*layer * 3, (97, 32)])


def test_an_unresolved_model_is_refused() -> None:
    with pytest.raises(ValueError, match="resolved"):
        flops_per_token(RunConfig().model, 16, gated_mlp=True)


def test_mfu_is_a_share_of_the_peak_or_unknown() -> None:
    assert mfu(1000.0, 6e9, 12e12) == 0.5
    assert mfu(1000.0, 6e9, None) is None


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.0),
        ("NVIDIA H20", torch.bfloat16, 148.0),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312.0),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
    ],
)
def test_peak_of_known_gpus(name: str, dtype: torch.dtype, teraflops: float) -> None:
    peak = gpu_peak(name, dtype)
    assert peak.flops == pytest.approx(teraflops * 1e12) and name in peak.source


def test_tf32_counts_as_half_of_16_bit_and_an_unknown_gpu_as_unknown() -> None:
    assert gpu_peak("NVIDIA A100 80GB PCIe", torch.float32, tf32=True).flops == 156e12
    assert gpu_peak("Some Card 9", torch.bfloat16).flops is None
    assert "Some Card 9" in gpu_peak("Some Card 9", torch.bfloat16).source
    assert gpu_peak("NVIDIA H100", torch.float64).flops is None


def test_the_cpu_is_measured_for_as_long_as_asked() -> None:
    times = iter([0.0, 0.5, 1.0, 1.5])
    assert measure_matmul(torch.float32, seconds=1.5, size=10, clock=lambda: next(times)) == 2 * 10**3 * 3 / 1.5
    peak = local_peak(torch.device("cpu"), torch.float32, seconds=0.01)
    assert peak.flops is not None and 1e7 < peak.flops < 1e15
    assert "measured" in peak.source
    assert local_peak(torch.device("meta"), torch.float32).flops is None
