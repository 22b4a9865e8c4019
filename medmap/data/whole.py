"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def whole(*files: Path) -> Iterator[tuple[Path, ...]]:
    """Where to write files of one folder: they get their places together, in this order, once all are written.

    Until then they lie in a hidden folder beside, under their own names. Nothing of them stays where the block is left
    by an error or an interrupt, and what was there before stays as it was.

    Raises OSError where the folder is not there or may not be written to.
    """
    with TemporaryDirectory(prefix=".", suffix=".partial", dir=files[0].parent) as name:
        fresh = tuple(Path(name) / file.name for file in files)
        yield fresh
        for here, there in zip(fresh, files, strict=True):
            os.replace(here, there)
