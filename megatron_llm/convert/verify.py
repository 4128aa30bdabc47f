"""Opening an export with transformers and comparing its logits with our model's, on fixed ids, in fp32.

A check that did not run is a failure: every way this can go wrong raises or yields a result that did not pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.exchange import attempt
from megatron_llm.checkpoint.whole_model import load_whole_model
from megatron_llm.utils.errors import UserError

TOLERANCE = 1e-4
_SEQUENCES, _LENGTH = 2, 64


@dataclass(frozen=True)
class Comparison:
    """Logits of an export against ours. `largest_logit` is the largest magnitude among ours."""

    largest_difference: float
    largest_logit: float
    kl: float
    tolerance: float
    ids: list[list[int]]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def passed(self) -> bool:
        """Equal shapes and every difference within the tolerance; a NaN anywhere is within no tolerance."""
        return self.shapes[0] == self.shapes[1] and self.largest_difference <= self.tolerance and math.isfinite(self.largest_logit)


def fixed_ids(vocab_size: int, max_positions: int) -> Tensor:
    """Ids [2, <= 64] that never change, the first and the last of the vocabulary among them."""
    generator = torch.Generator().manual_seed(20240229)
    ids = torch.randint(vocab_size, (_SEQUENCES, min(_LENGTH, max_positions)), generator=generator)
    ids[0, 0], ids[-1, -1] = 0, vocab_size - 1
    return ids


def compare_logits(ours: Tensor, theirs: Tensor, ids: Tensor, tolerance: float = TOLERANCE) -> Comparison:
    """Compare logits [B, S, V]. Where all of ours are smaller than 1 the tolerance shrinks with them.

    (Freshly initialised models have small logits: an absolute tolerance would pass a wrong conversion.)
    """
    shapes = (tuple(ours.shape), tuple(theirs.shape))
    largest = ours.abs().max().item()
    tolerance *= min(1.0, largest)
    if shapes[0] != shapes[1]:
        return Comparison(math.inf, largest, math.inf, tolerance, ids.tolist(), shapes)
    logs = [logits.double().log_softmax(-1) for logits in (ours, theirs)]
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean().item()
    difference = (ours.double() - theirs.double()).abs().max().item()
    return Comparison(difference, largest, kl, tolerance, ids.tolist(), shapes)


def verify_export(folder: Path, checkpoint: Path, dtype: torch.dtype, tolerance: float = TOLERANCE) -> Comparison:
    """Compare a folder with the checkpoint it was made from, whose weights are first rounded to the folder's `dtype`.

    UserError when transformers cannot open the folder, or reports weights that are missing, left over or misshapen.
    """
    theirs = _open_with_transformers(folder)
    ours = load_whole_model(checkpoint)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(dtype))
        assert ours.config.vocab_size is not None and ours.config.max_position_embeddings is not None
        ids = fixed_ids(ours.config.vocab_size, ours.config.max_position_embeddings)
        return compare_logits(ours.logits(ids), theirs(ids).logits.float(), ids, tolerance)


def _open_with_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    opened, error = attempt(lambda: loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True))
    if error is not None or opened is None:
        raise UserError(f"transformers cannot open the exported folder: {type(error).__name__}: {error}") from error
    model, info = opened
    problems = [
        f"{kind} {sorted(map(str, info[kind]))[:5]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    ]
    if problems:
        raise UserError(f"transformers does not use the exported folder as it is: {'; '.join(problems)}")
    return model.eval()
