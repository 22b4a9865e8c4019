"""How processes end: with the one they work for, and tidily where they are told to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

WATCH_S = 2.0
"""So often a process looks whether its parent is still there."""


def end_with(parent: int) -> None:
    """From now on this process ends when its parent does, however that ended; call it first in a child.

    parent: the parent's process id, as the parent itself tells it
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as an exception, so that what was opened is closed.

    A signal that is passed over, as SIGHUP is under nohup, stays so. Only the main thread may listen to signals: in
    another one nothing changes.
    """

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if main and hasattr(signal, name)]
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):
                signal.signal(number, handler)
