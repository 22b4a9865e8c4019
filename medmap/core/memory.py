"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

SWITCH = "MEDMAP_KEEP_MEMORY"
"""Set to 0, a process gives freed memory back at once, as the C library does by default."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h

STEP_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor instead of giving it back to the system; true where that was arranged.

    glibc maps every large block afresh and unmaps it when it is freed, so that each operation on a volume first waits
    for the system to clear its pages: a tenth of the time of a training step or of a phantom. The price is that the
    process stays as large as it once was. Does nothing with other C libraries, or with ``MEDMAP_KEEP_MEMORY=0``.

    >>> keep_freed_memory() in (True, False)
    True
    """
    if os.environ.get(SWITCH) == "0":
        return False
    with suppress(OSError, AttributeError):  # no such library, or one without mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, STEP_BYTES))
        return [mallopt(option, value) for option, value in settings] == [1, 1, 1]
    return False
