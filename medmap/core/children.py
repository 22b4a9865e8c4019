"""Processes that work for another one, and have no use once it is gone."""

from __future__ import annotations

import os
import threading
import time

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
