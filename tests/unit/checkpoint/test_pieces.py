"""Files written and read in pieces: every size, with and without direct input and output, short writes, full disks."""

import ctypes
import errno
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_llm.checkpoint import pieces, tensor_file
from megatron_llm.checkpoint.pieces import (
    ALIGNMENT,
    PieceMemory,
    PieceReader,
    PieceWriter,
    bytes_of,
    copy_values,
    host_memory,
    padded,
    read_digests,
)
from megatron_llm.checkpoint.tensor_file import FileSeal, TensorFileWriter, TensorSpec, seal_bytes, seal_file, write_image

SMALL = 2 * ALIGNMENT
SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, SMALL - 1, SMALL, SMALL + 1, 5 * SMALL, 5 * SMALL + ALIGNMENT + 3]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two pages, so that small files have several."""
    for module in (pieces, tensor_file):
        monkeypatch.setattr(module, "PIECE", SMALL)


def image(size: int) -> torch.Tensor:
    """Random bytes in page-aligned memory, with something else in the padding."""
    memory = host_memory(padded(size))
    memory.copy_(torch.randint(0, 256, (padded(size),), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)))
    return memory


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that opens files for direct input and output and then refuses each request."""
    flag, pwrite, preadv = os.O_DIRECT, os.pwrite, os.preadv

    def refusing(real: Any) -> Any:
        def call(file: int, *rest: Any) -> int:
            if pieces.fcntl.fcntl(file, pieces.fcntl.F_GETFL) & flag:
                raise OSError(errno.EINVAL, "Invalid argument")
            return int(real(file, *rest))

        return call

    monkeypatch.setattr(os, "pwrite", refusing(pwrite))
    monkeypatch.setattr(os, "preadv", refusing(preadv))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("direct", ["yes", "not opened", "refused"])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read_and_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: str) -> None:
    if direct == "not opened":
        monkeypatch.setattr(pieces, "_DIRECT", 0)
    if direct == "refused":
        refuse_direct(monkeypatch)
    memory = image(size)
    data = bytes(bytes_of(memory[:size]))
    seal = write_image(tmp_path / "a", memory, size)
    assert (tmp_path / "a").read_bytes() == data
    parts = [data[start : start + SMALL] for start in range(0, max(size, 1), SMALL)]
    assert seal == FileSeal(size, " ".join(hashlib.sha256(part).hexdigest() for part in parts))
    assert seal == seal_file(tmp_path / "a") == seal_bytes(data)
    block = PieceMemory()
    for direct_read in (True, False):
        with PieceReader(tmp_path / "a", direct=direct_read) as file:
            for start, end in ((0, SMALL), (1, 9), (ALIGNMENT - 1, ALIGNMENT + 1), (size - 1, size + 5), (size + 10, size + 20)):
                if start >= 0:
                    assert bytes(bytes_of(file.read(start, end, block))) == data[start:end]


@pytest.mark.usefixtures("small_pieces")
def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: pwrite(file, data[:1234], start))
    monkeypatch.setattr(os, "preadv", lambda file, views, start: preadv(file, [view[:777] for view in views], start))
    size = 3 * SMALL + 77
    memory = image(size)
    seal = write_image(tmp_path / "a", memory, size)
    assert (tmp_path / "a").read_bytes() == bytes(bytes_of(memory[:size]))
    assert seal == seal_file(tmp_path / "a")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("work", ["_write_piece", "_hash_piece"])
def test_memory_is_not_reused_before_its_piece_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Tensors of uneven sizes through two pieces of memory, while the disk or the hashing is slow at times."""
    real = getattr(PieceWriter, work)

    def slow(writer: PieceWriter, number: int, data: memoryview) -> None:
        os.sched_yield()
        if number % 3 == 0:
            torch.ones(200, 200).mm(torch.ones(200, 200))
        real(writer, number, data)

    monkeypatch.setattr(PieceWriter, work, slow)
    tensors = {f"t{n}": torch.randn(n * 331 + 1) for n in range(12)}
    tensors["strided"] = torch.randn(90, 70).t()[::2]
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFileWriter(tmp_path / "a", specs, buffers=2) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        seal = writer.close()
    assert seal == seal_file(tmp_path / "a")
    loaded = load_file(tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_piece_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    pwrite = os.pwrite

    def full(file: int, data: memoryview, start: int) -> int:
        if start >= bad * SMALL:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, start)

    monkeypatch.setattr(os, "pwrite", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        write_image(tmp_path / "a", image(5 * SMALL), 5 * SMALL)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("pages", [3, 4])
def test_the_last_space_of_a_disk_is_not_taken_for_a_file_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda file: SimpleNamespace(f_bavail=3, f_frsize=ALIGNMENT))
    with PieceWriter(tmp_path / "a", pages * ALIGNMENT):
        taken = (tmp_path / "a").stat().st_blocks
    if pages == 3 and not taken:
        pytest.skip("this file system does not reserve space")
    assert (taken > 0) == (pages == 3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_a_reservation_that_fails_matters_only_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace(fallocate=lambda *numbers: -1))
    monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left") if code == errno.ENOSPC else nullcontext():
        write_image(tmp_path / "a", image(5), 5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_pieces_are_hashed_side_by_side(tmp_path: Path) -> None:
    size = 2 * pieces.PIECE + 5
    memory = image(size)
    seal = write_image(tmp_path / "a", memory, size)
    assert len(seal.digests) == 3 and (size, seal.digests) == read_digests(tmp_path / "a")
    assert seal.digests[2] == hashlib.sha256(bytes_of(memory[2 * pieces.PIECE : size])).hexdigest()


@pytest.mark.parametrize("target_type", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (5, 1), (2, 3, 4), (0, 3)])
def test_values_are_copied_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype, target_type: torch.dtype) -> None:
    """Whole tensors, rows out of wider ones, every other element, transposed; with and without a conversion."""
    whole = torch.randint(-3, 4, (2 * shape[0], *shape[1:-1], 2 * shape[-1]), generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = [whole[: shape[0], ..., : shape[-1]], whole[::2, ..., ::2], whole[::2, ..., : shape[-1]].contiguous()]
    for source in [*parts, *(part.transpose(0, -1) for part in parts)]:
        spare = torch.zeros(source.shape[0], *source.shape[1:-1], source.shape[-1] + 2).to(target_type)
        for target in (
            torch.zeros(source.shape).to(target_type),
            spare[..., 1:-1],
            torch.zeros(source.shape[::-1]).to(target_type).permute(*reversed(range(source.dim()))),
        ):
            copy_values(target, source)
            assert torch.equal(target, torch.empty_like(target).copy_(source))
    assert not spare[..., 0].any() and not spare[..., -1].any()


def test_memory_begins_at_a_page() -> None:
    assert all(host_memory(size).data_ptr() % ALIGNMENT == 0 and len(host_memory(size)) == size for size in (0, 1, 5000, 1 << 22))
