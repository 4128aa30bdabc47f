"""The manifest: what goes in comes out, and what is not a whole manifest is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.checkpoint.manifest import (
    Chunk,
    DamagedCheckpoint,
    Manifest,
    TensorRecord,
    parse_step,
    plain_json,
    read_manifest,
    step_name,
    write_manifest,
)
from megatron_llm.checkpoint.tensor_file import FileSeal


def example() -> Manifest:
    chunks = (Chunk("a.safetensors", "w@0,0", (0, 0), (2, 3)), Chunk("a.safetensors", "w@2,0", (2, 0), (1, 3)))
    return Manifest(
        step=7,
        sequence=3,
        tensors={"w": TensorRecord("bfloat16", (3, 3), chunks)},
        files={"a.safetensors": FileSeal(10, "ab" * 32)},
        state={"consumed_samples": 12, "lr": 1e-3, "nested": {"list": [1, None, True, "x"]}},
        layout={"tp": 2, "dp": 1, "pp": 1},
        family="llama",
        vocab_size=97,
        tokenizer_fingerprint="f" * 64,
        validation_loss=2.5,
        saved_at="2026-01-01T00:00:00+00:00",
        versions={"torch": "2.13.0"},
    )


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    assert read_manifest(tmp_path) == example()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_any_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, example())
    data = bytearray((tmp_path / name).read_bytes())
    for position in range(0, 60, 7):
        changed = bytearray(data)
        changed[position] ^= 1
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=r"digest|read"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, example())
    (tmp_path / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{name} is missing"):
        read_manifest(tmp_path)


def change(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data: Any = json.loads(json.dumps(example().to_json()))
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return dict(data)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("format",), "something else", "not a megatron_llm manifest"),
        (("version",), 1, "format version is 1"),
        (("files",), {"../outside": {"size": 1, "sha256": ""}}, "outside its folder"),
        (("files",), {"/etc/passwd": {"size": 1, "sha256": ""}}, "outside its folder"),
        (("tensors", "w", "chunks", 0, 0), "other.safetensors", "not among its files"),
        (("tensors", "w", "chunks", 1, 2), [1, 0], "overlap"),
        (("tensors", "w", "shape"), [3, 4], "9 elements are written where the tensor has 12"),
        (("tensors", "w", "dtype"), "float17", "unknown dtype"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(path: tuple[Any, ...], value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Manifest.from_json(change(path, value))


def test_folder_names() -> None:
    assert step_name(100) == "step_0000100"
    assert parse_step("step_0000100") == (100, "")
    assert parse_step("step_12345678.tmp") == (12345678, ".tmp")
    assert parse_step("latest") is None and parse_step("step_1.other") is None


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": {3}}, [object()]])
def test_state_that_json_would_change_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"state\['bad'\]"):
        plain_json({"good": [1, 2.5, "x", None, {"y": False}], "bad": value})
