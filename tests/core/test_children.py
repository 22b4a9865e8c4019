"""A process ends with its parent, even with one that was killed and could not say goodbye; and tidily if told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medmap.core.children import ending

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


TOLD = """
import signal, sys
from medmap.core.children import ending
number = int(sys.argv[1])
before = signal.signal(number, signal.SIG_IGN if sys.argv[2:] else signal.SIG_DFL)
try:
    with ending():
        try:
            signal.raise_signal(number)
        finally:
            print("closed")
finally:
    print(signal.getsignal(number).name)
"""
"""In a process of its own: where tests share one with others, a signal that is not caught would end them all."""


def told(number: signal.Signals, *more: str) -> tuple[int, list[str]]:
    """Exit code and lines of a process that sends itself a signal."""
    root = str(Path(__file__).parents[2])
    words = [sys.executable, "-c", TOLD, str(int(number)), *more]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, check=False)
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_process_as_an_exception(number: signal.Signals) -> None:
    assert told(number) == (128 + number, ["closed", "SIG_DFL"])


def test_a_signal_that_is_passed_over_stays_so() -> None:
    assert told(signal.SIGHUP, "as nohup does") == (0, ["closed", "SIG_IGN"])


def test_other_threads_may_ask_for_it_and_change_nothing() -> None:
    before, met = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with ending():
            met.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert met == [before]
