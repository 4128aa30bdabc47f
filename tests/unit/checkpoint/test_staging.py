"""What a background save copies, and when: the file as it will be, in memory that is kept, before the tensors change."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_llm.checkpoint import checkpointer as checkpointer_module
from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.contents import FileContents, sharded_files
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.load import load_state
from megatron_llm.checkpoint.pieces import ALIGNMENT, PIECE
from megatron_llm.checkpoint.staging import Staging, copy_entries
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.utils.errors import UserError

GROUPS = single_process_groups()


def entries() -> list[Entry]:
    """Several types, a transposed weight, one element, more than one slab, and a tensor that others own."""
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(7, 5).bfloat16(),
        "transposed": torch.randn(3, 8).t(),
        "one": torch.randn(1),
        "flags": torch.tensor([True, False, True]),
        "large": torch.randn(3 * PIECE // 4 + 5),
        "optimizer.exp_avg.transposed": torch.randn(3, 8).t(),
    }
    found = [Entry(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor) for key, tensor in tensors.items()]
    return [*found, Entry("other", (4,), (0,), torch.zeros(2), owned=False, counted=False)]


def staged(staging: Staging, source: list[FileContents]) -> list[FileContents]:
    files = staging.reserve(source)
    copy_entries(source, files)
    return files


def test_copies_stay_as_they_are_and_lie_where_the_file_has_them() -> None:
    staging, originals = Staging(pinned=False), entries()
    expected = {entry.key: entry.tensor.clone() for entry in originals if entry.owned}
    (file,) = staged(staging, sharded_files(0, originals))
    for entry in originals:
        entry.tensor.zero_()
    assert {entry.key for entry in file.entries} == set(expected)
    assert all(torch.equal(entry.tensor, expected[entry.key]) for entry in file.entries)
    assert file.image is not None and file.image.data_ptr() % ALIGNMENT == 0 == len(file.image) % ALIGNMENT
    for entry, offset in zip(file.entries, file.layout.offsets, strict=True):
        assert entry.tensor.data_ptr() == file.image.data_ptr() + offset


def test_memory_is_kept_between_saves_and_grows_when_needed() -> None:
    staging, source = Staging(pinned=False), sharded_files(0, entries())
    first = staged(staging, source)[0].image
    originals = entries()
    for entry in originals:
        entry.tensor.fill_(1)
    (again,) = staged(staging, sharded_files(0, originals))
    assert first is not None and again.image is not None and first.data_ptr() == again.image.data_ptr()
    assert all(entry.tensor.eq(1).all() for entry in again.entries)
    more = [*entries(), Entry("more", (PIECE,), (0,), torch.ones(PIECE))]
    (file,) = staged(staging, sharded_files(0, more))
    assert next(entry for entry in file.entries if entry.key == "more").tensor.eq(1).all()


@pytest.mark.parametrize("form", ["sharded", "hf"])
def test_background_and_foreground_write_the_same_bytes(tmp_path: Path, form: Literal["sharded", "hf"]) -> None:
    found = []
    for async_save in (False, True):
        saver = Checkpointer(tmp_path / str(async_save), GROUPS, async_save=async_save, form=form)
        saver.reserve(entries())
        path = saver.save(1, entries(), {})
        saver.wait()
        found.append(bytes_in(path))
    assert found[0] == found[1] and len(found[0]) == (2 if form == "hf" else 1)


def bytes_in(path: Path) -> dict[str, bytes]:
    """The tensor files of a checkpoint."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.safetensors")}


@pytest.fixture
def may_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Background saves begin their copies only when this is set."""
    event = threading.Event()
    real = checkpointer_module.copy_entries

    def late(*args: Any) -> None:
        assert event.wait(20), "nothing let the copy begin"
        real(*args)

    monkeypatch.setattr(checkpointer_module, "copy_entries", late)
    yield event
    event.set()


@pytest.mark.parametrize("form", ["sharded", "hf"])
def test_a_save_returns_before_its_copy_and_settle_waits_for_it(
    tmp_path: Path, may_copy: threading.Event, form: Literal["sharded", "hf"]
) -> None:
    """Everything changes when `settle` has returned; the bytes are those of a save in the foreground."""
    expected = bytes_in(Checkpointer(tmp_path / "sync", GROUPS, form=form).save(1, entries(), {}))
    saver = Checkpointer(tmp_path / "async", GROUPS, async_save=True, form=form)
    for step in (1, 2):  # the second one into memory that holds the first
        originals = entries()
        path = saver.save(step, originals, {})
        settled = threading.Thread(target=saver.settle)
        settled.start()
        settled.join(0.05)
        assert settled.is_alive(), "settle returned while the copy had not begun"
        may_copy.set()
        settled.join(20)
        assert not settled.is_alive()
        for entry in originals:
            entry.tensor.fill_(7)
        saver.wait()
        assert bytes_in(path) == expected
        may_copy.clear()
    saver.settle()  # nothing is under way


def test_what_else_is_saved_is_that_of_the_moment(tmp_path: Path, may_copy: threading.Event) -> None:
    state: dict[str, Any] = {"callbacks": {"best": [1]}}
    documents: dict[str, Any] = {"config.json": {"layers": [2]}}
    saver = Checkpointer(tmp_path, GROUPS, async_save=True)
    path = saver.save(1, entries(), state, documents=documents)
    state["callbacks"]["best"].append(9)
    documents["config.json"]["layers"].append(9)
    may_copy.set()
    saver.wait()
    assert load_state(path) == {"callbacks": {"best": [1]}}
    assert "9" not in (path / "config.json").read_text()


def test_a_copy_that_fails_is_told_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpointer(tmp_path, GROUPS, async_save=True)
    saver.save(1, entries(), {})
    saver.wait()

    def failing(*args: Any) -> None:
        raise UserError("the memory is broken")

    monkeypatch.setattr(checkpointer_module, "copy_entries", failing)
    saver.save(2, entries(), {})
    saver.settle()
    monkeypatch.undo()
    with pytest.raises(UserError, match="the memory is broken"):
        saver.save(3, entries(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]
    path = saver.save(4, entries(), {})
    saver.wait()
    assert path.is_dir()


def test_reserving_during_a_save_leaves_it_alone(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, GROUPS, async_save=True)
    path = saver.save(1, entries(), {})
    saver.reserve([Entry("w", (3,), (0,), torch.ones(3))])
    saver.wait()
    assert path.is_dir()
