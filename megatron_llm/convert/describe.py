"""What a folder of weights in any known format holds, as text."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.find import digest_problems, is_checkpoint, list_checkpoints, quick_check
from megatron_llm.checkpoint.hf_folder import CONFIG
from megatron_llm.checkpoint.manifest import OPTIMIZER, Manifest
from megatron_llm.convert.bin_folder import BinFolder
from megatron_llm.convert.compare import info_bytes
from megatron_llm.convert.open import open_source, recognise
from megatron_llm.convert.pickles import check_pickle
from megatron_llm.convert.raw_tensors import TensorFolder
from megatron_llm.convert.report import REPORT, sealed_files
from megatron_llm.convert.seals import SealCheck
from megatron_llm.convert.source import TensorInfo, WeightSource
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json
from megatron_llm.utils.progress import track


def describe(
    path: Path | str,
    *,
    optimizer: bool = False,
    state: bool = False,
    vocab_size: int | None = None,
    hf_config: Path | str | None = None,
) -> Iterator[str]:
    """Lines about a folder of weights in any format, or about a folder of our checkpoints; UserError for anything else.

    Of our own checkpoints the optimizer's tensors are listed with `optimizer`, the saved state with `state`. `vocab_size`
    and `hf_config` tell what a format does not record, as in `open_source`. Only headers are read.
    """
    path = Path(path)
    kind = recognise(path)
    if kind != "native" and (optimizer or state):
        raise UserError(f"{path} is in the {kind} format; optimizer and state are shown of native checkpoints only: leave those flags out")
    if kind == "native" and not is_checkpoint(path):
        yield from _root(path)
    elif kind == "native":
        yield from _checkpoint(path, quick_check(path), optimizer, state)
    elif kind == "hf":
        yield from _hf_folder(path)
    else:
        source = open_source(path, vocab_size=vocab_size, hf_config=hf_config, report=_silent)
        try:
            yield from _source(source)
        finally:
            source.close()


def verify_digests(path: Path | str) -> str:
    """Read every file that has a digest or checksums; a line saying that all are whole, or a UserError naming those that are not.

    Our checkpoints have SHA-256 digests in their manifest, folders that were converted in their report, files of
    `torch.save` CRC-32 checksums. UserError where there is nothing to compare with.
    """
    path = Path(path)
    kind = recognise(path)
    if kind == "native":
        manifest = quick_check(path)
        problems = digest_problems(path, manifest)
        if problems:
            raise UserError(f"{path} is damaged: {'; '.join(problems)}")
        return f"all {len(manifest.files)} files are as they were written"
    if (path / REPORT).is_file():
        seals = sealed_files(path)
        with SealCheck(path, seals, REPORT) as check:
            check.finish()
        return f"all {len(seals)} files are as they were written"
    pickled = sorted(file for pattern in ("*.pt", "*.bin") for file in path.rglob(pattern))
    if not pickled:
        raise UserError(f"{path} carries no digests: there is neither a manifest, nor {REPORT}, nor files of torch.save with checksums")
    for file in track(pickled, "checksums"):
        check_pickle(file)
    return f"the checksums of {len(pickled)} files are right"


def _silent(line: str) -> None:
    """The description says what was found."""


def _root(root: Path) -> Iterator[str]:
    yield f"{root}: native checkpoints, newest first"
    for candidate in list_checkpoints(root):
        manifest = candidate.manifest
        if manifest is None:
            yield f"  {candidate.path.name}: {candidate.problem}"
        else:
            loss = "" if manifest.validation_loss is None else f", validation loss {manifest.validation_loss:.4f}"
            size = sum(seal.size for seal in manifest.files.values())
            yield f"  {candidate.path.name}: saved {manifest.saved_at}, {size / 1e6:.1f} MB{loss}"


def _checkpoint(path: Path, manifest: Manifest, optimizer: bool, state: bool) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    weights = manifest.weights
    parameters = sum(math.prod(record.shape) for record in weights.values())
    moments = sum(key.startswith(OPTIMIZER) for key in manifest.tensors)
    yield f"{path}: native (megatron_llm checkpoint)"
    yield f"step {manifest.step}, saved {manifest.saved_at} by {versions}"
    yield f"family {manifest.family}, vocabulary {manifest.vocab_size}, tokenizer {manifest.tokenizer_fingerprint or 'unknown'}"
    size = sum(seal.size for seal in manifest.files.values())
    yield f"saved under {_sizes(manifest.layout)}; {len(manifest.files)} files, {size / 1e6:.1f} MB"
    if manifest.validation_loss is not None:
        yield f"validation loss {manifest.validation_loss}"
    yield f"{len(weights)} weights with {parameters:,} parameters, {moments} optimizer tensors"
    for key, record in manifest.tensors.items():
        if optimizer or not key.startswith(OPTIMIZER):
            chunks = "" if len(record.chunks) == 1 else f"  in {len(record.chunks)} pieces"
            yield f"  {key}  {list(record.shape)}  {record.dtype}{chunks}"
    if state:
        yield json.dumps(manifest.state, indent=2)


def _hf_folder(path: Path) -> Iterator[str]:
    """What is in the files, also where no family here reads it; that it cannot be converted is then one of the lines."""
    config: dict[str, Any] = read_json(path / CONFIG)
    pickled = not any(path.glob("*.safetensors"))
    folder: TensorFolder | BinFolder = BinFolder(path) if pickled else TensorFolder(path)
    architecture = (config.get("architectures") or ["unknown architecture"])[0]
    yield f"{path}: hf (Hugging Face folder, {architecture}, {'pytorch_model.bin' if pickled else 'safetensors'})"
    yield f"vocabulary {config.get('vocab_size')}, tied embeddings {config.get('tie_word_embeddings')}"
    try:
        source = open_source(path, report=_silent)
        yield f"family {source.config.model}, step unknown, tokenizer {source.tokenizer or 'none'}"
        source.close()
    except UserError as error:
        yield f"cannot be converted: {error}"
    elements = sum(math.prod(tensor.shape) for tensor in folder.tensors.values())
    yield f"{len(folder.tensors)} tensors with {elements:,} elements in {len(folder.files)} files"
    yield from _listed(folder.tensors)
    folder.close()


def _source(source: WeightSource) -> Iterator[str]:
    config = source.config
    yield f"{source.path}: {source.format}"
    step = "unknown" if source.step is None else source.step
    yield f"family {config.model}, vocabulary {config.vocab_size}, step {step}, tokenizer {source.tokenizer or 'none'}"
    yield f"saved under {_sizes(source.layout) or 'an unknown layout'}"
    parameters = sum(math.prod(info.shape) for info in source.tensors.values())
    size = sum(info_bytes(info) for info in source.tensors.values())
    yield f"{len(source.tensors)} weights with {parameters:,} parameters, {size / 1e6:.1f} MB"
    yield from _listed(source.tensors)


def _listed(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for key, info in tensors.items():
        yield f"  {key}  {list(info.shape)}  {str(info.dtype).removeprefix('torch.')}"


def _sizes(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in layout.items())
