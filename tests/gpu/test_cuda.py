"""The same code on CUDA: one GPU equals the CPU in fp32, and trains in bf16."""

from dataclasses import replace

import pytest
import torch

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


def test_bf16_training_lowers_the_loss() -> None:
    config = Point(options=(("bf16", True),)).config()
    engine = NativeEngine(replace(config, train=replace(config.train, compile=False)), get_family("llama"), single_process_groups("cuda:0"))
    batch = whole_batch(97, 0)
    micro_batches = [rows(batch, first, MICRO) for first in range(0, SAMPLES, MICRO)]
    losses = [engine.train_step(micro_batches, step=step, first_sample=0, lr=10 * LR).loss for step in range(20)]
    assert losses[0] is not None and losses[-1] is not None and losses[-1] < 0.9 * losses[0]
