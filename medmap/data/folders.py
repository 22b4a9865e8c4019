"""What lies below a folder, and the JSON tables in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medmap.errors import InputError


def walk(root: Path, depth: int | None = None) -> Iterator[tuple[Path, list[Path]]]:
    """Folders from the root down, each with its files, in the order of names; what is hidden is left out.

    depth: how many levels below the root; all where None

    Links are followed, as data sets are often folders of links; a folder that several ways lead to comes once, so
    that links in a circle end.
    """
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        here, real = Path(folder), os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        deepest = depth is not None and len(here.relative_to(root).parts) >= depth
        below[:] = [] if deepest else sorted(name for name in below if not name.startswith("."))
        yield here, [here / name for name in sorted(names) if not name.startswith(".") and (here / name).is_file()]


def files_below(root: Path) -> list[Path]:
    """All files that `walk` finds, in the order of their paths."""
    return sorted(path for _, files in walk(root) for path in files)


def json_table(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file. Raises InputError for anything else in it."""
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); mend it") from error
    if not isinstance(table, dict):
        raise InputError(f"{path}: found a {type(table).__name__}; expected an object with names")
    return table
