"""How a store lies on disk: names, grids and boxes as plain types, files that are whole or absent.

STORE/manifest.json              settings, and the record of every case
STORE/cases/ID/case.json         one case's record: sources with SHA-256, both grids (the way back), boxes
STORE/cases/ID/{t1n,…}.npy       Float16[x y z], z-scored, on its own brain box
STORE/cases/ID/labels.npy        UInt8[x y z] class indices, on its own box
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medmap.core.box import Box, Boxed
from medmap.core.case import Grid, Prepared
from medmap.errors import InputError

FORMAT = 1
LABELS = "labels"
MANIFEST = "manifest.json"
RECORD = "case.json"
_KEYS = {"format", "spacing_mm", "scheme", "family", "evidence", "complete", "modalities", "cases", "failed"}


def case_folder(store: Path, case_id: str) -> Path:
    """Where a case lies; signs that a file system might refuse are percent-encoded."""
    return store / "cases" / _safe(case_id)


def array_file(name: str) -> str:
    """File name of a sequence's array, or of ``labels``."""
    return f"{_safe(name)}.npy"


def temporary(path: Path) -> Path:
    """A hidden name beside ``path``, for what is not whole yet."""
    return path.with_name(f".{path.name}.partial")


def plain_grid(grid: Grid) -> dict[str, Any]:
    """A grid in plain types; floats keep every bit in JSON."""
    return {"shape": list(grid.shape), "affine": grid.affine.tolist()}


def grid_of(data: Mapping[str, Any]) -> Grid:
    """The inverse of `plain_grid`."""
    x, y, z = data["shape"]
    return Grid((x, y, z), np.array(data["affine"], np.float64))


def plain_box(box: Box) -> dict[str, Any]:
    """A box in plain types."""
    return {"start": list(box.start), "stop": list(box.stop)}


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array as ``.npy`` and wait until it is on the disk."""
    with open(path, "wb") as file:
        np.save(file, np.ascontiguousarray(values), allow_pickle=False)
        _flush(file)


def write_case(place: Path, prepared: Prepared, record: Mapping[str, Any]) -> None:
    """All files of a case under a temporary name, then one rename."""
    partial, old = temporary(place), place.with_name(f".{place.name}.old")
    partial.mkdir(parents=True)
    volumes = dict(prepared.images) if prepared.labels is None else {**prepared.images, LABELS: prepared.labels}
    for name, boxed in volumes.items():
        write_array(partial / array_file(name), boxed.values)
    write_json(partial / RECORD, record)
    if place.exists():
        os.replace(place, old)
    os.replace(partial, place)
    shutil.rmtree(old, ignore_errors=True)


def sweep(store: Path) -> None:
    """Remove what an interrupted call left half-written."""
    for pattern in (".*.partial", ".*.old"):
        for leftover in (store / "cases").glob(pattern):
            shutil.rmtree(leftover)


def read_boxed(path: Path, box: Mapping[str, Any], dtype: DTypeLike) -> Boxed:
    """An array, mapped read-only, on its box. Raises InputError where it is absent, cut off or not what was written."""
    where = Box(tuple(box["start"]), tuple(box["stop"]))
    try:
        # an array without voxels cannot be mapped
        values = np.load(path, mmap_mode="r" if 0 not in where.shape else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if getattr(error, "errno", None) == errno.EMFILE:
            # each mapped array keeps its file open for as long as it lives
            raise InputError(
                f"{path}: too many arrays are open at once; allow more open files: ulimit -n 65536"
            ) from error
        raise InputError(f"{path}: damaged or absent ({error}); {_CURE.format(path.parent)}") from error
    if values.shape != where.shape or values.dtype != np.dtype(dtype):
        raise InputError(
            f"{path}: found {values.dtype} {values.shape}, the manifest says {np.dtype(dtype)} {where.shape}; "
            f"{_CURE.format(path.parent)}"
        )
    return Boxed(values, where)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, wait until it is on the disk, and rename it."""
    partial = temporary(path)
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        _flush(file)
    os.replace(partial, path)


def read_manifest(store: Path) -> dict[str, Any]:
    """A store's manifest. Raises InputError for a folder without one, a damaged one, or one of another format."""
    path = store / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{store}: no store, {MANIFEST} cannot be read ({error.strerror}); make one: medmap prepare PATH -o {store}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); delete it and {store / 'cases'}, and prepare again") from error
    if not isinstance(manifest, dict) or not set(manifest) >= _KEYS:
        raise InputError(f"{path}: not the manifest of a store; expected the keys {', '.join(sorted(_KEYS))}")
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{path}: is of format {manifest['format']}, this medmap reads {FORMAT}; prepare the data again"
        )
    return manifest


def read_record(path: Path) -> dict[str, Any] | None:
    """One case's record, or None where it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"id", "sources", "images"} <= set(record) else None


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Turn what the system raises while a store is written into one InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{store}: cannot be written ({error.strerror or error}); choose a place with -o that may be written to "
            "and has room. What is done stays: the same command goes on from there"
        ) from error


def _safe(name: str) -> str:
    encoded = quote(name, safe=" ")
    return f"%2E{encoded[1:]}" if encoded.startswith(".") else encoded


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


_CURE = "delete {} and run medmap prepare again"
