"""Triton kernels without a GPU: each equals the plain form in Triton's interpreter, and compiles for NVIDIA's GPUs.

Both run in processes of their own, since interpreting or compiling is decided when Triton is imported.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_llm.kernels.triton import language, norm
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import available

ROOT = Path(__file__).resolve().parents[3]


def release(package: str) -> tuple[int, ...]:
    """The first two numbers of an installed package's version."""
    return tuple(int(part) for part in version(package).split(".")[:2])


needs_triton = pytest.mark.skipif(not available("triton"), reason="Triton is not installed here; it comes with the GPU builds of torch")


@needs_triton
def test_kernels_equal_the_plain_form_in_the_interpreter() -> None:
    if release("triton") < (3, 9) and release("numpy") >= (2, 4):
        # It turns arrays of one element into loop bounds, which NumPy no longer allows; tests/gpu run the compiled kernels.
        pytest.skip(f"the interpreter of Triton {version('triton')} does not work with NumPy {version('numpy')}: its loops fail")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:logging",
        "tests/unit/kernels/triton_interpreted.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 50 and "skipped" not in done.stdout, done.stdout[-500:]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    """Ampere, Hopper and Blackwell; nothing is taken from a cache of compiled kernels."""
    environment = {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.unit.kernels.triton_compile", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    failed = {key: size for key, size in sizes.items() if not isinstance(size, int) or size < 500}
    assert len(sizes) == 12 * 3 and not failed, failed


@pytest.mark.skipif(available("triton"), reason="Triton is installed here")
def test_without_triton_the_sentence_says_what_to_do() -> None:
    with pytest.raises(UserError, match="--kernels fused on a GPU needs triton, which is not installed: pip install triton"):
        norm.rms_norm(torch.ones(2, 3), torch.ones(3), 1e-5)


def test_rows_are_views_where_the_strides_allow() -> None:
    x = torch.randn(3, 4, 10)
    for view in (x, x[..., :5], x[:, :1], x[1:2, :, 2:], x.chunk(2, -1)[1], x[:1, :1]):
        rows = language.as_rows(view)
        assert torch.equal(rows, view.reshape(-1, view.shape[-1])) and rows.stride(1) == 1
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for copied in (x.transpose(0, 1), x[:, :3], x[..., ::2]):
        rows = language.as_rows(copied)
        assert torch.equal(rows, copied.reshape(-1, copied.shape[-1])) and rows.is_contiguous()


def test_a_row_too_long_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="a norm over 70000 elements"):
        language.check_row(70000)
