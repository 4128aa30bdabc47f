"""The choice between the forms of the operations, and what is said about it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_llm.kernels import native, reference
from megatron_llm.kernels.dispatch import select_kernels, torch_kernels
from megatron_llm.kernels.triton import operations
from megatron_llm.utils.errors import UserError

CPU = torch.device("cpu")


def test_auto_takes_the_operators(loaded: None) -> None:
    kernels = select_kernels("auto", CPU)
    assert kernels.name == "fused" and kernels.adamw_ is not reference.adamw_ and kernels.silu is reference.silu
    assert kernels.describe().startswith(f"fused (C++, {native.capability()}: ") and "softmax_statistics" in kernels.describe()


def test_torch_is_plain_torch() -> None:
    kernels = select_kernels("torch", CPU)
    assert kernels.name == "torch" and kernels.adamw_ is reference.adamw_ and kernels.describe() == "torch (as asked for)"
    assert torch_kernels().rms_norm is reference.rms_norm


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: "they are not built: build them")
    kernels = select_kernels("auto", CPU)
    assert kernels.name == "torch" and kernels.describe() == "torch (no fused kernels, because they are not built: build them)"
    with pytest.raises(UserError, match="because they are not built: build them; or use --kernels auto"):
        select_kernels("fused", CPU)


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not on mps" in select_kernels("auto", torch.device("mps")).describe()
    monkeypatch.setattr(operations, "missing", lambda device: None)
    whole, compiled = (select_kernels("fused", torch.device("cuda"), compiled=value) for value in (False, True))
    assert whole.describe().startswith("fused (Triton: ") and whole.swiglu is not reference.swiglu and whole.adamw_ is not reference.adamw_
    assert compiled.swiglu is reference.swiglu and compiled.adamw_ is whole.adamw_


def test_a_library_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(broken)})
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    reason = native.load.__wrapped__()
    assert f"{broken} cannot be loaded" in reason and "pip install" in reason
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert "not built" in native.load.__wrapped__()


def test_a_library_of_another_torch_is_said(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert "this is torch 2.99.0+cpu" in native.load.__wrapped__()


def test_the_environment_chooses_the_instruction_set(loaded: None) -> None:
    code = "from megatron_llm.kernels import native; print(native.load(), native.capability())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"MEGATRON_LLM_CPU_CAPABILITY": "baseline"}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["None", "baseline"], done.stderr
    with pytest.raises(UserError, match="'sse9' was asked for, and this processor has: baseline"):
        native.use_capability("sse9")


def test_an_unknown_instruction_set_is_said(loaded: None) -> None:
    code = "from megatron_llm.kernels import native\nfrom megatron_llm.utils.errors import run_command\nrun_command(native.load)"
    environment = {"MEGATRON_LLM_CPU_CAPABILITY": "fast"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: MEGATRON_LLM_CPU_CAPABILITY: the CPU capability 'fast'")
    assert len(done.stderr.splitlines()) == 1
