"""Memory that was freed is used again without the system's help. In a process of its own: the setting stays for its life."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from megatron_llm.utils.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    for _ in range(10):
        torch.ones(8 << 20)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Of a step that allocates and frees ten blocks of 32 MB, when one like it came before."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc's allocator")
def test_the_second_step_gets_its_memory_without_page_faults() -> None:
    assert page_faults("leave") > 20 * page_faults("keep") + 1000
