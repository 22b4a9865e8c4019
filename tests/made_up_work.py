"""Work for the tests of clusters: a module of its own, because workers find it by its name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from threading import Event

from medmap.errors import CheckpointError, InputError
from medmap.scale import Staged

PATIENCE_S = 60.0


class Square:
    """n → n²; negative numbers cannot be done, 0 is a bug."""

    def __call__(self, number: int) -> int:
        if number < 0:
            raise InputError(f"{number} is negative")
        return number * number * (number // number)


class Deadly:
    """Kills its process at some tasks: at each in ``always``, and once at ``once``, of which a file is the trace."""

    def __init__(self, once: int, trace: Path, always: tuple[int, ...] = ()) -> None:
        self.once, self.trace, self.always = once, trace, always

    def __call__(self, task: int) -> int:
        if task in self.always:
            os._exit(1)
        if task == self.once and not self.trace.exists():
            self.trace.touch()
            os._exit(1)
        return 10 * task


class Stuck:
    """One machine does a single task, then hangs; the others wait for it to have come so far."""

    def __init__(self, machine: str, trace: Path) -> None:
        self.machine, self.trace = machine, trace

    def __call__(self, task: int) -> tuple[int, str]:
        import ray

        here = ray.get_runtime_context().get_node_id()
        end = time.monotonic() + PATIENCE_S
        hang = here == self.machine and self.trace.exists()
        if here == self.machine:
            self.trace.touch()
        while time.monotonic() < end and (hang or not self.trace.exists()):
            time.sleep(0.02)
        return task, here


def no_model() -> Square:
    """A worker that cannot be made."""
    raise CheckpointError("no run there")


def no_part() -> Square:
    """A worker for which its machine lacks something."""
    raise KeyError("part")


def no_process() -> Square:
    """A worker whose process does not survive it."""
    os._exit(1)


class Stepwise(Staged[str, str]):
    """A word in capitals with a full stop; some words cannot be done at the step that they name."""

    def read(self, task: str) -> str:
        return self._step(task, "read")

    def compute(self, read: str) -> str:
        return self._step(read, "compute").upper()

    def write(self, computed: str) -> str:
        return self._step(computed.lower(), "write").upper() + "."

    def _step(self, word: str, step: str) -> str:
        if word == step:
            raise InputError(f"cannot {step}")
        return word if word != "bug" else word * (1 // 0)


class Overlapping(Staged[int, int]):
    """The network is at task 1 until task 2 was read, and until task 0 is being written."""

    def __init__(self) -> None:
        self.last_read, self.first_written = Event(), Event()

    def read(self, task: int) -> int:
        if task == 2:
            self.last_read.set()
        return task

    def compute(self, read: int) -> int:
        if read == 1:
            assert self.last_read.wait(PATIENCE_S)
            assert self.first_written.wait(PATIENCE_S)
        return read

    def write(self, computed: int) -> int:
        if computed == 0:
            self.first_written.set()
        return computed
