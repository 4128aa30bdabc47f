"""A Hugging Face folder as a source of weights: safetensors, or `pytorch_model.bin` read without running its pickles.

Keys are those of the family's published class. Some hubs leave out the model's prefix (GPT-2's and Bloom's `transformer.`),
some files carry buffers and a copy of a tied output layer: the prefix is added, known buffers are passed over, the copy is
compared with the embedding.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_llm.checkpoint.hf_folder import CONFIG
from megatron_llm.checkpoint.tensor_file import FileSeal
from megatron_llm.config.schema import ModelConfig
from megatron_llm.convert.raw_tensors import TensorFolder
from megatron_llm.convert.report import REPORT, sealed_files
from megatron_llm.convert.seals import SealCheck
from megatron_llm.convert.source import TensorInfo, WeightSource
from megatron_llm.models.layout import hf_shapes
from megatron_llm.models.registry import get_family, model_config_from_hf
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.bias|attn\.masked_bias|"
    r"attention\.bias|attention\.masked_bias|attention\.rotary_emb\.inv_freq|alibi_mask|future_mask)"
)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_BLOCK = 64 * 1024 * 1024
_SHOWN = 5


class Tensors(Protocol):
    """Weights of a folder under the names its files give them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        ...

    def read_rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


class HfSource:
    """A `WeightSource` over a Hugging Face folder. `hf_config` is its `config.json`.

    UserError when the configuration, an index, a header, a key, a shape or a type is not what the family's class has.
    """

    format = "hf"
    step: int | None = None

    def __init__(self, path: Path, hf_config: dict[str, Any] | None = None) -> None:
        self.path = path
        self.hf_config = read_json(path / CONFIG) if hf_config is None else hf_config
        self.seals: dict[str, FileSeal] = sealed_files(path) if (path / REPORT).is_file() else {}
        self.config: ModelConfig = read_config(path, self.hf_config)
        self.layout: Mapping[str, int] = {}
        self.tokenizer: Path | None = path if any((path / name).is_file() for name in _TOKENIZER) else None
        self._stored = _open_tensors(path)
        self._names = match_names(path, self._stored.tensors, self.config)
        self.tensors: Mapping[str, TensorInfo] = {key: self._stored.tensors[name] for key, name in self._names.items()}
        check_weights(self)

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU, in its saved type. UserError when the file is damaged."""
        return self._stored.read(self._names[key])

    def read_rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor."""
        return self._stored.read_rows(self._names[key], first, last)

    def seal_check(self) -> SealCheck:
        """The files that a conversion report vouches for, to be compared with it."""
        return SealCheck(self.path, self.seals, REPORT)

    def close(self) -> None:
        """Release files."""
        self._stored.close()


def read_config(path: Path, hf_config: dict[str, Any]) -> ModelConfig:
    """The resolved configuration of a `config.json`; the UserError names the folder and what the file says."""
    if "quantization_config" in hf_config:
        raise UserError(f"{path} holds quantised weights, which are not converted: take the folder they were made from")
    try:
        config = model_config_from_hf(hf_config)
        for field in fields(config):
            _check_number(path, field.name, getattr(config, field.name))
        hf_shapes(config)
    except UserError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except Exception as error:
        # Whatever a damaged file makes of the arithmetic on its values.
        raise UserError(f"{path / CONFIG} does not describe a model: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return config


def check_weights(source: WeightSource) -> None:
    """The source has every weight of its model in its shape and in floating point, and no other; UserError otherwise."""
    expected, found = hf_shapes(source.config), source.tensors
    problems = _listed("missing", sorted(expected.keys() - found.keys())) + _listed("unused", sorted(found.keys() - expected.keys()))
    shared = [key for key in expected if key in found]
    problems += _listed(
        "of the wrong shape",
        [f"{key} {list(found[key].shape)} instead of {list(expected[key])}" for key in shared if found[key].shape != expected[key]],
    )
    if problems:
        raise UserError(f"the weights in {source.path} are not those of its {source.config.model} model: {'; '.join(problems)}")
    odd = [f"{key} ({found[key].dtype})" for key in shared if found[key].dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if odd:
        raise UserError(
            f"{source.path} has weights of types that are not converted: {', '.join(odd[:_SHOWN])}; expected float32, bfloat16 or float16"
        )


def _check_number(path: Path, name: str, value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value < 2**31:
        raise UserError(f"{CONFIG} gives {name} as {value}")


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{what}: {', '.join(items[:_SHOWN])}{more}"]


def _open_tensors(path: Path) -> Tensors:
    if any(path.glob("*.safetensors")):
        return TensorFolder(path)
    from megatron_llm.convert.bin_folder import BinFolder

    return BinFolder(path)


def match_names(path: Path, stored: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, str]:
    """Key of the published class to name in the files, in the order of the layers; tied copies and buffers left out."""
    expected = hf_shapes(config)
    head = get_family(config.model).table.rule_for("head.weight")[0].tensors[0].key
    prefixes = sorted({key.split(".")[0] + "." for key in expected} - {head.split(".")[0] + "."})
    buffers = get_family(config.model).buffers(config).keys()
    found: dict[str, str] = {}
    for name in stored:
        key = next((key for key in (name, *(prefix + name for prefix in prefixes)) if key in expected), name)
        if key not in expected and (_BUFFERS.fullmatch(name) or name in buffers or (config.tie_word_embeddings and name == head)):
            continue
        if key in found:
            raise UserError(f"{path} has {key} twice, as {found[key]} and as {name}")
        found[key] = name
    order = {key: number for number, key in enumerate(expected)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def check_tied_copy(source: "HfSource") -> None:
    """A stored output layer of a tied model equals the embedding; UserError otherwise (the folder says two things)."""
    table = get_family(source.config.model).table
    head, embedding = (table.rule_for(f"{name}.weight")[0].tensors[0].key for name in ("head", "embedding.word"))
    stored = source._stored.tensors.get(head)
    if not source.config.tie_word_embeddings or stored is None:
        return
    info = source.tensors[embedding]
    step = max(1, _BLOCK // max(1, info.shape[1] * info.dtype.itemsize))
    blocks = ((at, min(at + step, info.shape[0])) for at in range(0, info.shape[0], step))
    same = stored == info and all(
        torch.equal(source._stored.read_rows(head, *block), source.read_rows(embedding, *block)) for block in blocks
    )
    if not same:
        raise UserError(
            f"{source.path} has tie_word_embeddings true in {CONFIG} but another matrix in {head} than in {embedding}: "
            "set tie_word_embeddings to what the model is"
        )
