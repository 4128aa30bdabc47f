"""The Triton kernels on a GPU, compiled: the checks of the interpreter at larger sizes, and whole training steps with them."""

from dataclasses import replace

import pytest
import torch

from megatron_llm.kernels.triton import loss, operations
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.training.engine import NativeEngine
from tests.ranks.equivalence import LR, MICRO, SAMPLES, Point, answer_of, assert_same, reference, rows, run_point, whole_batch
from tests.unit.kernels import triton_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_triton_runs_here() -> None:
    """A GPU build of torch brings Triton; without it the tests below would mean nothing."""
    assert operations.missing(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 7), (5, 3, 64), (2, 41, 129), (33, 5, 2048), (700, 3, 128), (3, 1, 16000)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cases.check_norms("cuda", dtype, shape)


def test_mixed_norm() -> None:
    cases.check_mixed_norm("cuda")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize(
    ("shape", "batched"), [((3, 2, 3, 8), False), ((2, 3, 5, 6), True), ((257, 2, 32, 128), True), ((5, 1, 65, 256), False)]
)
def test_rotary(dtype: torch.dtype, shape: tuple[int, ...], batched: bool) -> None:
    cases.check_rotary("cuda", dtype, shape, batched=batched)


def test_learned_tables() -> None:
    cases.check_learned_tables("cuda")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 3, 1030), (129, 2, 14336)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cases.check_swiglu("cuda", dtype, shape)


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize(("rows_", "columns", "shards"), [(7, 11, 1), (4, 37, 3), (517, 4133, 2), (64, 128256, 1)])
def test_cross_entropy(dtype: torch.dtype, rows_: int, columns: int, shards: int) -> None:
    cases.check_cross_entropy("cuda", dtype, rows_, columns, shards=shards)


def test_statistics_edges() -> None:
    cases.check_statistics_edges("cuda")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("count", [1, 1500, 1_000_003])
def test_adamw(dtype: torch.dtype, count: int) -> None:
    cases.check_adamw("cuda", dtype, count)


def test_shards_agree() -> None:
    cases.check_shards_agree("cuda")


@pytest.mark.parametrize("dtype", cases.TYPES)
@pytest.mark.parametrize("count", [1, 8197, 1_000_003])
def test_sum_of_squares(dtype: torch.dtype, count: int) -> None:
    cases.check_squares("cuda", dtype, count)


def test_empty() -> None:
    cases.check_empty("cuda")


def test_offsets_beyond_32_bits() -> None:
    """Logits of more than 2^31 elements: the last row is computed as the first is."""
    count, columns = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    logits = torch.zeros(count, columns, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 3.0
    labels = torch.full((count,), columns - 1, device="cuda")
    statistics = loss.softmax_statistics(logits, labels, 0, columns)
    assert statistics[:, -1].tolist() == pytest.approx([3.0, 1 + (columns - 1) * 2.718281828**-3, 3.0], rel=1e-4)
    ones = torch.ones(count, device="cuda")
    loss.softmax_gradient_(logits, labels, statistics[1].log() + statistics[0], ones, 0, columns)
    assert logits[-1].float().sum().item() == pytest.approx(0.0, abs=0.05) and logits[-1, -1] < -0.9


def test_no_kernel_breaks_a_compiled_graph() -> None:
    cases.check_compiled("cuda", "inductor")


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_a_step_with_fused_kernels_equals_the_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 without TF32, to 1e-4 of each tensor's largest element: losses, norms, gradients and weights of two steps."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    point = Point(family=family, options=(("kernels", "fused"),))
    losses, norms, gradients, weights = run_point(single_process_groups("cuda:0"), point)
    on_cpu = [[(key, shape, start, data.cpu()) for key, shape, start, data in pieces] for pieces in (gradients, weights)]
    assert_same(answer_of([(losses, norms, on_cpu[0], on_cpu[1])]), reference(family, False, 97), relative=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_is_the_same_with_either_kernels(compiled: bool) -> None:
    """Twenty steps: the losses of the fused kernels stay within bf16's noise of plain torch's."""
    found = {}
    for kernels in ("torch", "fused"):
        config = Point(options=(("bf16", True), ("kernels", kernels))).config()
        config = replace(config, train=replace(config.train, compile=compiled))
        engine = NativeEngine(config, get_family("llama"), single_process_groups("cuda:0"))
        batch = whole_batch(97, 0)
        micro_batches = [rows(batch, first, MICRO) for first in range(0, SAMPLES, MICRO)]
        losses = [engine.train_step(micro_batches, step=step, first_sample=0, lr=10 * LR).loss for step in range(20)]
        found[kernels] = [loss_ for loss_ in losses if loss_ is not None]
    assert len(found["fused"]) == 20 and found["fused"][-1] < 0.9 * found["fused"][0]
    assert found["fused"] == pytest.approx(found["torch"], rel=0.02)
