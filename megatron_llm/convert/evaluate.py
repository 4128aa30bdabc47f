"""Logits of weights in each format, by whatever is independent of the conversion: the judges of a conversion.

Hugging Face weights are run by transformers, or by the plain forward pass of a published architecture that it does not
have; weights in Megatron's formats by a plain forward pass over Megatron's names; weights of ours by our own model. The two
sides of a comparison are two of these, so that a wrong entry in a table shows on one side only.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.exchange import attempt
from megatron_llm.checkpoint.streamed import meta_parameters, stream_weights
from megatron_llm.config.schema import ModelConfig
from megatron_llm.convert.checked import RoundedWeights
from megatron_llm.convert.raw_tensors import TensorFolder
from megatron_llm.convert.source import WeightSource
from megatron_llm.convert.verify import Judge
from megatron_llm.kernels.dispatch import torch_kernels
from megatron_llm.models.causal_lm import ModelChunk, ModelOptions
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.parallel.placement import get_placement
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

_OPENED_WHOLE = 50_000_000  # parameters; up to this size transformers' own loader opens a folder
_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def judge_source(source: WeightSource, dtype: torch.dtype | None) -> Judge:
    """The judge of what is being converted, its weights rounded to `dtype` (None: as they are)."""
    stored = getattr(source, "core", None)
    if stored is not None:
        return _megatron_judge(source.config, stored, dtype, "the source")
    weights = RoundedWeights(source, dtype)
    if source.format == "native" or source.config.rope_scaling_type == "clex":
        return Judge("megatron_llm on the source", lambda ids: our_logits(source.config, weights, ids))
    # Without ids of special tokens transformers assumes those of the family's first model, which a small vocabulary lacks.
    hf_config = getattr(source, "hf_config", None) or get_family(source.config.model).hf_config(source.config) | _NO_TOKENS
    return _hf_judge(hf_config, weights, "the source")


def judge_hf_folder(folder: Path, config: ModelConfig) -> Judge:
    """The judge of a Hugging Face folder: transformers opens it itself where the model is small enough."""
    hf_config, stored = read_json(folder / "config.json"), TensorFolder(folder)
    weights = RoundedWeights(stored, None)
    if config.rope_scaling_type == "clex":  # transformers has no such positions
        return Judge("megatron_llm on the folder", lambda ids: our_logits(config, weights, ids))
    if _plain_reference(hf_config) is None and sum(math.prod(info.shape) for info in weights.tensors.values()) <= _OPENED_WHOLE:
        return Judge(f"transformers {_version()}, from_pretrained on the folder", lambda ids: _opened(folder)(ids).logits.float())
    return _hf_judge(hf_config, weights, "the folder")


def judge_megatron_folder(folder: Path, config: ModelConfig) -> Judge:
    """The judge of a folder in one of Megatron's formats, opened anew."""
    from megatron_llm.convert.open import open_source

    source: Any = open_source(folder, vocab_size=config.vocab_size, report=lambda line: None)
    return _megatron_judge(source.config, source.core, None, "what was written")


def _megatron_judge(config: ModelConfig, stored: Any, dtype: torch.dtype | None, where: str) -> Judge:
    from megatron_llm.convert.megatron.reference import logits

    weights = RoundedWeights(stored, dtype)
    return Judge(
        f"plain Megatron forward pass on {where}",
        lambda ids: logits(stored.args, weights.read, ids)[..., : config.vocab_size],
    )


def our_logits(config: ModelConfig, weights: RoundedWeights, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of our model, fp32, its weights read by Hugging Face key through the family's table."""
    family, groups = get_family(config.model), single_process_groups()
    table = family.table
    meta = replace(groups, device=torch.device("meta"))
    options, layers = ModelOptions(seed=0), range(config.num_layers)
    # Tables of positions are no weights: they have to be real.
    model = ModelChunk(family, config, meta, torch_kernels(), options, layers, positions_device=groups.device)
    rectangles = {name: table.rectangles(get_placement(parameter)) for name, parameter in model.named_parameters()}

    def fill(name: str, first: int, last: int, target: Tensor) -> None:
        cached: tuple[str, Tensor] | None = None
        for rectangle in rectangles[name]:
            low, high = max(first, rectangle.local_start), min(last, rectangle.local_start + rectangle.rows)
            if low >= high:
                continue
            start, rows = low - rectangle.local_start, high - low
            place = target[low - first : high - first]
            if rectangle.transposed:
                columns = slice(rectangle.global_start[1] + start, rectangle.global_start[1] + start + rows)
                place.copy_(weights.read(rectangle.key)[:, columns].t())
            elif rows < rectangle.rows:
                begin = rectangle.global_start[0] + start
                place.copy_(weights.read_rows(rectangle.key, begin, begin + rows))
            else:
                if cached is None or cached[0] != rectangle.key:
                    cached = (rectangle.key, weights.read(rectangle.key))
                place.copy_(cached[1][rectangle.global_start[0] :][:rows])

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        stream_weights(model.eval(), fill)
        return model.logits(ids)


def transformers_logits(hf_config: Mapping[str, Any], weights: RoundedWeights, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of the class of transformers that `hf_config` names, layer by layer, fp32.

    UserError when transformers cannot build it, or when its parameters are not the weights' keys.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoConfig
    settings = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype", "auto_map", "transformers_version")}

    def build() -> Any:
        config = loader.for_model(**settings)
        with meta_parameters():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    model, error = attempt(build)
    if model is None:
        raise UserError(f"transformers refuses the model's configuration: {type(error).__name__}: {error}") from error
    stored = {name: _stored_key(name, weights.tensors) for name, _ in model.named_parameters()}
    expected = {stored[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {key: tuple(info.shape) for key, info in weights.tensors.items()}
    wrong = [
        f"{key} has shape {found.get(key, 'none')} here and {expected.get(key, 'none')} in transformers"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if wrong:
        raise UserError(f"the weights are not those of {type(model).__name__}: {'; '.join(wrong[:5])}")

    def fill(name: str, first: int, last: int, target: Tensor) -> None:
        key = stored[name]
        whole = (first, last) == (0, expected[key][0])
        target.copy_(weights.read(key) if whole else weights.read_rows(key, first, last))

    with torch.no_grad():
        stream_weights(model.eval(), fill)
        logits: Tensor = model(ids, use_cache=False).logits
    return logits.float()


def _stored_key(name: str, stored: Mapping[str, Any]) -> str:
    """The key of a parameter in a published folder: transformers 5 loads GPT-NeoX's `embed_out` under another name."""
    published = name.replace("lm_head.", "embed_out.")
    return published if name not in stored and published in stored else name


def _hf_judge(hf_config: Mapping[str, Any], weights: RoundedWeights, where: str) -> Judge:
    reference = _plain_reference(hf_config)
    if reference is not None:
        name = f"plain {hf_config['model_type']} forward pass on {where}"
        return Judge(name, lambda ids: reference(dict(hf_config), lambda key: weights.read(key).float(), ids))
    name = f"transformers {_version()}, layer by layer on {where}"
    return Judge(name, lambda ids: transformers_logits(hf_config, weights, ids))


def _plain_reference(hf_config: Mapping[str, Any]) -> Any:
    from megatron_llm.convert.references import reference_for

    return reference_for(dict(hf_config))


def _opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    opened, error = attempt(lambda: loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True))
    if error is not None or opened is None:
        raise UserError(f"transformers cannot open the folder: {type(error).__name__}: {error}") from error
    model, info = opened
    problems = [
        f"{kind} {sorted(map(str, info[kind]))[:5]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    ]
    if problems:
        raise UserError(f"transformers does not use the folder as it is: {'; '.join(problems)}")
    return model.eval()


def _version() -> str:
    import transformers

    return str(transformers.__version__)
