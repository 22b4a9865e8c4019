"""What the user sees: results and remarks on stdout, warnings and progress on stderr, JSON alone where it is asked for.

Progress is a bar on a terminal and plain lines elsewhere, both with the time that is left.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EVERY_S = 10.0
"""Plain progress lines are at least this many seconds apart."""

Report = Callable[[int, int, str], None]
"""Called with (done, total, text)."""


@dataclass
class Manner:
    """How this call talks: quiet (results, warnings and errors only), verbose, with tracebacks, in JSON.

    silent: not at all but for errors, as another process says the same; echo: nor about errors
    """

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    json: bool = False
    silent: bool = False
    echo: bool = False


MANNER = Manner()


def begin(*, quiet: bool = False, verbose: bool = False, debug: bool = False) -> None:
    """Set the manner of one call."""
    MANNER.quiet, MANNER.verbose, MANNER.debug, MANNER.json = quiet, verbose, debug, False
    MANNER.silent = MANNER.echo = False


def answer(text: str) -> None:
    """A result; left out where the answer is JSON."""
    if not MANNER.json and not MANNER.silent:
        print(text)


def answer_json(data: Any) -> None:
    """The result as JSON, the only thing on stdout."""
    if not MANNER.silent:
        print(json.dumps(data, indent=1, ensure_ascii=False))


def say(text: str) -> None:
    """A remark: what is being done, what to do next."""
    if not MANNER.quiet and not MANNER.silent:
        print(text, file=sys.stderr if MANNER.json else sys.stdout, flush=True)


def detail(text: str) -> None:
    """A remark for --verbose."""
    if MANNER.verbose:
        say(text)


def warn(text: str) -> None:
    """Something the user had better know."""
    if not MANNER.silent:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """Why it did not work."""
    if not MANNER.echo:
        print("error: " + text.replace("\n", "\n  "), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, start: int = 0) -> Iterator[Report]:
    """A function to be called with (done, total, text) as the work goes on; ``start`` steps were done before."""
    if MANNER.quiet or MANNER.silent:
        yield lambda done, total, text: None
    elif sys.stderr.isatty():
        yield from _bar(title)
    else:
        yield _Lines(title, start)


def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, text="")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)


class _Lines:
    """Progress where there is no terminal."""

    def __init__(self, title: str, start: int) -> None:
        self.title, self.start = title, start
        self.began = self.told = time.monotonic()

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if done < total and now - self.told < EVERY_S and not MANNER.verbose:
            return
        self.told = now
        spent = now - self.began
        left = spent / max(1, done - self.start) * (total - done)
        when = f"eta {clock(left)}" if done < total else clock(spent)
        line = f"{self.title} {done}/{total}  {when}  {text}".rstrip()
        print(line, file=sys.stderr, flush=True)


def count(number: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "case"), count(2, "case")
    ('1 case', '2 cases')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def clock(seconds: float) -> str:
    """Seconds as people write them.

    >>> clock(7.4), clock(75), clock(7260)
    ('7 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
