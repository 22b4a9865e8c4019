"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any

SWITCH = "MEDMAP_KEEP_MEMORY"
"""Set to 0, a process gives freed memory back at once, as the C library does by default."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h

NEVER = -1
STEP_BYTES = 256 * 2**20
HUGE_PAGE, MADV_HUGEPAGE = 2 * 2**20, 14  # Linux


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor instead of giving it back to the system; true where that was arranged.

    glibc maps every large block afresh and unmaps it when it is freed, so that each operation on a volume first waits
    for the system to clear its pages: a tenth of the time of a training step or of a phantom. What is kept lies on
    pages of 2 MiB where the system has them, which a core reads ahead of itself; across pages of 4 KiB it does not.
    The price is that the process stays as large as it once was. Does nothing with other C libraries, or with
    ``MEDMAP_KEEP_MEMORY=0``.

    >>> keep_freed_memory() in (True, False)
    True
    """
    if os.environ.get(SWITCH) == "0":
        return False
    with suppress(OSError, AttributeError):  # no such library, or one without mallopt
        library = ctypes.CDLL("libc.so.6")
        settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, STEP_BYTES))
        kept = [library.mallopt(option, value) for option, value in settings] == [1, 1, 1]
        if kept:
            _ask_for_huge_pages(library)
        return kept
    return False


def _ask_for_huge_pages(library: Any) -> None:
    """For the addresses that tensors will get: half as many as there is memory. None of it is taken before it is used.

    Addresses that the heap grows into later would have to be asked for again, so it grows first and is freed.
    """
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if block := library.malloc(size):
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        library.madvise(first, (block + size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        library.free(block)
