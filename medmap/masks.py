"""Anybody's masks against the truth, with the same code as medmap's own.

A folder of masks holds files named by case: ``ID.nii.gz``, ``ID-seg.nii.gz``, ``ID_seg.nii.gz``. The truth may also be
a data set that `medmap check` recognises, with segmentations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from medmap.core.case import AFFINE_TOLERANCE_MM, Grid
from medmap.core.labels import LabelScheme, scheme_named
from medmap.core.modality import ModalitySet
from medmap.data.filenames import stem
from medmap.data.labelmaps import patient_of
from medmap.data.layouts import recognise
from medmap.data.nifti import is_nifti, read_header, read_labels
from medmap.errors import InputError
from medmap.scores import Progress, Score, score_classes, write_scores
from medmap.segment import record_path

GIVEN = "given"


def score_folders(
    predictions: Path,
    truth: Path,
    labels: str | None = None,
    out: Path | None = None,
    *,
    prediction_labels: str | None = None,
    convention: str = "brats",
    et_min_ml: float = 0.5,
    on_progress: Progress = lambda case, done, total: None,
) -> dict[str, Any]:
    """Score a folder of masks against a folder of truths; returns the summary, and writes it into ``out`` if named.

    labels: scheme of the truth's codes, needed where the folder's names do not decide it; prediction_labels: of the
    predictions' codes; where None what the JSON beside them says, or else the truth's

    Raises InputError where a case has no partner, grids differ (naming both files) or the scheme is undecided.
    """
    masks, (truths, scheme) = _masks(predictions), _truths(truth, labels)
    masks = {
        case: masks[name] for case in truths if (name := case if case in masks else quote(case, safe=" ")) in masks
    }
    theirs = _scheme_of(masks.values(), scheme) if prediction_labels is None else scheme_named(prediction_labels)
    if not theirs.same_classes(scheme):
        raise InputError(f"label schemes {theirs.name} and {scheme.name} mean other classes and cannot be compared")
    missing = sorted(truths.keys() - masks.keys())
    if missing:
        raise InputError(
            f"{predictions}: no mask for {len(missing)} of {len(truths)} cases ({', '.join(missing[:5])}); expected "
            "ID.nii.gz or ID-seg.nii.gz. A case that is left out would make the mean look better than it is"
        )
    rows = []
    for number, (case, file) in enumerate(sorted(truths.items()), start=1):
        grid = _same_grid(masks[case], file)
        scores = score_classes(
            theirs.encode(read_labels(masks[case])[0], str(masks[case])),
            scheme.encode(read_labels(file)[0], str(file)),
            grid.spacing_mm,
            scheme,
            et_min_ml=et_min_ml,
            convention=convention,
        )
        rows += [Score(case, patient_of(case), GIVEN, r, metric, value) for (r, metric), value in scores.items()]
        on_progress(case, number, len(truths))
    about = {"evaluated": f"masks of {predictions.name} against {truth.name}", "runs": 1}
    return write_scores(out, rows, ModalitySet((GIVEN,)), scheme, convention, [], about)


def _masks(folder: Path) -> dict[str, Path]:
    """{case: file} of a folder of masks."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds a mask a case")
    files = sorted(path for path in folder.rglob("*.nii*") if is_nifti(path))
    segmentations = [path for path in files if re.search(r"[-_.]seg", stem(path), re.IGNORECASE)]
    found: dict[str, Path] = {}
    for path in segmentations or files:
        case = re.sub(r"[-_.]seg.*$", "", stem(path), flags=re.IGNORECASE)
        if case in found:
            raise InputError(f"{path} and {found[case]} are both masks of {case}; keep one")
        found[case] = path
    if not found:
        raise InputError(f"{folder}: no NIfTI file in it; expected ID.nii.gz or ID-seg.nii.gz")
    return found


def _scheme_of(masks: Iterable[Path], usual: LabelScheme) -> LabelScheme:
    """What the codes of masks mean: what medmap wrote beside them, the usual where nothing is.

    Raises InputError where that differs between masks, or names a scheme that nobody knows.
    """
    named: dict[str, Path] = {}
    for mask in masks:
        try:
            named[json.loads(record_path(mask).read_text(encoding="utf-8"))["labels"]["scheme"]] = mask
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not named or set(named) == {usual.name}:
        return usual
    if len(named) > 1:
        found = ", ".join(f"{name} ({mask.name})" for name, mask in named.items())
        raise InputError(
            f"masks follow different label maps: {found}; make them again with one, or name it: --pred-labels"
        )
    (name,) = named
    return scheme_named(name)


def _truths(folder: Path, labels: str | None) -> tuple[dict[str, Path], LabelScheme]:
    """{case: file} of the true segmentations, and what their codes mean."""
    try:
        data = recognise(folder, labels)
    except InputError as error:
        if labels is None:
            raise InputError(f"{error}. A folder of masks alone needs the meaning of its codes: --labels") from error
        return _masks(folder), scheme_named(labels)
    truths = {case.id: case.labels for case in data.cases if case.labels is not None}
    if not truths and labels is not None:
        return _masks(folder), scheme_named(labels)
    if not truths:
        raise InputError(f"{folder}: no segmentation in it; name a folder of masks and their codes with --labels")
    if data.scheme is None:
        raise InputError(f"{folder}: which label map the codes follow is undecided; name it with --labels")
    return truths, data.scheme


def _same_grid(mask: Path, truth: Path) -> Grid:
    ours, theirs = read_header(mask).grid, read_header(truth).grid
    if not ours.matches(theirs):
        raise InputError(
            f"{mask} ({ours.shape}) and {truth} ({theirs.shape}) are not on one grid: shapes or affines differ by more "
            f"than {AFFINE_TOLERANCE_MM:g} mm; resample the mask onto the truth's grid with nearest neighbours"
        )
    return theirs
