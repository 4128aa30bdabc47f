"""The manifest: one JSON file that says everything about a checkpoint, and the folder names around it.

    <root>/step_0000100/            a complete checkpoint: it has this name only once everything in it is on the disk
        manifest.json               this file
        manifest.sha256             its digest, as `sha256sum -c` reads it
        rank_00000.safetensors ...  the rectangles each rank owned
        tokenizer/                  a copy of the tokenizer, when there was one
    <root>/step_0000150/            the same in the Hugging Face form
        config.json, tokenizer.json, model-00001-of-0000N.safetensors, ...   what transformers reads
        optimizer/rank_00000.safetensors ...                                 what only a training needs
        manifest.json, manifest.sha256
    <root>/step_0000200.tmp/        a save under way, or one that was killed
    <root>/step_0000100.replaced/   the former step 100 while a new one takes its place
    <root>/step_0000050.deleted/    being removed
    <root>/latest                   the name of the newest complete checkpoint, for people and scripts

The manifest is plain JSON and tensors are safetensors: nothing in a checkpoint can execute code when it is loaded.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.entries import tiling_problem
from megatron_llm.checkpoint.tensor_file import FileSeal, dtype_from_name
from megatron_llm.utils.errors import UserError

FORMAT = "megatron_llm checkpoint"
VERSION = 2  # since then files are sealed piece by piece
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
LATEST = "latest"
TOKENIZER = "tokenizer"
OPTIMIZER = "optimizer."
OPTIMIZER_FOLDER = "optimizer"
# What some formats keep beside the weights: masks and tables that every loader computes.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")
TEMPORARY = ".tmp"
REPLACED = ".replaced"
DELETED = ".deleted"


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be trusted. `reason` says why, the text also which one."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder} is damaged: {reason}")
        self.reason = reason


class DamagedContents(DamagedCheckpoint):
    """The same, found while tensors were read, and raised on every rank alike."""


def is_buffer(key: str) -> bool:
    """Whether a tensor of a Hugging Face file is a buffer that loaders compute themselves, and no weight."""
    return _BUFFERS.search(key) is not None


def step_name(step: int) -> str:
    """Folder name of a step: `step_0000100`."""
    return f"step_{step:07d}"


def parse_step(name: str) -> tuple[int, str] | None:
    """Step and suffix ('', '.tmp', '.replaced', '.deleted') of a checkpoint folder's name; None for other names."""
    found = re.fullmatch(r"step_(\d+)(?:\.tmp|\.replaced)?(\.deleted)|step_(\d+)(\.tmp|\.replaced)?", name)
    return (int(found[1] or found[3]), found[2] or found[4] or "") if found else None


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a global tensor: the tensor `name` in `file` holds `shape` elements from `start` on."""

    file: str
    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """A global tensor: dtype name, true shape, and the chunks that cover it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `sequence` counts saves into one root: the highest is the newest, whatever its step.

    `state` is the caller's plain JSON (config, samples consumed, scheduler, loss scaler, counters). `family`,
    `vocab_size` and `tokenizer_fingerprint` identify the model; `layout` is for information, loading does not need it.
    `contract` is what data and weights must agree on (`contract.Contract` as JSON; empty in older checkpoints).
    """

    step: int
    sequence: int
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileSeal]
    state: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, int] = field(default_factory=dict)
    family: str | None = None
    vocab_size: int | None = None
    tokenizer_fingerprint: str | None = None
    validation_loss: float | None = None
    saved_at: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, TensorRecord]:
        """The model's tensors, without the optimizer's and without buffers."""
        return {key: record for key, record in self.tensors.items() if not key.startswith(OPTIMIZER) and not is_buffer(key)}

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        tensors = {
            key: {
                "dtype": record.dtype,
                "shape": list(record.shape),
                "chunks": [[chunk.file, chunk.name, list(chunk.start), list(chunk.shape)] for chunk in record.chunks],
            }
            for key, record in self.tensors.items()
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "sequence": self.sequence,
            "saved_at": self.saved_at,
            "family": self.family,
            "vocab_size": self.vocab_size,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "validation_loss": self.validation_loss,
            "layout": dict(self.layout),
            "versions": dict(self.versions),
            "contract": dict(self.contract),
            "state": dict(self.state),
            "files": {name: {"size": seal.size, "sha256": seal.sha256} for name, seal in self.files.items()},
            "tensors": tensors,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Manifest":
        """Parse and check; ValueError, KeyError or TypeError for anything that is not a manifest of this version."""
        if data.get("format") != FORMAT:
            raise ValueError("it is not a megatron_llm manifest")
        if data["version"] != VERSION:
            raise ValueError(f"its format version is {data['version']}, this program reads version {VERSION}")
        files = {_plain_name(name): FileSeal(int(seal["size"]), str(seal["sha256"])) for name, seal in data["files"].items()}
        return Manifest(
            step=int(data["step"]),
            sequence=int(data["sequence"]),
            tensors={key: _record(key, record, files) for key, record in data["tensors"].items()},
            files=files,
            state=data["state"],
            layout=data["layout"],
            family=data["family"],
            vocab_size=data["vocab_size"],
            tokenizer_fingerprint=data["tokenizer_fingerprint"],
            validation_loss=data["validation_loss"],
            saved_at=data["saved_at"],
            versions=data["versions"],
            contract=data.get("contract", {}),
        )


def _plain_name(name: str) -> str:
    """A manifest may only name files inside its own folder."""
    if name.startswith("/") or ".." in name.split("/") or not name:
        raise ValueError(f"it names a file outside its folder: {name!r}")
    return name


def _record(key: str, data: Mapping[str, Any], files: Mapping[str, FileSeal]) -> TensorRecord:
    shape = tuple(int(size) for size in data["shape"])
    dtype_from_name(data["dtype"])
    chunks = tuple(Chunk(file, name, tuple(start), tuple(size)) for file, name, start, size in data["chunks"])
    for chunk in chunks:
        if chunk.file not in files:
            raise ValueError(f"{key} lies in {chunk.file}, which is not among its files")
    problem = tiling_problem(shape, [(chunk.start, chunk.shape) for chunk in chunks])
    if problem:
        raise ValueError(f"{key}: {problem}")
    return TensorRecord(data["dtype"], shape, chunks)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its digest into a checkpoint folder under way, whose files the caller will flush."""
    data = json.dumps(manifest.to_json(), separators=(",", ":")).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_bytes(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, its digest verified; DamagedCheckpoint says what is wrong with it."""
    try:
        data = (folder / MANIFEST).read_bytes()
        digest = (folder / MANIFEST_DIGEST).read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(folder, f"{Path(error.filename).name} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(folder, f"its manifest cannot be read: {error}") from error
    if digest != f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n":
        raise DamagedCheckpoint(folder, f"{MANIFEST} does not match its digest")
    try:
        return Manifest.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(folder, f"{MANIFEST} is not valid: {error}") from error


def plain_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` itself when JSON gives back exactly what it is given; ValueError names the first key that it would change."""
    for key, value in state.items():
        if not isinstance(key, str) or not _survives_json(value):
            raise ValueError(f"state[{key!r}] is not plain JSON (text keys, lists, numbers, text, true, false, null)")
    return dict(state)


def _survives_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _survives_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_survives_json, value))
    return value is None or type(value) in (bool, int, float, str)
