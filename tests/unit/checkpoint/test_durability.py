"""What a crash of the machine (not only of a process) needs: flushes before the names that vouch for them.

A killed process loses nothing that it wrote, so killing cannot test this; the order of the system calls can.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.parallel.groups import single_process_groups


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every flush and rename from here on: ("flush", path) and ("rename", new path)."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recorded_fsync(descriptor: int) -> None:
        seen.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded(real: Any) -> Any:
        def move(source: Path, target: Path) -> None:
            real(source, target)
            seen.append(("rename", str(target)))

        return move

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded(rename))
    monkeypatch.setattr(os, "replace", recorded(replace))
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_everything_is_flushed_before_the_checkpoint_has_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    root = tmp_path / "root"
    path = Checkpointer(root, single_process_groups()).save(3, [Entry("w", (4,), (0,), torch.ones(4))], {}, None, tmp_path / "tok")
    born = calls.index(("rename", str(path)))
    temporary = root / "step_0000003.tmp"
    before, after = calls[:born], calls[born + 1 :]
    for file in path.rglob("*"):
        inside = temporary / file.relative_to(path)
        # A file written aside is flushed under its hidden name and then renamed.
        names = {("flush", str(inside)), ("flush", str(inside.with_name(f".{inside.name}.tmp")))}
        assert names & set(before), f"{file.name} has its place in the checkpoint but was not flushed"
    last_change = max(number for number, (kind, name) in enumerate(before) if kind == "rename" and name.startswith(str(temporary)))
    assert ("flush", str(temporary)) in before[last_change:]
    latest = after.index(("rename", str(root / "latest")))
    assert ("flush", str(root)) in after[:latest], "latest names a checkpoint whose own name may still be lost"
    assert ("flush", str(root)) in after[latest:]
    assert ("flush", str(root / ".latest.tmp")) in calls[: born + 1 + latest]
