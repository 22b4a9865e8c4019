"""Work for the tests of clusters: a module of its own, because workers find it by its name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from medmap.errors import CheckpointError, InputError

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
