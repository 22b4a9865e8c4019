"""One worker, and those who wait for it: what computes uses all cores, so that two at a time would only be slower."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from medmap.errors import InputError, MedmapError

Tell = Callable[[str], None]
"""Says what is being done now. Raises `Stopped` where nobody wants it any more."""

MOST_WAITING = 32


class Stopped(Exception):
    """The work is no longer wanted."""


@dataclass
class Job:
    """One piece of work. state: waiting, working, done, failed or gone

    result: what the work returned; text: what is being done, or why it failed
    """

    number: int
    owner: str
    work: Callable[[Tell], dict[str, Any]]
    state: str = "waiting"
    text: str = ""
    result: dict[str, Any] | None = None


class Desk:
    """Does one job after the other in a thread of its own.

    debug: print the traceback of what was not foreseen

    >>> desk = Desk()
    >>> job = desk.submit("ann", lambda tell: {"answer": 42})
    >>> desk.close()
    >>> desk.told(job)
    {'job': 1, 'state': 'done', 'result': {'answer': 42}}
    """

    def __init__(self, debug: bool = False) -> None:
        self._debug, self._numbers = debug, count(1)
        self._waiting: list[Job] = []
        self._now: Job | None = None
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="medmap-desk", daemon=True)
        self._thread.start()

    def submit(self, owner: str, work: Callable[[Tell], dict[str, Any]]) -> Job:
        """Take a job on; one of the same owner that still waits is given up for it.

        Raises InputError where too many wait.
        """
        with self._changed:
            self._give_up(owner)
            if len(self._waiting) >= MOST_WAITING:
                raise InputError(f"{len(self._waiting)} others are waiting, no more are let in; try again in a minute")
            job = Job(next(self._numbers), owner, work)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def told(self, job: Job) -> dict[str, Any]:
        """What a page wants to know of a job, in plain types; ``before``: how many are done first."""
        with self._changed:
            about: dict[str, Any] = {"job": job.number, "state": job.state}
            if job.state == "waiting":
                about["before"] = self._waiting.index(job) + (self._now is not None)
            if job.state in ("working", "failed"):
                about["text"] = job.text
            if job.state == "done":
                about["result"] = job.result
        return about

    def forget(self, owner: str) -> None:
        """Nobody waits for the jobs of this owner any more; one that is being done ends at its next step."""
        with self._changed:
            self._give_up(owner)
            if self._now is not None and self._now.owner == owner:
                self._now.state = "gone"

    def close(self, seconds: float = 5.0) -> None:
        """No further job is begun. Waits for the one that is being done, which writes nothing after its next step."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(seconds)

    def _give_up(self, owner: str) -> None:
        for job in [job for job in self._waiting if job.owner == owner]:
            job.state = "gone"
            self._waiting.remove(job)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._waiting:
                    return
                job = self._now = self._waiting.pop(0)
                job.state = "working"
            self._do(job)
            with self._changed:
                self._now = None

    def _do(self, job: Job) -> None:
        def tell(text: str) -> None:
            with self._changed:
                if job.state == "gone" or not self._open:
                    raise Stopped
                job.text = text

        state, text, result = "gone", "", None
        try:
            result = job.work(tell)
            state = "done"
        except Stopped:
            pass
        except MedmapError as error:
            state, text = "failed", str(error)
        except MemoryError:
            state, text = "failed", "not enough memory for these images; close other programs, or give fewer sequences"
        except Exception as error:  # whatever it is, the next patient is served
            if self._debug:
                traceback.print_exc()
            kind, words = type(error).__name__, " ".join(str(error).split())[:300]
            state, text = "failed", f"unexpected {kind}: {words}; start medmap serve with --debug and report it"
        with self._changed:
            if job.state != "gone":
                job.state, job.text, job.result = state, text, result
