"""Any source as a checkpoint of ours: a folder of checkpoints with one step, weights only, that `--load` of a training takes.

The step folder has the Hugging Face form, so it is written as an export is, and sealed with a manifest.
"""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_llm import __version__
from megatron_llm.checkpoint.hf_folder import is_model_file
from megatron_llm.checkpoint.manifest import LATEST, Chunk, Manifest, TensorRecord, step_name, write_manifest
from megatron_llm.checkpoint.tensor_file import FileSeal, dtype_name, seal_file
from megatron_llm.config.schema import RunConfig
from megatron_llm.config.serialize import to_dict
from megatron_llm.convert.source import WeightSource
from megatron_llm.convert.to_hf import WrittenFolder, write_hf
from megatron_llm.models.registry import get_family
from megatron_llm.utils.progress import Progress


def write_native(
    source: WeightSource, root: Path, *, max_shard_bytes: int, tokenizer: Path | None, progress: Progress
) -> dict[str, FileSeal]:
    """Write `source`, its weights as they are, as the one step of `root`, an existing empty folder; returns the files' seals.

    The step is the source's, 0 where it has none. Parameters and errors are those of `write_hf`.
    """
    step = source.step or 0
    folder = root / step_name(step)
    folder.mkdir()
    written = write_hf(source, folder, max_shard_bytes=max_shard_bytes, tokenizer=tokenizer, progress=progress)
    files = {path.name: written.seals.get(path.name) or seal_file(path) for path in sorted(folder.iterdir())}
    write_manifest(folder, _manifest(source, step, written, files))
    (root / LATEST).write_text(f"{folder.name}\n", encoding="ascii")
    return {f"{folder.name}/{name}": seal for name, seal in files.items()}


def _manifest(source: WeightSource, step: int, written: WrittenFolder, files: dict[str, FileSeal]) -> Manifest:
    buffers = get_family(source.config.model).buffers(source.config)
    tensors = {
        spec.name: TensorRecord(dtype_name(spec.dtype), spec.shape, (Chunk(name, spec.name, (0,) * len(spec.shape), spec.shape),))
        for name, specs in written.plan.items()
        for spec in specs
        if is_model_file(name) and spec.name not in buffers
    }
    return Manifest(
        step=step,
        sequence=1,
        tensors=tensors,
        files=files,
        state=_state(source, step, written),
        layout={"tp": 1, "dp": 1, "pp": 1},
        family=source.config.model,
        vocab_size=source.config.vocab_size,
        tokenizer_fingerprint=_fingerprint(written),
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"megatron_llm": __version__, "torch": torch.__version__},
        contract=written.contract.to_json(),
    )


def _state(source: WeightSource, step: int, written: WrittenFolder) -> dict[str, Any]:
    """The position of a run that begins here: nothing consumed, no optimizer, the model's configuration."""
    run = RunConfig()
    dtype = written.contract.dtype
    train = replace(run.train, bf16=dtype == "bfloat16", fp16=dtype == "float16")
    return {
        "config": to_dict(replace(run, model=source.config, train=train)),
        "step": step,
        "consumed_samples": 0,
        "best_validation_loss": None,
        "data_order": None,
        "optimizer": {},
        "callbacks": {},
        "tokenizer_fingerprint": _fingerprint(written),
    }


def _fingerprint(written: WrittenFolder) -> str | None:
    fingerprints = written.contract.tokenizers
    return fingerprints.get("HuggingFaceTokenizer") or next(iter(fingerprints.values()), None)
