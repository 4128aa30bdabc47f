"""Rectangles read out of files in pieces, against slices of the tensors that were written; and damage found while reading."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_llm.checkpoint import pieces, reading, tensor_file
from megatron_llm.checkpoint.manifest import DamagedCheckpoint
from megatron_llm.checkpoint.pieces import ALIGNMENT
from megatron_llm.checkpoint.reading import FileWants, Wanted, read_files
from megatron_llm.checkpoint.tensor_file import FileSeal, TensorFileWriter, TensorSpec, seal_file

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pieces, tensor_file, reading):
        monkeypatch.setattr(module, "PIECE", ALIGNMENT)


def tensors_of(chance: random.Random, dtypes: list[torch.dtype]) -> Tensors:
    """Tensors of one to three dimensions, from one element to several pieces."""
    found = {}
    for number, dtype in enumerate(dtypes):
        shape = [chance.choice([1, 2, 3, 7, 31, 64]) for _ in range(chance.randint(1, 3))]
        found[f"t{number}"] = (torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 50).to(dtype)
    return found


def write(path: Path, tensors: Tensors) -> FileSeal:
    with TensorFileWriter(path, [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.close()


def rectangle(chance: random.Random, shape: torch.Size) -> tuple[slice, ...]:
    ends = [sorted((chance.randint(0, size - 1), chance.randint(1, size))) for size in shape]
    return tuple(slice(a, max(a + 1, b)) for a, b in ends)


def wanted_of(name: str, tensor: torch.Tensor, part: tuple[slice, ...], target: torch.Tensor) -> Wanted:
    return Wanted(name, tensor.dtype, tuple(tensor.shape), tuple(one.start for one in part), target)


@pytest.mark.parametrize("sealed", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("seed", range(3))
def test_any_rectangle_of_any_tensor(tmp_path: Path, seed: int, direct: bool, sealed: bool) -> None:
    chance = random.Random(seed)
    files, checks = [], []
    for number in range(3):
        wide = [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.uint8]
        # Unordered dtypes put tensors inside an element of the next ones: these are read in another way.
        tensors = tensors_of(chance, wide if number else chance.sample(wide, len(wide)))
        seal = write(tmp_path / f"{number}.safetensors", tensors)
        wants = []
        for name, tensor in tensors.items():
            for _ in range(3):
                part = rectangle(chance, tensor.shape)
                expected = tensor[part]
                target = torch.zeros(expected.shape, dtype=chance.choice([tensor.dtype, torch.float32]))
                if chance.random() < 0.5:
                    target = target.t().contiguous().t() if target.dim() == 2 else torch.zeros(*target.shape, 2, dtype=target.dtype)[..., 1]
                wants.append(wanted_of(name, tensor, part, target))
                checks.append((expected, target))
        files.append(FileWants(tmp_path / f"{number}.safetensors", wants, seal if sealed else None, direct))
    read_files(files)
    assert all(torch.equal(expected.to(target.dtype), target) for expected, target in checks)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "found"), [(30, True), (2 * ALIGNMENT + 9, True), (-1, False)], ids=["header", "a piece that is read", "another piece"]
)
def test_damage_in_what_is_read_is_found(tmp_path: Path, offset: int, found: bool) -> None:
    tensor = torch.randn(64, 64)  # 4 pages and a header
    path = tmp_path / "a.safetensors"
    seal = write(path, {"t": tensor})
    part = (slice(10, 40), slice(3, 64))
    target = torch.zeros(30, 61)
    flip(path, offset)
    files = [FileWants(path, [wanted_of("t", tensor, part, target)], seal, direct=True)]
    if found:
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors (does not match its digest|has no valid header)"):
            read_files(files)
    else:
        read_files(files)
        assert torch.equal(target, tensor[part])


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("keep", [0, 4, 20, ALIGNMENT, -1])
def test_a_file_cut_short_is_damaged(tmp_path: Path, keep: int, sealed: bool) -> None:
    tensor = torch.randn(64, 64)
    path = tmp_path / "a.safetensors"
    seal = write(path, {"t": tensor})
    path.write_bytes(path.read_bytes()[:keep])
    wanted = wanted_of("t", tensor, (slice(0, 64), slice(0, 64)), torch.zeros(64, 64))
    with pytest.raises(DamagedCheckpoint):
        read_files([FileWants(path, [wanted], seal if sealed else None, direct=False)])


def test_another_tensor_than_the_manifest_says_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    seal = write(path, {"t": torch.zeros(4, 4)})
    for name, other in (("u", torch.zeros(4, 4)), ("t", torch.zeros(2, 8)), ("t", torch.zeros(4, 4, dtype=torch.int32))):
        wanted = wanted_of(name, other, (slice(0, 1), slice(0, 1)), torch.zeros(1, 1))
        with pytest.raises(DamagedCheckpoint, match="does not hold"):
            read_files([FileWants(path, [wanted], seal, direct=True)])


def test_files_of_the_library_and_more_files_than_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_OPEN_FILES", 2)
    tensors = [torch.randn(50, number + 1) for number in range(5)]
    files, targets = [], []
    for number, tensor in enumerate(tensors):
        path = tmp_path / f"{number}.safetensors"
        save_file({"t": tensor}, path)
        targets.append(torch.zeros_like(tensor))
        files.append(FileWants(path, [wanted_of("t", tensor, (slice(0, 50), slice(0, number + 1)), targets[-1])], seal_file(path), True))
    read_files(files)
    assert all(torch.equal(a, b) for a, b in zip(tensors, targets, strict=True))
