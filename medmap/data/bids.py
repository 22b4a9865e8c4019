"""Masks as a BIDS derivative: names of files, what describes the data set, the table of labels.

And the other way round: which masks of a BIDS data set are the truth, since medmap's own lie in it beside them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import medmap
from medmap.core.labels import LabelScheme
from medmap.data.cases import ImageRef
from medmap.data.colours import CLASS_NAMES, class_colour
from medmap.data.filenames import bids_case, stem
from medmap.data.folders import files_below
from medmap.data.nifti import is_nifti
from medmap.data.own import beside, by_medmap
from medmap.data.whole import whole
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
    root = _absolute(folder.parent if folder.is_file() else folder)
    sources = [_uri(_absolute(ref.path), root) for ref in images]
    return {"Manual": False, "Sources": sources, "SpatialReference": sources[0]}


def truths(root: Path, cases: Collection[str]) -> tuple[dict[str, Path], list[Path]]:
    """{case: its segmentation}: the ``*_dseg`` anywhere in a BIDS data set; and those that medmap made, which are none.

    cases: subjects and sessions that have images; others' masks are not looked at

    Raises InputError for JSON that cannot be read, and where a case has several masks, unless the sidecar of exactly
    one says ``"Manual": true``.
    """
    found: dict[str, list[Path]] = {}
    own: list[Path] = []
    for path in files_below(root) if cases else []:
        case = bids_case(path)
        if case in cases and is_nifti(path) and stem(path).endswith("_dseg"):
            (own if by_medmap(path, root) else found.setdefault(case, [])).append(path)
    return {case: _only(case, paths, root) for case, paths in found.items()}, own


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
            with whole(path) as (fresh,):
                fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); name another folder with -o"
        ) from error


def _absolute(path: Path) -> Path:
    """As it is named from the root of the disk. Links stay: those of git-annex lead to files that have no names."""
    return Path(os.path.abspath(path))


def _uri(path: Path, root: Path) -> str:
    return f"bids:raw:{path.relative_to(root).as_posix()}" if path.is_relative_to(root) else path.as_uri()


def _only(case: str, masks: list[Path], root: Path) -> Path:
    """The one mask of a case; of several, the one that was drawn by hand."""
    drawn = [mask for mask in masks if beside(mask).get("Manual") is True]
    left = drawn if len(drawn) == 1 else masks
    if len(left) > 1:
        names = ", ".join(mask.relative_to(root).as_posix() for mask in masks)
        raise InputError(
            f"{root}: case {case} has {len(masks)} segmentations ({names}); expected one. Keep the true one, or write "
            '"Manual": true into the JSON beside it and no other, or describe the cases by a CSV table'
        )
    return left[0]
