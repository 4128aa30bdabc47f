"""From what a user names as a model (folder, checkpoint, adapter) to folders that transformers and vLLM can open.

A Hugging Face folder is used as it is, and so is a checkpoint written in that form. Any other format of weights is
converted into a temporary folder.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llm.checkpoint.find import find_latest, is_checkpoint
from megatron_llm.checkpoint.hf_folder import CONFIG, is_hf_folder, tokenizer_folder
from megatron_llm.convert.open import recognise
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Folders:
    """Where the parts of a model lie: weights in any format that can be converted, tokenizer, adapters in the order of use."""

    weights: Path
    tokenizer: Path
    adapters: tuple[Path, ...]


def find_folders(model: Path, adapters: Sequence[Path], report: Callable[[str], None]) -> Folders:
    """The parts of `model`; of a folder of checkpoints the newest complete one, of an adapter the base that it names.

    The tokenizer is that of the last adapter that has one, or else the model's. UserError for what is missing.
    """
    applied = list(adapters)
    for adapter in applied:
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise UserError(f"the adapter {adapter} holds no {ADAPTER_CONFIG}: give the folder that LoRA training wrote")
    if (model / ADAPTER_CONFIG).is_file() and not (model / CONFIG).is_file():
        applied.insert(0, model)
        model = _base_of(model)
    if not model.is_dir():
        what = "is a file" if model.is_file() else "does not exist"
        raise UserError(f"the model folder {model} {what}: give a Hugging Face folder or a checkpoint")
    weights, kind = model, recognise(model)
    if kind == "native" and not is_checkpoint(model):
        latest = find_latest(model, report)
        if latest is None:
            raise UserError(f"no complete checkpoint in {model}: give a checkpoint, a folder of checkpoints or a Hugging Face folder")
        weights = latest
    # Megatron and DeepSpeed keep one tokenizer for all checkpoints of a run.
    places = [*reversed(applied), weights, model, *([] if kind in ("hf", "native") else [weights.parent])]
    tokenizer = next((found for found in map(tokenizer_folder, places) if found is not None), None)
    if tokenizer is None:
        raise UserError(f"{model} holds no tokenizer: copy the files of its tokenizer (tokenizer.json, tokenizer_config.json) into it")
    return Folders(weights, tokenizer, tuple(applied))


@contextmanager
def as_hf_folder(weights: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """The folder that transformers opens, temporary where the weights are in another format."""
    if is_hf_folder(weights):
        yield weights
        return
    from megatron_llm.convert.tool import ConvertOptions, convert

    with tempfile.TemporaryDirectory(prefix="megatron_llm_") as temporary:
        report(f"{weights} is no Hugging Face folder: converting it to a temporary one")
        convert(weights, Path(temporary) / "hf", ConvertOptions(), report)
        yield Path(temporary) / "hf"


@contextmanager
def hf_folders(model: Path, adapters: Sequence[Path], report: Callable[[str], None]) -> Iterator[Folders]:
    """`find_folders`, with weights that transformers opens; a temporary folder is removed at the end."""
    found = find_folders(model, adapters, report)
    with as_hf_folder(found.weights, report) as weights:
        yield replace(found, weights=weights)


def _base_of(adapter: Path) -> Path:
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    for place in (Path(named or ""), adapter / (named or "")):
        if named and place.is_dir():
            return place
    raise UserError(
        f"{adapter} is an adapter of the base model '{named}', which is no folder here: give the base as the model and this as its adapter"
    )
