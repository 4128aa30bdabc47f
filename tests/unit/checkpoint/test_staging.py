"""What a background save copies: the file as it will be, in memory that is kept between saves."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.contents import FileContents, sharded_files
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.pieces import ALIGNMENT, PIECE
from megatron_llm.checkpoint.staging import Staging, copy_entries
from megatron_llm.parallel.groups import single_process_groups


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
    first, again = (staged(staging, source)[0].image for _ in range(2))
    assert first is not None and again is not None and first.data_ptr() == again.data_ptr()
    more = [*entries(), Entry("more", (PIECE,), (0,), torch.ones(PIECE))]
    (file,) = staged(staging, sharded_files(0, more))
    assert next(entry for entry in file.entries if entry.key == "more").tensor.eq(1).all()


@pytest.mark.parametrize("form", ["sharded", "hf"])
def test_background_and_foreground_write_the_same_bytes(tmp_path: Path, form: Literal["sharded", "hf"]) -> None:
    groups = single_process_groups()
    found = []
    for async_save in (False, True):
        saver = Checkpointer(tmp_path / str(async_save), groups, async_save=async_save, form=form)
        saver.reserve(entries())
        path = saver.save(1, entries(), {})
        saver.wait()
        found.append({file.relative_to(path): file.read_bytes() for file in path.rglob("*.safetensors")})
    assert found[0] == found[1] and len(found[0]) == (2 if form == "hf" else 1)


def test_reserving_during_a_save_leaves_it_alone(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, single_process_groups(), async_save=True)
    path = saver.save(1, entries(), {})
    saver.reserve([Entry("w", (3,), (0,), torch.ones(3))])
    saver.wait()
    assert path.is_dir()
