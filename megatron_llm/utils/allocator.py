"""Keep the memory that a training step frees, so that the next one gets it without asking the system.

glibc gives every large block back as soon as it is freed, and the system clears each page before it hands it out again.
A training step allocates and frees the same gigabytes each time, so on a CPU a tenth of its time goes into clearing
pages. Two settings of the allocator stop that; they are per process, take effect for what is allocated afterwards, and
cost that a process keeps its largest step's memory until it ends.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_NEVER = 2**31 - 1
_GROWTH = 64 << 20  # bytes by which the heap grows


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; False where the allocator is another one and nothing was changed."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(_MMAP_THRESHOLD, _NEVER), mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_TOP_PAD, _GROWTH)]
    return accepted == [1, 1, 1]
