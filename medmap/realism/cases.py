"""Cases as the measurements want them: turned to RAS+, labels in class indices, cut to the brain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Box, bounding_box
from medmap.core.case import Case
from medmap.core.volume import to_ras
from medmap.data.cases import CaseFiles, read_case
from medmap.data.layouts import recognise
from medmap.data.nifti import read_labels
from medmap.errors import InputError

MARGIN_VOXELS = 4


def found_cases(folders: Iterable[Path | str], ids: Iterable[str] | None = None) -> list[CaseFiles]:
    """Cases of data folders in any layout that medmap knows; no image is read.

    ids: names of the cases that may be looked at; None for all

    Raises InputError for an id that no folder has, a case without segmentation or without a known label map.
    """
    cases = [case for folder in folders for case in recognise(folder).cases]
    if ids is not None:
        wanted = set(ids)
        if unknown := sorted(wanted - {case.id for case in cases}):
            raise InputError(f"case {', '.join(unknown)}: in none of the folders; they hold {cases[0].id} … and others")
        cases = [case for case in cases if case.id in wanted]
    for case in cases:
        if case.labels is None or case.scheme is None:
            raise InputError(f"case {case.id}: expected a segmentation whose label map is known; leave it out")
    return cases


def read_cases(cases: Iterable[CaseFiles]) -> Iterator[Case]:
    """Read one case after the other; see `upright`."""
    for files in cases:
        assert files.scheme is not None
        case = read_case(files)
        assert case.labels is not None
        labels = files.scheme.encode(case.labels, f"case {case.id}: labels")
        yield upright(Case(case.id, case.images, case.affine, labels))


def tumours(cases: Iterable[CaseFiles]) -> Iterator[tuple[NDArray[np.uint8], tuple[float, float, float]]]:
    """Class indices [X Y Z] and voxel size in mm of each case, without reading its images."""
    for files in cases:
        assert files.scheme is not None
        assert files.labels is not None
        codes, affine = read_labels(files.labels)
        x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
        yield files.scheme.encode(codes, f"case {files.id}: labels"), (float(x), float(y), float(z))


def upright(case: Case) -> Case:
    """The case in RAS+, cut to the box of its brain and a margin. No voxel value changes."""
    images = {name: to_ras(image, case.affine)[0] for name, image in case.images.items()}
    affine = to_ras(next(iter(case.images.values())), case.affine)[1]
    labels = None if case.labels is None else to_ras(case.labels, case.affine)[0]
    boxes = [box for image in images.values() if (box := bounding_box(image)) is not None]
    if not boxes:
        raise InputError(f"case {case.id}: is 0 everywhere; expected images of a brain")
    tight = Box.union(boxes)
    low, high = (tuple(v + d for v in at) for at, d in ((tight.start, -MARGIN_VOXELS), (tight.stop, MARGIN_VOXELS)))
    box = Box(low, high).within(next(iter(images.values())).shape)
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(box.start)
    cut = {name: np.ascontiguousarray(image[box.slices]) for name, image in images.items()}
    return Case(case.id, cut, affine, None if labels is None else np.ascontiguousarray(labels[box.slices]))
