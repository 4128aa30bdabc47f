"""What a checkpoint or a Hugging Face folder holds, as text."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.find import digest_problems, is_checkpoint, list_checkpoints, quick_check
from megatron_llm.checkpoint.manifest import MANIFEST, OPTIMIZER, Manifest, parse_step
from megatron_llm.convert.hf_folder import CONFIG, is_hf_folder, list_tensors
from megatron_llm.utils.errors import UserError


def describe(path: Path | str, *, optimizer: bool = False, state: bool = False) -> Iterator[str]:
    """Lines about a checkpoint of ours, a folder of them, or a folder of transformers; UserError for anything else.

    Optimizer tensors are listed one by one with `optimizer`, the saved state with `state`. Digests are not verified.
    """
    path = Path(path)
    if is_checkpoint(path):
        yield from _checkpoint(path, quick_check(path), optimizer, state)
    elif path.is_dir() and any(parse_step(child.name) for child in path.iterdir()):
        yield from _root(path)
    elif path.is_dir() and is_hf_folder(path):
        yield from _hf_folder(path)
    else:
        raise UserError(f"{path} is neither a checkpoint ({MANIFEST}), nor a folder of checkpoints, nor a Hugging Face folder ({CONFIG})")


def verify_digests(path: Path | str) -> str:
    """Read every file of one checkpoint; a line saying that all are whole, or a UserError naming those that are not."""
    path = Path(path)
    manifest = quick_check(path)
    problems = digest_problems(path, manifest)
    if problems:
        raise UserError(f"{path} is damaged: {'; '.join(problems)}")
    return f"all {len(manifest.files)} files are as they were written"


def _root(root: Path) -> Iterator[str]:
    yield f"{root}: checkpoints, newest first"
    for candidate in list_checkpoints(root):
        manifest = candidate.manifest
        if manifest is None:
            yield f"  {candidate.path.name}: {candidate.problem}"
        else:
            loss = "" if manifest.validation_loss is None else f", validation loss {manifest.validation_loss:.4f}"
            size = sum(seal.size for seal in manifest.files.values())
            yield f"  {candidate.path.name}: saved {manifest.saved_at}, {size / 1e6:.1f} MB{loss}"


def _checkpoint(path: Path, manifest: Manifest, optimizer: bool, state: bool) -> Iterator[str]:
    layout = ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    weights = manifest.weights
    parameters = sum(math.prod(record.shape) for record in weights.values())
    moments = len(manifest.tensors) - len(weights)
    yield f"{path}: megatron_llm checkpoint"
    yield f"step {manifest.step}, saved {manifest.saved_at} by {versions}"
    yield f"family {manifest.family}, vocabulary {manifest.vocab_size}, tokenizer {manifest.tokenizer_fingerprint or 'unknown'}"
    yield f"saved under {layout}; {len(manifest.files)} files, {sum(seal.size for seal in manifest.files.values()) / 1e6:.1f} MB"
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
    config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    tensors = list_tensors(path)
    architecture = (config.get("architectures") or ["unknown architecture"])[0]
    yield f"{path}: Hugging Face folder, {architecture}"
    yield f"vocabulary {config.get('vocab_size')}, tied embeddings {config.get('tie_word_embeddings')}"
    files = len({tensor.file for tensor in tensors.values()})
    yield f"{len(tensors)} tensors with {sum(math.prod(tensor.shape) for tensor in tensors.values()):,} elements in {files} files"
    for key, tensor in tensors.items():
        yield f"  {key}  {list(tensor.shape)}  {tensor.dtype}"
