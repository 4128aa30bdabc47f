"""Whether a process can use the shared-memory backend, and what it is told when it cannot."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_llm.parallel import shm
from megatron_llm.utils.errors import UserError


def import_error(error: ImportError) -> Callable[[str], object]:
    def fail(name: str) -> object:
        raise error

    return fail


def test_a_missing_extension_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", import_error(ModuleNotFoundError("no", name="megatron_llm._shm")))
    if not shm.BOOT_ID.exists():
        pytest.skip("another reason comes first where there is no /proc")
    assert shm.why_not_here() == "the extension megatron_llm._shm is not built"
    with pytest.raises(UserError, match="distributed backend shm cannot be used here, the extension megatron_llm._shm is not built"):
        shm.register()


def test_an_extension_of_another_torch_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", import_error(ImportError("undefined symbol: c10d")))
    if not shm.BOOT_ID.exists():
        pytest.skip("another reason comes first where there is no /proc")
    assert shm.why_not_here() == "the extension megatron_llm._shm does not load: undefined symbol: c10d"


def test_elsewhere_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "BOOT_ID", Path("/nowhere"))
    assert shm.why_not_here() == "shared-memory collectives need Linux"


@pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")
def test_a_process_of_this_host_has_this_identity() -> None:
    code = "from megatron_llm.parallel import shm; print(shm.host_identity())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert there.stdout.strip() == shm.host_identity()
    assert len(shm.host_identity().split()) == 6


@pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")
def test_registering_twice_does_nothing() -> None:
    shm.register()
    before = list(dist.Backend.backend_list)
    shm.register()
    assert dist.Backend.backend_list == before
    assert before.count("shm") == 1


@pytest.mark.skipif(bool(shm.why_not_here()), reason=shm.why_not_here() or "usable")
def test_a_group_of_one_rank() -> None:
    assert shm.why_not(dist.HashStore(), 0, 1) == ""
