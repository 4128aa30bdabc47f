"""Keep the memory that a training step frees, so that the next one gets it without asking the system, in huge pages.

glibc gives every large block back as soon as it is freed, and the system clears each page before it hands it out again.
A training step allocates and frees the same gigabytes each time, so on a CPU a tenth of its time goes into clearing
pages. Settings of the allocator stop that; they are per process, take effect for what is allocated afterwards, and cost
that a process keeps its largest step's memory until it ends.

A processor also looks up the place of each page, and with pages of 4 KiB the optimizer, which walks through hundreds of
megabytes, waits for that. So the heap is extended once, far beyond what is used (an address range costs nothing), and
the system is asked for huge pages in it: nothing has to be set before the process starts, as glibc's own option has to.
"""

import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_NEVER_TRIM = -1
_NEVER_MAP = 2**31 - 1
_GROWTH = 64 << 20  # bytes by which the heap grows
_HUGE = 2 << 20
_BLOCK = 1 << 30  # what is asked for at a time: larger ones may be mapped for themselves
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; False where the allocator is another one and nothing was changed."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _NEVER_MAP), (_TRIM_THRESHOLD, _NEVER_TRIM), (_TOP_PAD, _GROWTH))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]


def huge_pages_for_heap(share: float = 0.5) -> bool:
    """Extend the heap by `share` of the machine's memory, of which nothing is taken yet, and ask for huge pages there.

    To be called after `keep_freed_memory`, without which the heap would shrink again. False where the system does not give
    huge pages on request, or not so large a range of addresses; then nothing was changed.
    """
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    if not _MODE.is_file() or "[never]" in _MODE.read_text() or not _addresses_are_free():
        return False
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.sbrk.restype = ctypes.c_void_p
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = int(share * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    blocks: list[int] = [library.malloc(_BLOCK) or 0 for _ in range(size // _BLOCK)]
    end: int = library.sbrk(0)
    # A block beyond the heap's end was mapped for itself, for want of addresses, and goes back when it is freed.
    inside = [block for block in blocks if block and block + _BLOCK <= end]
    for block in blocks:
        library.free(block)
    if not inside:
        return False
    first, last = -(-inside[0] // _HUGE) * _HUGE, end // _HUGE * _HUGE
    return library.madvise(first, last - first, mmap.MADV_HUGEPAGE) == 0


def _addresses_are_free() -> bool:
    """Whether a range of addresses costs nothing here: it is not counted as memory, and no limit of the process counts it."""
    if _OVERCOMMIT.is_file() and _OVERCOMMIT.read_text().strip() == "2":
        return False
    return all(resource.getrlimit(limit)[0] == resource.RLIM_INFINITY for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
