"""Our safetensors writer against the safetensors library."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_llm.checkpoint.tensor_file import TensorFileWriter, TensorSpec, dtype_from_name, dtype_name, seal_file

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def test_the_library_reads_back_what_we_write(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    tensors["transposed"] = torch.randn(4, 6).t()
    tensors["strided"] = torch.randn(8, 6)[::2, 1:4]
    tensors["empty"] = torch.empty(0, 4)
    path = tmp_path / "a.safetensors"
    with TensorFileWriter(path, [TensorSpec(k, t.dtype, tuple(t.shape)) for k, t in tensors.items()], {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        seal = writer.close()
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert seal == seal_file(path)
    assert seal.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and seal.size == path.stat().st_size


def test_blocks_larger_than_the_buffer(tmp_path: Path) -> None:
    tensor = torch.arange(9_000_000, dtype=torch.int32)  # 36 MB: three blocks
    with TensorFileWriter(tmp_path / "a", [TensorSpec("x", tensor.dtype, (9_000_000,))]) as writer:
        writer.write("x", tensor)
        seal = writer.close()
    assert seal == seal_file(tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["x"], tensor)


def test_another_tensor_than_announced_is_refused(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "a", [TensorSpec("x", torch.float32, (2,))]) as writer, pytest.raises(ValueError, match="expected"):
        writer.write("x", torch.zeros(3))


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "a", [TensorSpec("x", torch.float32, (2,))]) as writer, pytest.raises(ValueError, match="first x"):
        writer.close()


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_blocks_of_rows_are_the_same_file_in_less_memory(tmp_path: Path, buffers: int) -> None:
    tensors = {
        "large": torch.randn(1021, 1031),
        "odd": torch.randn(7, 3, 5).bfloat16(),
        "line": torch.arange(11),
        "none": torch.empty(0, 4),
    }
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFileWriter(tmp_path / "whole", specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        whole = writer.close()
    with TensorFileWriter(tmp_path / "rows", specs, buffers=buffers) as writer:
        for name, tensor in tensors.items():
            writer.write_rows(name, iter(tensor.t().contiguous().t().split(3) if tensor.dim() == 2 else tensor.split(3)))
        assert writer.close() == whole
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("blocks", [[(2, 3)], [(2, 3), (2, 3)], [(3, 2)], []], ids=str)
def test_rows_that_are_not_the_announced_tensor_are_refused(tmp_path: Path, blocks: list[tuple[int, int]]) -> None:
    spec = TensorSpec("x", torch.float32, (3, 3))
    with TensorFileWriter(tmp_path / "a", [spec]) as writer, pytest.raises(ValueError, match="expected"):
        writer.write_rows("x", (torch.zeros(shape) for shape in blocks))


def test_dtype_names() -> None:
    assert [dtype_from_name(dtype_name(dtype)) for dtype in DTYPES] == DTYPES
    with pytest.raises(ValueError, match="complex64"):
        dtype_name(torch.complex64)
    with pytest.raises(ValueError, match="unknown"):
        dtype_from_name("float128")
