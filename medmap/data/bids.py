"""Masks as a BIDS derivative: names of files, what describes the data set, the table of labels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import medmap
from medmap.core.labels import LabelScheme
from medmap.data.cases import ImageRef
from medmap.data.colours import CLASS_NAMES, class_colour
from medmap.errors import InputError

BIDS_VERSION = "1.10.0"
"""Of the specification that the names follow."""


def entities(case: str) -> str:
    """Subject, and session where the case's name is one of BIDS; other names lose what BIDS does not allow.

    >>> entities("sub-01_ses-2"), entities("BraTS-GLI-00001-000")
    ('sub-01_ses-2', 'sub-BraTSGLI00001000')

    Raises InputError for a name without letters or digits.
    """
    found = re.fullmatch(r"(sub-[0-9A-Za-z+]+)(_ses-[0-9A-Za-z+]+)?", case)
    if found:
        return case
    label = re.sub(r"[^0-9A-Za-z]", "", case)
    if not label:
        raise InputError(f"case {case}: its name holds neither letters nor digits; BIDS needs some; rename it")
    return f"sub-{label}"


def mask_path(case: str) -> Path:
    """Where a case's mask lies in the data set.

    >>> mask_path("sub-01_ses-2").as_posix()
    'sub-01/ses-2/anat/sub-01_ses-2_space-orig_dseg.nii.gz'
    """
    name = entities(case)
    return Path(*name.split("_"), "anat", f"{name}_space-orig_dseg.nii.gz")


def sidecar(images: Iterable[ImageRef], folder: Path) -> dict[str, Any]:
    """What BIDS wants to know of a mask: that nobody drew it, its sources, and whose space it has (the first one's)."""
    root = folder.parent if folder.is_file() else folder
    sources = []
    for ref in images:
        inside = ref.path.resolve().is_relative_to(root.resolve())
        sources.append(
            f"bids:raw:{ref.path.resolve().relative_to(root.resolve()).as_posix()}" if inside else ref.path.as_uri()
        )
    return {"Manual": False, "Sources": sources, "SpatialReference": sources[0]}


def refuse_twins(cases: Iterable[str]) -> None:
    """Raises InputError where two cases would get one name."""
    seen: dict[Path, str] = {}
    for case in cases:
        path = mask_path(case)
        if path in seen:
            raise InputError(f"{seen[path]} and {case}: both would be {entities(case)} in BIDS; rename one of them")
        seen[path] = case


def write_dataset(out: Path, folder: Path, scheme: LabelScheme) -> None:
    """Write ``dataset_description.json`` and ``dseg.tsv`` at the root of the data set.

    Raises InputError where the place cannot be written, and where another description is there.
    """
    raw = os.path.relpath((folder.parent if folder.is_file() else folder).resolve(), out.resolve())
    description = {
        "Name": "Segmentations by medmap",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "medmap", "Version": medmap.__version__}],
        "SourceDatasets": [{"URL": Path(raw).as_posix()}],
        "DatasetLinks": {"raw": Path(raw).as_posix()},
    }
    rows = [("index", "name", "abbreviation", "color")]
    for name, code in sorted(scheme.codes.items(), key=lambda item: item[1]):
        rows.append((str(code), CLASS_NAMES.get(name, name), name.upper(), class_colour(scheme, name)))
    file = out / "dataset_description.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists() and "medmap" not in file.read_text(encoding="utf-8"):
            raise InputError(f"{file}: describes another data set; give the masks a folder of their own with -o")
        for path, text in (
            (file, json.dumps(description, indent=1, ensure_ascii=False) + "\n"),
            (out / "dseg.tsv", "".join("\t".join(row) + "\n" for row in rows)),
        ):
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, path)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); name another folder with -o"
        ) from error
