"""Where a prepared case came from: its files, their hashes, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmap.data.layouts import CaseFiles
from medmap.data.nifti import sha256
from medmap.data.record import LABELS
from medmap.errors import InputError


def source_files(files: CaseFiles) -> dict[str, tuple[Path, int | None]]:
    """{sequence or ``labels``: (file, which of its volumes)}."""
    sources: dict[str, tuple[Path, int | None]] = {name: (ref.path, ref.channel) for name, ref in files.images.items()}
    return sources if files.labels is None else {**sources, LABELS: (files.labels, None)}


def describe_sources(files: CaseFiles, root: Path) -> dict[str, dict[str, Any]]:
    """{sequence or ``labels``: file, channel, bytes, mtime_ns, ctime_ns, sha256}.

    A file of several volumes is hashed once.
    Paths are relative to ``root`` where they lie below it. Raises InputError for a file that cannot be read.
    """
    found = source_files(files)
    facts = {path: _facts(path, root) for path in {path for path, _ in found.values()}}
    return {name: {**facts[path], "channel": channel} for name, (path, channel) in found.items()}


def same_sources(files: CaseFiles, sources: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a case still has exactly these sources: size and times agree, or else size and SHA-256."""
    found = source_files(files)
    if {name: channel for name, (_, channel) in found.items()} != {n: s["channel"] for n, s in sources.items()}:
        return False
    return all(_same_file(path, sources[name]) for name, (path, _) in found.items())


def _facts(path: Path, root: Path) -> dict[str, Any]:
    try:
        stat = path.stat()  # before hashing: a file that changes meanwhile then counts as changed
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return {
        "file": path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "sha256": sha256(path),
    }


def _same_file(path: Path, source: Mapping[str, Any]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != source["bytes"]:
        return False
    # Two files that were exchanged keep their times of writing; the time of the change itself tells.
    untouched = (stat.st_mtime_ns, stat.st_ctime_ns) == (source["mtime_ns"], source.get("ctime_ns"))
    return untouched or sha256(path) == str(source["sha256"])
