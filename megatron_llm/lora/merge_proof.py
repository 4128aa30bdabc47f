"""The proof of a merge: logits of the merged folder against those of the base with its adapters, by transformers and peft.

Nothing here uses the arithmetic of the merge. peft runs the adapters unmerged; only one that others come after, or one with
a weight, is first merged by peft. Layer by layer where that can be done, so that a proof takes no more memory than the merge
of its largest matrix; otherwise on whole models, as a user would load them. A check that could not run is a failure.
"""

import gc
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.checkpoint.exchange import attempt, describe_error
from megatron_llm.checkpoint.hf_folder import elements, list_tensors
from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.base import Base
from megatron_llm.lora.merge_proof_streamed import expected_streamed, folder_logits
from megatron_llm.lora.merge_proof_weights import CannotStream
from megatron_llm.lora.merge_proof_whole import Expected, expected_whole, open_whole
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require

TOLERANCE = 1e-4
_LEAST = 1e-5  # share of the largest logit that fp32 itself may make of a deep model
_SHARE = 0.1  # share of the adapters' effect that may be tolerated
_ROUNDED = 0.1  # share of the effect of rounding by which two roundings of almost the same numbers may differ
_LENGTH = 32
_MARKED = 16  # trained tokens that are asked about
_OPENED_WHOLE = 50_000_000  # elements; up to this size transformers' own loader opens the merged folder, as a user's will
_STREAMED = "layer by layer"


@dataclass(frozen=True)
class MergeComparison:
    """Logits of the merged folder against base and adapters, in fp32.

    largest_difference  between the two; with 16-bit weights, from base and adapters merged by peft and rounded alike
    tolerance           what was allowed of it
    largest_logit       the largest magnitude among those of base and adapters
    effect              largest change that the adapters make to a logit of the base; None when the vocabulary changed
    rounding            largest change that rounding the merged weights makes; 0 for fp32
    ids                 what was asked
    judges              who computed the two
    way                 how base and adapters were run: layer by layer, or as whole models and why
    """

    largest_difference: float
    tolerance: float
    largest_logit: float
    effect: float | None
    rounding: float
    ids: list[list[int]]
    judges: list[str]
    way: str

    @property
    def passed(self) -> bool:
        """Within the tolerance, and the adapters do something; a NaN anywhere is within no tolerance."""
        alive = self.effect is None or self.effect > 0.0
        return self.largest_difference <= self.tolerance and alive and math.isfinite(self.largest_logit)


def compare_merged(
    base: Base, adapters: Sequence[Adapter], merged: Path, dtypes: Mapping[str, torch.dtype], rows: int | None
) -> MergeComparison:
    """Run both and compare. `dtypes` are those of the written weights, `rows` the size of the merged vocabulary.

    UserError ("could not check") when transformers or peft cannot open or run one of them.
    """
    result, error = attempt(lambda: _compare(base, adapters, merged, dtypes, rows))
    if result is None:
        assert error is not None
        reason = " ".join(describe_error(error).split())
        raise UserError(f"could not check: {reason[:600]}") from error
    return result


def _compare(base: Base, adapters: Sequence[Adapter], merged: Path, dtypes: Mapping[str, torch.dtype], rows: int | None) -> MergeComparison:
    transformers = require("transformers", purpose="the proof of a merge")
    peft = require("peft", extra="finetune", purpose="the proof of a merge")
    ids = _ids(base, adapters, rows)
    with torch.no_grad(), _quiet():
        (plain, expected, rounded), way = _expected(base, adapters, ids, dtypes, rows)
        gc.collect()
        found, way_of_merged = _found(merged, ids)
    if found.shape != expected.shape:
        raise UserError(f"the merged model gives logits of shape {list(found.shape)}, base and adapters {list(expected.shape)}")
    largest = _largest(expected)
    effect = _largest(expected - plain) if plain is not None else None
    rounding = _largest(rounded - expected) if rounded is not None else 0.0
    # What the adapters do must stand out from what is tolerated.
    most = math.inf if effect is None else max(_SHARE * effect, _LEAST * largest)
    return MergeComparison(
        largest_difference=_largest(found - (rounded if rounded is not None else expected)),
        tolerance=min(TOLERANCE * largest, most) + min(_ROUNDED * rounding, most),
        largest_logit=largest,
        effect=effect,
        rounding=rounding,
        ids=ids.tolist(),
        judges=[
            f"peft {peft.__version__} on base and adapters, {way}",
            f"transformers {transformers.__version__} on the merged folder, {way_of_merged}",
        ],
        way=way,
    )


def _ids(base: Base, adapters: Sequence[Adapter], rows: int | None) -> Tensor:
    """Ids [2, <= 32] that never change, among them the first and the last of the vocabulary and trained tokens."""
    size = rows or int(base.settings.get("vocab_size") or 2)
    positions = next((base.settings[name] for name in ("max_position_embeddings", "n_positions") if base.settings.get(name)), _LENGTH)
    generator = torch.Generator().manual_seed(20240229)
    ids = torch.randint(size, (2, min(_LENGTH, int(positions))), generator=generator)
    marked = [index for adapter in adapters for name, parts in adapter.modules.items() if parts.tokens for index in adapter.token_ids(name)]
    marked = [index for index in dict.fromkeys(marked) if 0 <= index < size][: min(_MARKED, ids.shape[1] // 2)]
    ids[0, 1 : 1 + len(marked)] = torch.tensor(marked, dtype=ids.dtype)
    ids[0, 0], ids[-1, -1] = 0, size - 1
    return ids


def _expected(
    base: Base, adapters: Sequence[Adapter], ids: Tensor, dtypes: Mapping[str, torch.dtype], rows: int | None
) -> tuple[Expected, str]:
    """What base and adapters compute, and the words for how it was computed."""
    before = base.tensors.specs[base.embedding].shape[0] if base.embedding is not None else rows
    size = rows if rows != before else None
    expected, error = attempt(lambda: expected_streamed(base, adapters, ids, dtypes, vocab_size=size))
    if expected is not None:
        return expected, _STREAMED
    assert error is not None
    reason = _words(error)
    del error  # what it was raised in holds weights
    gc.collect()
    return expected_whole(base, adapters, ids, dtypes, same_vocabulary=size is None), f"on whole models ({reason})"


def _found(merged: Path, ids: Tensor) -> tuple[Tensor, str]:
    """What the merged folder computes, and the words for how it was computed."""
    way = "from_pretrained"
    if elements(list_tensors(merged).values()) > _OPENED_WHOLE:
        logits, error = attempt(lambda: folder_logits(merged, ids))
        if logits is not None:
            return logits, _STREAMED
        assert error is not None
        way = f"{way} ({_words(error)})"
        del error
        gc.collect()
    return open_whole(merged)(ids, use_cache=False).logits.float(), way


def _words(error: Exception) -> str:
    """One line of at most 300 characters."""
    return " ".join((str(error) if isinstance(error, CannotStream) else describe_error(error)).split())[:300]


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice and no progress bars of the libraries: what is wrong shows in the comparison."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
