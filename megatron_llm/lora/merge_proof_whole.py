"""Base and adapters by transformers and peft on whole models in fp32: for what cannot be run layer by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.base import Base
from megatron_llm.lora.merge_proof_weights import written_dtype
from megatron_llm.utils.errors import UserError


class Expected(NamedTuple):
    """Logits of the base alone (None when its vocabulary is another), with its adapters, and with rounded merged weights.

    The last is None when the merged weights are fp32.
    """

    plain: Tensor | None
    adapted: Tensor
    rounded: Tensor | None


def expected_whole(
    base: Base, adapters: Sequence[Adapter], ids: Tensor, dtypes: Mapping[str, torch.dtype], *, same_vocabulary: bool
) -> Expected:
    """Load the base, put the adapters on it one after the other, and run it."""
    from peft import PeftModel

    model = open_whole(base.folder)
    plain = model(ids, use_cache=False).logits.float() if same_vocabulary else None
    exact = is_exact(dtypes)
    logits: Tensor | None = None
    for number, adapter in enumerate(adapters):
        before = _state(model) if adapter.weight != 1.0 else {}
        _resize(model, adapter)
        loader: Any = PeftModel
        adapted = loader.from_pretrained(model, adapter.folder, torch_device="cpu").eval()
        _check_loaded(adapted, adapter)
        if number == len(adapters) - 1 and adapter.weight == 1.0:
            logits = adapted(ids, use_cache=False).logits.float()
            if exact:
                return Expected(plain, logits, None)
        model = _untied(adapted).merge_and_unload().eval()
        _blend(model, before, adapter.weight)
    if logits is None:
        logits = model(ids, use_cache=False).logits.float()
    if exact:
        return Expected(plain, logits, None)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(written_dtype(dtypes, name)).float()
    return Expected(plain, logits, model(ids, use_cache=False).logits.float())


def open_whole(folder: Path) -> Any:
    """The model of a folder in fp32; every weight of it must be used."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = [
        f"{kind} {sorted(map(str, info[kind]))[:5]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    ]
    if problems:
        raise UserError(f"transformers does not use {folder} as it is: {'; '.join(problems)}")
    return model.eval()


def is_exact(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether nothing is rounded when weights of these types are written."""
    return all(dtype == torch.float32 for dtype in dtypes.values() if dtype.is_floating_point)


def _check_loaded(adapted: Any, adapter: Adapter) -> None:
    """Whether peft put factors wherever the adapter has some (it loses tied ones of some families when it loads)."""
    layers = dict(adapted.get_base_model().named_modules())
    lost = [name for name, parts in adapter.modules.items() if parts.down is not None and not hasattr(layers.get(name), "lora_A")]
    if lost:
        raise UserError(f"peft leaves out the factors of {', '.join(lost[:3])} when it loads {adapter.folder}")


def _untied(adapted: Any) -> Any:
    """The model with a tied matrix, of which only one side has factors, as two: peft would merge into both."""
    model = adapted.get_base_model()
    one, other = (getattr(layer, "base_layer", layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    sides = [hasattr(layer, "lora_A") for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    if any(sides) and getattr(one, "weight", None) is getattr(other, "weight", 0):
        other.weight = torch.nn.Parameter(other.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    return adapted


def _resize(model: Any, adapter: Adapter) -> None:
    """Give the model as many rows as the adapter's matrices of embeddings have, as a user must before loading it."""
    current = model.get_input_embeddings().weight.shape[0]
    for name, parts in adapter.modules.items():
        layer = dict(model.named_modules()).get(name)
        if "weight" in parts.whole and layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = adapter.tensors.specs[parts.whole["weight"]].shape[0]
            if rows != current:
                model.resize_token_embeddings(rows, mean_resizing=False)
                current = rows


def _state(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def _blend(model: Any, before: Mapping[str, Tensor], weight: float) -> None:
    """Go back from what peft merged to `weight` of the way from what there was; new rows stay."""
    if not before:
        return
    done: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.data_ptr() not in done:
            done.add(parameter.data_ptr())
            rows = min(len(parameter), len(before[name]))
            parameter.data[:rows] = before[name][:rows] + weight * (parameter.data[:rows] - before[name][:rows])
