"""Keeping freed memory: what the system is asked for, counted in page faults."""

from __future__ import annotations

import subprocess
import sys

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
