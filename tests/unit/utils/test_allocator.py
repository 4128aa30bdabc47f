"""Memory that was freed is used again without the system's help, in huge pages. In a process of its own: the setting stays."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llm.utils import allocator

PROGRAM = """
import json, resource, sys, torch
from megatron_llm.utils.allocator import huge_pages_for_heap, keep_freed_memory
given = False
if sys.argv[1] != "leave":
    assert keep_freed_memory()
if sys.argv[1] == "huge":
    given = huge_pages_for_heap(0.25)
def step():
    for _ in range(10):
        torch.ones(8 << 20)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
kept = torch.ones(40 << 20)
huge = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
resident = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Rss"))
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"faults": faults, "given": given, "huge": huge, "resident": resident}))
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc's allocator")


def measure(mode: str) -> dict[str, int]:
    """Page faults of a step that allocates and frees ten blocks of 32 MB when one like it came before; pages, in kB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True)
    result: dict[str, int] = json.loads(done.stdout)
    return result


def test_the_second_step_gets_its_memory_without_page_faults() -> None:
    kept = measure("keep")
    assert kept["huge"] == 0 or "[always]" in allocator._MODE.read_text()
    # What is kept at the end, 160 MB that no step freed, is 41,000 pages in both.
    assert measure("leave")["faults"] > 2 * kept["faults"]


def test_the_heap_is_in_huge_pages_and_takes_no_memory_by_itself() -> None:
    found = measure("huge")
    if not found["given"]:
        pytest.skip(
            f"the system gives no huge pages on request: {allocator._MODE.read_text() if allocator._MODE.is_file() else 'no such file'}"
        )
    assert found["huge"] > 150_000, "the last block of 160 MB at least"
    assert found["resident"] < 1_500_000, "a quarter of the machine's memory was only reserved"


def test_without_huge_pages_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mode = tmp_path / "enabled"
    mode.write_text("always madvise [never]\n")
    monkeypatch.setattr(allocator, "_MODE", mode)
    assert not allocator.huge_pages_for_heap()


def test_where_addresses_are_counted_as_memory_none_are_reserved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mode = tmp_path / "overcommit_memory"
    mode.write_text("2\n")
    monkeypatch.setattr(allocator, "_OVERCOMMIT", mode)
    assert not allocator.huge_pages_for_heap()
    monkeypatch.undo()
    monkeypatch.setattr("resource.getrlimit", lambda limit: (8 << 30, 8 << 30))
    assert not allocator.huge_pages_for_heap()
