"""A process ends with its parent, even with one that was killed and could not say goodbye."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

CHILD = "import sys, time; from medmap.core.children import end_with; end_with(int(sys.argv[1])); time.sleep(60)"
PARENT = f"""
import os, subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())]).pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split() if Path("/proc").is_dir() else True


def test_a_process_ends_with_a_parent_that_was_killed() -> None:
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(child)
