"""Writing behind: which parts of a file the system is asked to write, and that nothing depends on it."""

from pathlib import Path

import pytest

from megatron_llm.utils import writeback
from megatron_llm.utils.writeback import WriteBehind


def test_each_part_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "_PIECE", 1000)
    asked: list[tuple[int, int]] = []
    with open(tmp_path / "file", "wb", buffering=0) as stream:
        behind = WriteBehind(stream, 300)
        real = behind._call

        def call(descriptor: int, start: "writeback.ctypes.c_int64", count: "writeback.ctypes.c_int64", flags: int) -> None:
            assert descriptor == stream.fileno()
            assert real is None or real(descriptor, start, count, flags) == 0
            asked.append((start.value, count.value))

        behind._call = call
        for end in range(300, 5000, 400):
            stream.write(b"x" * 400)
            behind.added(end)
    assert asked == [(300, 1200), (1500, 1200), (2700, 1200)]


def test_systems_without_the_call_do_nothing(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as stream:
        behind = WriteBehind(stream)
        behind._call = None
        behind.added(1 << 40)
    assert (tmp_path / "file").read_bytes() == b""
