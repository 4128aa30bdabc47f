"""A checkpoint as a Hugging Face folder, streamed tensor by tensor, and proven before it gets its name.

Checkpoints have Hugging Face keys and true shapes already, so a conversion only joins rectangles: it needs no process
group, no model and no more memory than one tensor. Only the proof at the end builds the model.

The folder appears under the asked name when the proof passed. Otherwise what was written is kept beside it as
`<name>.rejected`, and what was there before stays.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megatron_llm import __version__
from megatron_llm.checkpoint.exchange import attempt
from megatron_llm.checkpoint.find import find_latest
from megatron_llm.checkpoint.load import CheckpointReader
from megatron_llm.checkpoint.manifest import TOKENIZER, Manifest
from megatron_llm.checkpoint.model_state import MAIN
from megatron_llm.checkpoint.tensor_file import FileSeal, TensorFileWriter, TensorSpec, dtype_from_name, dtype_name
from megatron_llm.checkpoint.whole_model import read_model_config
from megatron_llm.config.schema import ModelConfig
from megatron_llm.convert.hf_folder import CONFIG, GENERATION_CONFIG, INDEX, index_json, plan_shards, shard_names
from megatron_llm.convert.verify import TOLERANCE, Comparison, verify_export
from megatron_llm.data.tokenizers import HuggingFaceTokenizer
from megatron_llm.models.registry import get_family
from megatron_llm.utils.atomic import atomic_folder, write_json
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.progress import Progress

REPORT = "conversion_report.json"
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExportOptions:
    """`dtype` of the exported weights (None: as saved), `max_shard_bytes` a file, whether to prove the result, and
    whether a folder that holds something else than an earlier export may be replaced."""

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    verify: bool = True
    overwrite: bool = False
    tolerance: float = TOLERANCE


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or a plain number; UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size <= 0:
        raise UserError(f"a size such as 5GB or 200MB is needed, got {text!r}")
    return size


def export_to_hf(load: Path | str, save: Path | str, options: ExportOptions, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Convert the checkpoint `load` (or the newest complete one under it) to the folder `save`; returns the report.

    UserError when there is no complete checkpoint, when `save` may not be replaced, when weights do not fit `dtype`, or
    when the proof fails or cannot run.
    """
    save = Path(save)
    path = find_latest(load, report)
    if path is None:
        raise UserError(f"no complete checkpoint in {load}: give --load a checkpoint or a folder of checkpoints")
    _check_target(save, path, options.overwrite)
    rejected = save.with_name(f"{save.name}.rejected")
    with CheckpointReader(path) as reader, atomic_folder(save) as folder:
        result, failure = _convert(reader, folder, options)
        if failure is not None:
            shutil.rmtree(rejected, ignore_errors=True)
            os.rename(folder, rejected)
            raise UserError(f"{failure}; what was written is kept in {rejected}, {save} is as it was")
    report(_summary(save, result))
    return result


def _check_target(save: Path, checkpoint: Path, overwrite: bool) -> None:
    if save.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise UserError(f"--save {save} holds the checkpoint itself: export to another folder")
    if save.exists() and not save.is_dir():
        raise UserError(f"--save {save} is a file: give the name of a folder")
    if save.is_dir() and any(save.iterdir()) and not (save / REPORT).exists() and not overwrite:
        raise UserError(f"{save} is not empty and not an earlier export: choose another folder, or replace all of it with --overwrite")


def _convert(reader: CheckpointReader, folder: Path, options: ExportOptions) -> tuple[dict[str, Any], str | None]:
    """Write and prove the folder; the report, and why it must be rejected (None when it must not)."""
    manifest, config = reader.manifest, read_model_config(reader.path)
    family = get_family(config.model)
    dtype = dtype_from_name(options.dtype or _saved_dtype(manifest))
    specs = [TensorSpec(key, dtype, manifest.weights[key].shape) for key in sorted(manifest.weights, key=_natural)]
    vocabulary = _copy_tokenizer(reader.path, folder, config)
    hf_config = {**family.hf_config(config), "dtype": dtype_name(dtype), **vocabulary}
    _check_keys(specs, hf_config)
    write_json(folder / CONFIG, hf_config | {"transformers_version": _transformers_version()})
    write_json(folder / GENERATION_CONFIG, vocabulary | {"transformers_version": _transformers_version()})
    seals = _write_weights(reader, folder, specs, options.max_shard_bytes)
    failure, comparison = None, None
    if options.verify:
        try:
            comparison = verify_export(folder, reader.path, dtype, options.tolerance)
        except UserError as error:
            failure = f"the export could not be verified: {error}"
        if comparison is not None and not comparison.passed:
            failure = f"the export does not compute what the checkpoint does: {_differences(comparison)}"
    result = _report(reader, config, dtype, specs, seals, comparison)
    write_json(folder / REPORT, {**result, "failure": failure})
    return result, failure


def _saved_dtype(manifest: Manifest) -> str:
    dtypes = sorted({record.dtype for record in manifest.weights.values()})
    if len(dtypes) != 1:
        raise UserError(f"the checkpoint's weights are of several types ({', '.join(dtypes) or 'it has none'}): choose one with --dtype")
    return dtypes[0]


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _copy_tokenizer(checkpoint: Path, folder: Path, config: ModelConfig) -> dict[str, int | None]:
    """Copy the tokenizer's files; the ids of its end token, which config and generation config both name.

    They are written even when unknown: otherwise transformers assumes those of the family's first model.
    """
    source = checkpoint / TOKENIZER
    end = None
    if source.is_dir():
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, folder / file.name)
        tokenizer = HuggingFaceTokenizer(folder)
        assert config.vocab_size is not None
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer saved with {checkpoint} has {tokenizer.vocab_size} entries, the model {config.vocab_size}: "
                "they do not belong together"
            )
        end = tokenizer.eod_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def _check_keys(specs: Sequence[TensorSpec], hf_config: dict[str, Any]) -> None:
    """Every key that transformers expects is there, in its shape, and no other; the model is built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model, error = attempt(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config)))
    if model is None:
        raise UserError(f"transformers refuses the model's configuration: {error}") from error
    expected = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    found = {spec.name: spec.shape for spec in specs}
    wrong = [
        f"{key} has shape {found.get(key, 'none')} in the checkpoint and {expected.get(key, 'none')} in transformers"
        for key in sorted(expected.keys() | found.keys(), key=_natural)
        if expected.get(key) != found.get(key)
    ]
    if wrong:
        raise UserError(f"the checkpoint's weights are not those of {hf_config['architectures'][0]}: {'; '.join(wrong[:5])}")


def _write_weights(reader: CheckpointReader, folder: Path, specs: Sequence[TensorSpec], limit: int) -> dict[str, FileSeal]:
    """Write the weights, one tensor in memory at a time; returns the seal of each file."""
    shards = plan_shards(specs, limit)
    plan = dict(zip(shard_names(len(shards)), shards, strict=True))
    seals: dict[str, FileSeal] = {}
    with Progress("exporting", sum(spec.size for spec in specs), unit="B") as progress:
        for name, contents in plan.items():
            with TensorFileWriter(folder / name, contents, {"format": "pt"}) as writer:
                for spec in contents:
                    writer.write(spec.name, _weight(reader, spec))
                    progress.advance(spec.size)
                seals[name] = writer.close()
    if len(plan) > 1:
        write_json(folder / INDEX, index_json(plan))
    return seals


def _weight(reader: CheckpointReader, spec: TensorSpec) -> Tensor:
    """A weight in the exported dtype, from the fp32 main copy where that is closer than the 16-bit weight."""
    tensors = reader.manifest.tensors
    changes = tensors[spec.name].dtype != dtype_name(spec.dtype)
    source = reader.read(MAIN + spec.name if changes and MAIN + spec.name in tensors else spec.name)
    weight = source.to(spec.dtype)
    if changes and weight.numel() and not _finite(weight) and _finite(source):
        raise UserError(
            f"{spec.name} has values up to {source.abs().max().item():g}, too large for --dtype {dtype_name(spec.dtype)}: use bfloat16"
        )
    return weight


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, without a temporary of the tensor's size."""
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _report(
    reader: CheckpointReader,
    config: ModelConfig,
    dtype: torch.dtype,
    specs: Sequence[TensorSpec],
    seals: dict[str, FileSeal],
    comparison: Comparison | None,
) -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "checkpoint": {"folder": reader.path.name, "step": manifest.step, "layout": dict(manifest.layout), "family": config.model},
        "vocab_size": config.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "dtype": dtype_name(dtype),
        "keys": {"in_checkpoint": len(manifest.weights), "written": len({spec.name for spec in specs})},
        "parameters": sum(spec.size // spec.dtype.itemsize for spec in specs),
        "files": {name: asdict(seal) for name, seal in seals.items()},
        "verified": comparison is not None and comparison.passed,
        "comparison": None if comparison is None else asdict(comparison),
        "versions": {
            "megatron_llm": __version__,
            "torch": torch.__version__,
            "transformers": _transformers_version(),
            "safetensors": safetensors.__version__,
        },
    }


def _differences(comparison: Comparison) -> str:
    if comparison.shapes[0] != comparison.shapes[1]:
        return f"logits have shape {list(comparison.shapes[1])}, expected {list(comparison.shapes[0])}"
    return (
        f"largest logit difference {comparison.largest_difference:.3g} (tolerance {comparison.tolerance:.3g}), "
        f"KL divergence {comparison.kl:.3g}"
    )


def _summary(save: Path, result: dict[str, Any]) -> str:
    size = sum(seal["size"] for seal in result["files"].values())
    text = (
        f"exported {result['keys']['written']} tensors, {size / 1e6:.1f} MB, {result['dtype']}, vocabulary {result['vocab_size']} to {save}"
    )
    if result["comparison"] is None:
        return f"{text}; not verified"
    return f"{text}; verified with transformers {result['versions']['transformers']}: {_differences(Comparison(**result['comparison']))}"
