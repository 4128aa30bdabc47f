"""Any source as a Hugging Face folder, streamed tensor by tensor: weights, configuration, tokenizer.

It needs no process group, no model and no more memory than one tensor. Families whose code is not part of transformers
get the layout that their published module files read; those files, and a tokenizer, are copied from a Hugging Face source.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_llm.checkpoint.contract import Contract, folder_tokenizers, rope_settings
from megatron_llm.checkpoint.exchange import attempt
from megatron_llm.checkpoint.hf_documents import model_documents, token_ids
from megatron_llm.checkpoint.hf_folder import CONFIG, GENERATION_CONFIG, INDEX, index_json, plan_shards, shard_names, tokenizer_files
from megatron_llm.checkpoint.tensor_file import FileSeal, TensorFileWriter, TensorSpec, dtype_name
from megatron_llm.convert.source import WeightSource
from megatron_llm.convert.vocabulary_tokens import open_tokenizer
from megatron_llm.data.chat_template import chat_template_hash, special_token_ids
from megatron_llm.models.registry import get_family
from megatron_llm.utils.atomic import write_json
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json
from megatron_llm.utils.progress import Progress

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class WrittenFolder:
    """What was written: seal and tensors of each file of weights, and the contract that was stamped."""

    seals: dict[str, FileSeal]
    plan: dict[str, list[TensorSpec]]
    contract: Contract


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or a plain number; UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size <= 0:
        raise UserError(f"a size such as 5GB or 200MB is needed, got {text!r}")
    return size


def natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def write_hf(source: WeightSource, folder: Path, *, max_shard_bytes: int, tokenizer: Path | None, progress: Progress) -> WrittenFolder:
    """Write `source`, its weights as they are, to an existing folder.

    `tokenizer` is the folder or file to copy, None for none; `progress` counts bytes. UserError when the tokenizer does not
    belong to the model, or for what reading the source meets.
    """
    dtype = _dtype(source)
    contract, ids = copy_tokenizer(source, folder, tokenizer, dtype)
    documents = model_documents(source.config, dtype_name(dtype), ids, contract)
    documents[GENERATION_CONFIG] = {**_generation_config(source), **documents[GENERATION_CONFIG]}
    for name, content in documents.items():
        write_json(folder / name, content)
    _copy_modules(source, folder, documents[CONFIG])
    buffers = get_family(source.config.model).buffers(source.config)
    keys = sorted(source.tensors, key=natural)
    specs = [TensorSpec(key, source.tensors[key].dtype, source.tensors[key].shape) for key in keys]
    specs += [TensorSpec(key, dtype, tuple(tensor.shape)) for key, tensor in buffers.items()]
    shards = plan_shards(specs, max_shard_bytes)
    plan = dict(zip(shard_names(len(shards)), shards, strict=True))
    seals = {name: _write_shard(source, buffers, folder / name, contents, progress) for name, contents in plan.items()}
    if len(plan) > 1:
        write_json(folder / INDEX, index_json(plan))
    return WrittenFolder(seals, plan, contract)


def copy_tokenizer(source: WeightSource, folder: Path, tokenizer: Path | None, dtype: torch.dtype) -> tuple[Contract, dict[str, Any]]:
    """Copy the tokenizer's files; the contract to stamp, and the ids of special tokens that config.json names.

    A source in the Hugging Face form tells the ids itself (a model may end in several ways), unless it gets another tokenizer.
    """
    files = tokenizer_files(tokenizer) if tokenizer is not None else []
    for file in files:
        shutil.copyfile(file, folder / file.name)
    found, error = attempt(lambda: (_contract(source, folder if files else None, dtype), token_ids(folder, source.config)))
    if found is None:
        raise UserError(f"the tokenizer of {source.path} ({tokenizer}) cannot be used: {error}; name another with --tokenizer") from error
    contract, ids = found
    hf_config = getattr(source, "hf_config", None)
    if hf_config is not None and tokenizer in (None, source.tokenizer):
        return contract, {name: hf_config.get(name) for name in ids}
    return contract, dict(ids)


def _contract(source: WeightSource, tokenizer: Path | None, dtype: torch.dtype) -> Contract:
    """What data and weights must agree on, as far as `tokenizer`, the folder with its files, tells. UserError when it is too large."""
    config = source.config
    known = Contract(dtype=dtype_name(dtype), vocab_size=config.vocab_size, rope=rope_settings(config))
    if tokenizer is None:
        return known
    opened = open_tokenizer(tokenizer)
    assert config.vocab_size is not None, "the model configuration must be resolved"
    if opened.vocab_size > config.vocab_size:
        raise UserError(f"it has {opened.vocab_size} entries, the model {config.vocab_size}: they do not belong together")
    special = special_token_ids(tokenizer)
    return replace(
        known,
        tokenizers=folder_tokenizers(tokenizer),
        eod=[] if opened.eod_id is None else [opened.eod_id],
        bos=special["bos"],
        eos=[] if special["eos"] is None else [special["eos"]],
        chat_template=chat_template_hash(tokenizer),
    )


def _generation_config(source: WeightSource) -> dict[str, Any]:
    """What a source in the Hugging Face form says about generation, {} for others."""
    path = source.path / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def _dtype(source: WeightSource) -> torch.dtype:
    dtypes = {info.dtype for info in source.tensors.values()}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        raise UserError(f"the weights in {source.path} are of several types ({names}): choose one with --dtype")
    return dtypes.pop()


def _copy_modules(source: WeightSource, folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Module files of a published architecture: the user's own, copied from where the weights came from."""
    if "auto_map" in hf_config:
        for file in sorted(source.path.glob("*.py")):
            shutil.copyfile(file, folder / file.name)


def _write_shard(
    source: WeightSource, buffers: Mapping[str, torch.Tensor], path: Path, contents: Sequence[TensorSpec], progress: Progress
) -> FileSeal:
    """Write one file of weights, one tensor in memory at a time."""
    with TensorFileWriter(path, contents, {"format": "pt"}) as writer:
        for spec in contents:
            writer.write(spec.name, buffers[spec.name].to(spec.dtype) if spec.name in buffers else source.read(spec.name))
            progress.advance(spec.size)
        return writer.close()
