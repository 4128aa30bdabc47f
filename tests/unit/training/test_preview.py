"""The learning-rate curve and the layout, as told before the first step."""

from typing import Any

import pytest
import torch

from megatron_llm.config.fields import updated
from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import RunConfig
from megatron_llm.models.registry import get_family
from megatron_llm.optim.lr_schedule import learning_rate
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.training.engine import NativeEngine
from megatron_llm.training.preview import fp8_notes, layout_line, lr_points

BASE = updated(RunConfig(), mock_data=True, vocab_size=97, lr=1.0, train_iters=100)


@pytest.mark.parametrize(
    ("values", "start", "steps"),
    [
        ({}, 0, [1, 51, 100]),
        ({"lr_warmup_iters": 10}, 0, [1, 11, 56, 100]),
        ({"lr_warmup_fraction": 0.1}, 0, [1, 11, 56, 100]),
        ({"lr_warmup_iters": 10}, 60, [61, 100]),
        ({"lr_warmup_iters": 10, "lr_decay_iters": 50}, 0, [1, 11, 31, 50, 51, 100]),
        ({"lr_warmup_iters": 10, "lr_decay_iters": 400}, 0, [1, 11, 100]),
        ({"lr_decay_style": "constant", "lr_warmup_iters": 10}, 0, [1, 11, 100]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}, 0, [1, 51, 81, 100]),
    ],
)
def test_points_where_the_schedule_turns(values: dict[str, Any], start: int, steps: list[int]) -> None:
    config = resolve(updated(BASE, **values), 1)
    points = lr_points(config, start)
    assert [step for step, _ in points] == steps
    for step, lr in points:
        assert lr == learning_rate(config.optimizer, step - 1, 100)


def test_the_peak_is_among_the_points() -> None:
    for style in ("constant", "linear", "cosine", "inverse-square-root", "WSD"):
        points = lr_points(resolve(updated(BASE, lr_decay_style=style, lr_warmup_iters=10), 1))
        assert max(lr for _, lr in points) == 1.0


@pytest.mark.parametrize(
    ("values", "world", "text"),
    [
        ({}, 1, "TP 1 x PP 1 x DP 1 on 1 rank (cpu)"),
        ({"tp": 2}, 4, "TP 2 x PP 1 x DP 2 on 4 ranks (cpu, gloo), ZeRO-1"),
        ({"tp": 2, "sequence_parallel": True, "use_distributed_optimizer": False}, 4,
         "TP 2 x PP 1 x DP 2 on 4 ranks (cpu, gloo), sequence parallel, replicated optimizer"),
        ({"pp": 2, "vpp": 2}, 2, "TP 1 x PP 2 (2 chunks each) x DP 1 on 2 ranks (cpu, gloo), interleaved schedule"),
    ],
)  # fmt: skip
def test_layout_line(values: dict[str, Any], world: int, text: str) -> None:
    long = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "vpp": "virtual_pipeline_model_parallel_size"}
    config = resolve(updated(BASE, **{long.get(name, name): value for name, value in values.items()}), world)
    assert layout_line(config, world, "cpu", "gloo" if world > 1 else "") == text


def test_what_8_bit_products_are_and_what_is_padded_for_them() -> None:
    def notes(kind: str = "cpu", **values: Any) -> list[str]:
        config = resolve(updated(BASE, num_layers=1, hidden_size=32, **values), 1)
        engine = NativeEngine(config, get_family("llama"), single_process_groups())
        return fp8_notes(config, engine.chunks, torch.device(kind))

    assert notes() == []
    (line,) = notes("cuda", fp8="tensorwise", seq_length=16)
    assert "e4m3 forward and e5m2" in line and "CPU" not in line
    emulated, padded = notes(fp8="tensorwise", seq_length=17, micro_batch_size=3, ffn_hidden_size=88)
    assert "a CPU emulates it" in emulated
    assert padded.endswith("multiples of 16, which takes time: weights of 32 x 88, micro-batches of 51 tokens")
