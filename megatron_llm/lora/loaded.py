"""A model of transformers with adapters of peft, loaded from their folders to answer or to be evaluated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_llm.utils.errors import UserError, first_line
from megatron_llm.utils.optional import require

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


def choose_device(name: str) -> str:
    """`auto` is a GPU where there is one; UserError for a device that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error
    return name


def context_length(config: Any) -> int | None:
    """The longest sequence, in tokens, that a configuration of transformers names; None when it names none."""
    lengths = [getattr(config, name, None) for name in _CONTEXT_NAMES]
    return next((int(length) for length in lengths if length), None)


def load_with_adapters(
    weights: Path,
    tokenizer: Path,
    adapters: Sequence[Path],
    *,
    settings: Mapping[str, Any],
    merge: bool = True,
    chat_template: Path | None = None,
) -> tuple[Any, Any]:
    """Model and tokenizer from Hugging Face folders, the adapters applied in order.

    `settings` are those of `from_pretrained`, `chat_template` is a file that takes the place of the tokenizer's own. Without
    `merge` the adapters stay beside the weights. UserError for broken or missing files, an adapter of another model, and a
    tokenizer with more entries than the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    try:
        opened: Any = AutoTokenizer.from_pretrained(tokenizer)
        model, info = loader.from_pretrained(weights, output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be loaded by transformers: {first_line(error)}") from error
    if info["missing_keys"]:
        raise UserError(f"{weights} lacks weights of the model that its config.json describes, as {min(info['missing_keys'])}")
    if chat_template is not None:
        opened.chat_template = chat_template.read_text(encoding="utf-8")
    for adapter in adapters:
        model = apply_adapter(model, adapter, merge=merge)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(opened) > rows:
        raise UserError(f"the tokenizer in {tokenizer} has {len(opened)} entries and the model {rows}: give the model's own")
    return model, opened


def apply_adapter(model: Any, adapter: Path, *, merge: bool = True) -> Any:
    """The model with an adapter, merged into its weights or, where these are no plain numbers, beside them.

    UserError when the adapter is not whole, or has weights that the model has no place for.
    """
    peft = require("peft", extra="finetune", purpose="an adapter")
    rows = _stored_rows(adapter)
    _fit_vocabulary(model, rows)
    try:
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"the adapter {adapter} does not belong to this model: {first_line(error)}") from error
    known = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    unmatched = sorted(key for key in rows.keys() - known if "embed" not in key and "lm_head" not in key)
    if unmatched:
        raise UserError(f"the adapter {adapter} does not belong to this model, which has no place for {unmatched[0]}")
    return adapted.merge_and_unload() if merge else adapted


def _stored_rows(adapter: Path) -> dict[str, int]:
    """The first dimension of every stored tensor."""
    from safetensors import SafetensorError, safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{adapter} holds no {file.name}: give the folder that LoRA training wrote")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape()[0] for key in tensors.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def _fit_vocabulary(model: Any, rows: Mapping[str, int]) -> None:
    """Give the model the rows of the embedding that an adapter with a larger vocabulary was trained with."""
    names = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    for key, count in rows.items():
        if any(key.endswith(f"{name}.weight") for name in names) and count != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(count, mean_resizing=False)
