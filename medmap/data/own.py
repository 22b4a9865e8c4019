"""Which masks medmap itself made: they lie among the images, and are no truth to learn from or to be measured by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmap.data.filenames import stem
from medmap.data.folders import json_table


def by_medmap(mask: Path, root: Path) -> bool:
    """Whether the JSON beside a mask, or the description of the data set that it lies in, says that medmap made it.

    root: of the data set; descriptions above it do not count

    One that a person has corrected, and says so with ``"Manual": true``, is that person's. Raises InputError for JSON
    that cannot be read.
    """
    about = beside(mask)
    if about.get("Manual") is True:
        return False
    versions = about.get("versions")  # `medmap.segment` writes them
    return (
        recorded(mask)
        or (isinstance(versions, dict) and "medmap" in versions)
        or _names_medmap(about, _description(mask, root))
    )


def no_truth(where: str, masks: Sequence[Path]) -> str:
    """The note that says why masks by medmap are left out, and what to do where one has become a person's."""
    names = ", ".join(path.name for path in masks[:4]) + (" …" if len(masks) > 4 else "")
    return (
        f"{where}: left out {names}: medmap made it, so it is no truth; once a person has corrected it, write "
        '"Manual": true into the JSON beside it'
    )


def recorded(file: Path) -> bool:
    """Whether a NIfTI file is a mask with medmap's record beside it, or a region of such a mask."""
    mask, _, region = stem(file).rpartition("-")
    return _record(file).is_file() or region in _regions(file.with_name(f"{mask}.medmap.json"))


def beside(mask: Path) -> dict[str, Any]:
    """What the JSON beside a mask says: ``NAME.json``, as BIDS has it, and the ``Manual`` of medmap's own record."""
    about = json_table(mask.with_name(f"{stem(mask)}.json")) or {}
    return about if "Manual" in about else about | {"Manual": (json_table(_record(mask)) or {}).get("Manual")}


def _record(mask: Path) -> Path:
    return mask.with_name(f"{stem(mask)}.medmap.json")  # as `medmap.segment` names it


def _regions(record: Path) -> set[str]:
    """What the record beside a mask tells of; nothing where there is none."""
    try:
        return set(json.loads(record.read_text(encoding="utf-8"))["volumes_ml"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _names_medmap(*tables: dict[str, Any]) -> bool:
    made = [table.get("GeneratedBy") for table in tables]
    tools = [tool for entry in made for tool in (entry if isinstance(entry, list) else [entry])]
    return any(isinstance(tool, dict) and str(tool.get("Name")).strip().lower() == "medmap" for tool in tools)


def _description(file: Path, root: Path) -> dict[str, Any]:
    """Of the innermost data set that holds a file: derivatives lie inside of what they are made from."""
    folders = (folder for folder in file.parents if folder.is_relative_to(root))
    tables = (json_table(folder / "dataset_description.json") for folder in folders)
    return next((table for table in tables if table is not None), {})
