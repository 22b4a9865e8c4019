"""Keeping freed memory: what the system is asked for, counted in page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
import numpy as np
from medmap.core.memory import keep_freed_memory
kept = keep_freed_memory()
np.ones(40 * 2**20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(40 * 2**20, np.uint8)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(environment: dict[str, str]) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env={**environment, "PATH": ""}
    )
    kept, faults = done.stdout.split()
    return kept == "1", int(faults)


def test_a_freed_block_is_used_again_without_asking_the_system() -> None:
    kept, faults = _faults({})
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert faults < 100  # five blocks of 40 MiB are 51 200 pages of 4 KiB


def test_it_can_be_switched_off() -> None:
    assert _faults({"MEDMAP_KEEP_MEMORY": "0"})[0] is False


HUGE = """
import re, sys
from pathlib import Path
import numpy as np
from medmap.core.memory import keep_freed_memory
kept = keep_freed_memory()
def size(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text()).group(1)) / 1024
idle = size("Rss")
blocks = [np.ones(40 * 2**20, np.uint8) for _ in range(5)]
print(int(kept), idle, size("AnonHugePages"))
"""
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not MODE.is_file() or "[never]" in MODE.read_text(), reason="this system has no huge pages")
def test_kept_memory_lies_on_huge_pages_and_is_not_taken_before_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True, env={"PATH": ""})
    kept, idle_mib, huge_mib = (float(word) for word in done.stdout.split())
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert idle_mib < 200
    assert huge_mib > 100  # of 200; the system may have too few free ones for all
