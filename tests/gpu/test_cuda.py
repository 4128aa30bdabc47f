"""The same code on CUDA: one GPU equals the CPU in fp32, trains in bf16 and with 8-bit products, and records CUDA graphs."""

import pytest
import torch

from megatron_llm.kernels import fp8
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.training.engine import NativeEngine
from tests.ranks.equivalence import LR, MICRO, SAMPLES, Point, answer_of, assert_same, reference, rows, run_point, whole_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_one_gpu_equals_the_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 without TF32, to 1e-4 of each tensor's largest element."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    point = Point(family=family, tied=True)
    losses, norms, gradients, weights = run_point(single_process_groups("cuda:0"), point)
    on_cpu = [[(key, shape, start, data.cpu()) for key, shape, start, data in pieces] for pieces in (gradients, weights)]
    assert_same(answer_of([(losses, norms, on_cpu[0], on_cpu[1])]), reference(family, True, 97), relative=1e-4)


def losses_of(steps: int, *options: tuple[str, object]) -> list[float]:
    """Losses of some bf16 steps over one batch of several micro-batches."""
    engine = NativeEngine(Point(options=(("bf16", True), *options)).config(), get_family("llama"), single_process_groups("cuda:0"))
    batch = whole_batch(97, 0)
    micro_batches = [rows(batch, first, MICRO) for first in range(0, SAMPLES, MICRO)]
    losses = [engine.train_step(micro_batches, step=step, first_sample=0, lr=10 * LR).loss for step in range(steps)]
    return [float(loss) for loss in losses if loss is not None]


def test_bf16_training_lowers_the_loss() -> None:
    losses = losses_of(20)
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and fp8.missing(torch.device("cuda", 0)) is not None, reason="this GPU has no 8-bit products"
)


@needs_fp8
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 1, 1), (33, 17, 95), (128, 64, 32), (50, 256, 176)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_8_bit_products_equal_the_cpu_s(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """The same roundings; sums within the matrix units are a little less exact than fp32."""
    x, weight, grad = (torch.randn(*shape).to(dtype) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))

    def products(device: str) -> list[torch.Tensor]:
        x_there, weight_there, grad8 = x.to(device), weight.to(device), fp8.scaled(grad.to(device), fp8.E5M2)
        found = [fp8.forward_product(x_there, weight_there), fp8.input_product(grad8, weight_there), fp8.weight_product(grad8, x_there)]
        return [tensor.cpu().double() for tensor in found]

    for got, right in zip(products("cuda:0"), products("cpu"), strict=True):
        assert (got - right).norm() <= 1e-2 * right.norm()


@needs_fp8
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_8_bit_training_learns_as_bf16_does(compiled: bool) -> None:
    losses = losses_of(20, ("fp8", "tensorwise"), ("compile", compiled), ("num_layers", 2))
    plain = losses_of(20, ("num_layers", 2))
    assert losses == pytest.approx(plain, abs=0.03 * plain[0])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_recorded_graphs_train_as_started_kernels_do(recompute: str) -> None:
    """Several micro-batches a step and several steps: what a graph overwrites must have been used by then."""
    options = (("compile", True), ("num_layers", 2), ("recompute_granularity", recompute))
    recorded = losses_of(8, *options, ("compile_mode", "reduce-overhead"))
    assert recorded == pytest.approx(losses_of(8, *options), rel=1e-3)
