"""What can be known before the work: is the place writable, is there room, is every package there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from medmap.data.filenames import SUFFIXES, refuse_foreign
from medmap.errors import InputError


def writable(path: Path, what: str = "the result") -> None:
    """Raises InputError unless a file can be made in the folder ``path``, or in the nearest existing one above it."""
    refuse_foreign(path)
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    reason = f"{place} is a file"
    if place.is_dir():
        try:
            with tempfile.TemporaryFile(dir=place):
                return
        except OSError as error:
            reason = f"{place}: {error.strerror}"
    raise InputError(f"{path}: {what} cannot be written there ({reason}); name a place you may write to with -o")


def mask_name(path: Path) -> None:
    """Raises InputError unless ``path`` can be the name of a mask."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the mask itself, -o {path / 'seg.nii.gz'}")
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: masks are written as .nii.gz (or .nii); give it such a name, -o {path}.nii.gz")
    refuse_foreign(path)
    writable(path.parent, "the mask")


def no_input_among(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Raises InputError where a file that would be written is one of those that are read, by whatever name."""
    there = [path for path in written if path.exists()]
    inputs = {_identity(path): path for path in read if path.exists()} if there else {}
    for path in there:
        if _identity(path) in inputs:
            raise InputError(
                f"{path}: is the input {inputs[_identity(path)]} itself; give the mask another name or place with -o"
            )


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def room(path: Path, needed_bytes: int, what: str) -> None:
    """Raises InputError unless the disk has room."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise InputError(
            f"{path}: {what} takes about {needed_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room or "
            "name another disk with -o"
        )


def packages(extra: str, *modules: str) -> None:
    """Raises InputError unless the modules of an optional part are installed."""
    lacking = [name for name in modules if find_spec(name) is None]
    if lacking:
        raise InputError(f"{', '.join(lacking)} not installed; this part needs it: pip install 'medmap[{extra}]'")


def existing(path: Path, what: str) -> None:
    """Raises InputError unless the path exists and may be read."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected {what}. Check the path")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: may not be read; expected {what}. Check its permissions")
