"""One process saves and loads: contents, views, mismatches, failures, background saves."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_llm.checkpoint import checkpointer as checkpointer_module
from megatron_llm.checkpoint import pieces
from megatron_llm.checkpoint import save as save_module
from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.load import CheckpointReader, load_entries, load_state
from megatron_llm.checkpoint.manifest import read_manifest
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.utils.errors import UserError

GROUPS = single_process_groups()
STATE = {"config": {"model": {"model": "llama", "vocab_size": 97}}, "consumed_samples": 40, "tokenizer_fingerprint": "abc"}


def whole(key: str, tensor: torch.Tensor, owned: bool = True) -> Entry:
    return Entry(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor, owned)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "w": torch.randn(5, 7),
        "w16": torch.randn(4, 6).bfloat16(),
        "transposed": torch.randn(3, 8).t(),
        "bias": torch.randn(11),
        "counts": torch.arange(6).view(2, 3),
    }


def entries_of(values: dict[str, torch.Tensor]) -> list[Entry]:
    return [whole(key, tensor) for key, tensor in values.items()]


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_what_is_saved_is_loaded_in_place(tmp_path: Path, async_save: bool) -> None:
    values = tensors()
    checkpointer = Checkpointer(tmp_path, GROUPS, async_save=async_save)
    path = checkpointer.save(100, entries_of(values), STATE, validation_loss=2.5)
    checkpointer.wait()
    assert path == tmp_path / "step_0000100" and (tmp_path / "latest").read_text() == "step_0000100\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000100"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "manifest.sha256", "rank_00000.safetensors"]
    manifest = read_manifest(path)
    assert (manifest.step, manifest.family, manifest.vocab_size) == (100, "llama", 97)
    assert (manifest.validation_loss, manifest.tokenizer_fingerprint, manifest.layout) == (2.5, "abc", {"tp": 1, "dp": 1, "pp": 1})
    assert load_state(path) == STATE
    targets = {key: torch.zeros_like(tensor) for key, tensor in values.items()}
    load_entries(path, entries_of(targets), complete=[""])
    assert all(torch.equal(targets[key], values[key]) and targets[key].stride() == values[key].stride() for key in values)
    assert set(load_file(path / "rank_00000.safetensors")) == set(values)  # whole tensors keep their plain names


def test_a_background_save_keeps_the_values_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    real = checkpointer_module.write_rank
    monkeypatch.setattr(checkpointer_module, "write_rank", lambda *args: (go.wait(10), real(*args)))
    weight = torch.ones(3, 3)
    checkpointer = Checkpointer(tmp_path, GROUPS, async_save=True)
    path = checkpointer.save(1, [whole("w", weight.t())], {})
    assert not path.exists()
    checkpointer.settle()
    weight.fill_(2.0)
    go.set()
    checkpointer.wait()
    with CheckpointReader(path) as reader:
        assert reader.read("w").eq(1.0).all()
    weight.fill_(3.0)
    path = checkpointer.save(2, [whole("w", weight)], {})
    checkpointer.wait()
    with CheckpointReader(path) as reader:
        assert reader.read("w").eq(3.0).all()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, GROUPS)
    for value in (1.0, 2.0):
        path = checkpointer.save(5, [whole("w", torch.full((2,), value))], {"value": value})
    assert load_state(path) == {"value": 2.0}
    assert read_manifest(path).sequence == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


def test_a_new_run_counts_on(tmp_path: Path) -> None:
    for step in (10, 20):
        path = Checkpointer(tmp_path, GROUPS).save(step, [whole("w", torch.zeros(2))], {})
    assert read_manifest(path).sequence == 2


@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_the_tokenizer_travels_along(tmp_path: Path, as_folder: bool) -> None:
    source = tmp_path / "tokenizer_source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    given = source if as_folder else source / "tokenizer.json"
    path = Checkpointer(tmp_path / "ck", GROUPS).save(1, [], {}, tokenizer_folder=given)
    assert (path / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert "tokenizer/tokenizer.json" in read_manifest(path).files


def test_a_missing_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Checkpointer(tmp_path, GROUPS).save(1, [], {}, tokenizer_folder=tmp_path / "nowhere")


def test_retention_runs_after_each_save(tmp_path: Path) -> None:
    lines: list[str] = []
    checkpointer = Checkpointer(tmp_path, GROUPS, keep_last=2, keep_every=3, keep_best=True, report=lines.append)
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0, 6.0, 6.0], start=1):
        checkpointer.save(step, [whole("w", torch.zeros(2))], {}, validation_loss=loss)
    checkpointer.wait()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_{step:07d}" for step in (2, 3, 6, 7)]
    assert lines == [f"removed checkpoint step_{step:07d}: not among those to keep" for step in (1, 4, 5)]


def test_all_differences_are_listed_and_nothing_is_copied(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, GROUPS).save(1, entries_of(tensors()), {})
    good = torch.full((5, 7), 9.0)
    wanted = [whole("w", good), whole("missing", torch.zeros(2)), whole("bias", torch.zeros(12)), whole("w16", torch.zeros(4, 6))]
    with pytest.raises(UserError) as caught:
        load_entries(path, wanted, complete=["co", "tr"])
    text = str(caught.value)
    assert "missing is not in the checkpoint" in text
    assert "bias has shape [11] in the checkpoint, [12] here" in text
    assert "w16 is bfloat16 in the checkpoint, float32 here" in text
    assert "counts is in the checkpoint but has no place in this model" in text and "transposed is in the checkpoint" in text
    assert good.eq(9.0).all()


def test_cast_converts(tmp_path: Path) -> None:
    values = tensors()
    path = Checkpointer(tmp_path, GROUPS).save(1, entries_of(values), {})
    target = torch.zeros(4, 6)
    load_entries(path, [whole("w16", target)], cast=True)
    assert torch.equal(target, values["w16"].float())


def test_an_uncovered_or_doubled_element_fails_the_save(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, GROUPS)
    with pytest.raises(ValueError, match="w: 6 elements are written where the tensor has 8"):
        checkpointer.save(1, [Entry("w", (4, 2), (0, 0), torch.zeros(3, 2))], {})
    with pytest.raises(ValueError, match="overlap"):
        checkpointer.save(1, [Entry("w", (4, 2), (0, 0), torch.zeros(2, 2)), Entry("w", (4, 2), (1, 0), torch.zeros(2, 2))], {})
    assert list(tmp_path.iterdir()) == []


def test_state_must_be_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain JSON"):
        Checkpointer(tmp_path, GROUPS).save(1, [], {"shape": (1, 2)})


class _FullDisk:
    """A disk that is full after a given number of bytes, and that may tell so when space is reserved or when it is used."""

    def __init__(self, room: int, told: str) -> None:
        self.room, self.told = room, told
        self.allocate, self.write = pieces._allocate, pieces.PieceWriter._write_piece

    def take(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def write_piece(writer: pieces.PieceWriter, number: int, data: memoryview) -> None:
            self.take(len(data))
            self.write(writer, number, data)

        if self.told == "reserving":
            monkeypatch.setattr(pieces, "_allocate", lambda file, size: self.take(size))
        else:
            monkeypatch.setattr(pieces.PieceWriter, "_write_piece", write_piece)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("room", "told"),
    [(700, "reserving"), (10, "writing"), (pieces.PIECE + 10, "writing")],
    ids=["reserving", "first piece", "last piece"],
)
def test_a_full_disk_is_a_sentence_and_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, told: str, async_save: bool
) -> None:
    values = {**tensors(), "large": torch.zeros(pieces.PIECE // 4 + 1)}
    checkpointer = Checkpointer(tmp_path, GROUPS, async_save=async_save)
    first = checkpointer.save(1, entries_of(values), {"n": 1})
    checkpointer.wait()
    _FullDisk(room, told).install(monkeypatch)

    def second_save() -> None:
        checkpointer.save(2, entries_of(values), {"n": 2})
        checkpointer.wait()

    with pytest.raises(UserError, match=r"no space left to save step 2 in .* \(\d+\.\d GB free\)"):
        second_save()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001"]
    assert load_state(first) == {"n": 1} and (tmp_path / "latest").read_text() == "step_0000001\n"
    monkeypatch.undo()
    checkpointer.save(3, entries_of(values), {"n": 3})  # room again: the run can go on saving
    checkpointer.wait()
    assert (tmp_path / "latest").read_text() == "step_0000003\n"


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("function", ["apply_retention", "remove_folder"])
def test_a_removal_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, async_save: bool) -> None:
    checkpointer = Checkpointer(tmp_path, GROUPS, keep_last=1, async_save=async_save)
    checkpointer.save(1, [whole("w", torch.zeros(2))], {})
    checkpointer.wait()

    def refuse(*args: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    def save_and_wait() -> None:
        checkpointer.save(2, [whole("w", torch.ones(2))], {"n": 2})
        checkpointer.wait()

    monkeypatch.setattr(checkpointer_module, function, refuse)
    with pytest.raises(UserError, match=r"step 2 is saved, but an older checkpoint cannot be removed: .*Permission denied"):
        save_and_wait()
    monkeypatch.undo()
    assert load_state(tmp_path / "step_0000002") == {"n": 2}
    checkpointer.save(4, [whole("w", torch.zeros(2))], {})
    checkpointer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000004"]


def test_a_foreground_save_does_not_wait_for_the_removal_of_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path, GROUPS, keep_last=1)
    checkpointer.save(1, [whole("w", torch.zeros(2))], {})
    go = threading.Event()
    real = checkpointer_module.remove_folder
    monkeypatch.setattr(checkpointer_module, "remove_folder", lambda folder: (go.wait(10), real(folder)))
    checkpointer.save(2, [whole("w", torch.zeros(2))], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001.deleted", "step_0000002"]
    go.set()
    checkpointer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000002"]


@pytest.mark.parametrize("function", ["write_manifest", "_install"])
def test_a_failing_commit_keeps_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "the file")

    checkpointer = Checkpointer(tmp_path, GROUPS)
    checkpointer.save(1, [], {})
    monkeypatch.setattr(save_module, function, refuse)
    with pytest.raises(UserError, match=r"cannot save step 2 in .*Input/output error \(the file\)"):
        checkpointer.save(2, [], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001"]


def test_a_root_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save step 1"):
        Checkpointer(tmp_path / "file" / "root", GROUPS).save(1, [], {})
