"""The picture of a fine-tuning run: the curves are those of the log, whatever it holds."""

from pathlib import Path
from typing import Any

import pytest

from megatron_llm.finetune.figure import curves, draw


def entries(steps: int) -> list[dict[str, Any]]:
    """A log of this many steps, with an evaluation after every fourth; the norm of the first is not known."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        norm = None if step == 1 else 0.5 * step
        found.append(
            {"event": "step", "step": step, "loss": 9.0 / step, "lr": 1e-3, "grad_norm": norm, "tokens": 30 * step, "seconds": 0.5}
        )
        if step % 4 == 0:
            found.append({"event": "evaluation", "step": step, "loss": 10.0 / step})
    return found


def test_the_curves_are_those_of_the_log() -> None:
    found = curves(entries(9))
    assert found["loss"].steps == list(range(1, 10)) and found["loss"].values == [9.0 / step for step in range(1, 10)]
    assert (found["validation_loss"].steps, found["validation_loss"].values) == ([4, 8], [2.5, 1.25])
    assert (found["grad_norm"].steps[0], found["grad_norm"].values[0]) == (2, 1.0)
    assert found["tokens_per_second"].values == [60.0 * step for step in range(1, 10)]
    assert found["seconds"].values == [0.5] * 9 and found["lr"].values == [1e-3] * 9
    assert len(found["mfu"]) == len(found["loss_scale"]) == 0


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_there_is_a_picture_at_any_time(steps: int, tmp_path: Path) -> None:
    draw(tmp_path / "x.png", "title", entries(steps))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
