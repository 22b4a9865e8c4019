"""One patient's files, a folder of them, and how a case is read: every volume on the one grid they must share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmap.core.case import AFFINE_TOLERANCE_MM, Case
from medmap.core.labels import LabelScheme
from medmap.core.modality import GLIOMA_MRI, canonical
from medmap.data.labelmaps import LabelMap
from medmap.data.nifti import Header, read_header, read_labels, read_volume
from medmap.errors import InputError

NOT_ASKED = LabelMap((), "nobody has said")

SPACING_MM = (0.2, 10.0)
"""Edges that a voxel of a scan can have; others are in another unit."""

MEND = "give the header its voxel size in mm: fslchpixdim FILE X Y Z, or nibabel as docs/data.md shows"
REGISTER = "antsRegistrationSyN.sh -d 3 -t r -f FIXED -m MOVING -o OUT"
STRIP = "strip it, each sequence: hd-bet -i IN -o OUT, or mri_synthstrip -i IN -o OUT"
"""Cures that several faults share."""


@dataclass(frozen=True)
class ImageRef:
    """Where a sequence lies: a file, and which of its volumes where it holds several."""

    path: Path
    channel: int | None = None


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case.

    id:      name of the case, unique in its folder
    patient: cases of one patient (time points, copies) share it; splits are made over patients
    group:   grade (HGG, LGG), collection or site where known, else empty
    images:  {modality: file}, what is there and nothing else
    labels:  segmentation, or None
    family:  layout of the names, a key of FAMILIES
    map:     what the segmentation's codes mean, or what they could mean
    """

    id: str
    patient: str
    group: str
    images: dict[str, ImageRef]
    labels: Path | None
    family: str = "plain"
    map: LabelMap = NOT_ASKED

    @property
    def scheme(self) -> LabelScheme | None:
        """The label map, None while undecided."""
        return self.map.scheme

    @property
    def files(self) -> dict[str, ImageRef]:
        """Images and, under ``seg``, the segmentation."""
        return self.images | ({} if self.labels is None else {"seg": ImageRef(self.labels)})


@dataclass(frozen=True)
class DataFolder:
    """A recognised data set.

    family:   key of FAMILIES that all cases share, or ``mixed``
    scheme:   label map that all segmented cases share; None where undecided, and where families with different maps
              are mixed (each case has its own then: ``case.scheme``)
    evidence: why this map, in words
    notes:    what was left out or chosen, one sentence each
    """

    root: Path
    family: str
    scheme: LabelScheme | None
    evidence: str
    cases: tuple[CaseFiles, ...]
    notes: tuple[str, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Sequences that at least one case has, in the usual order."""
        return ordered(name for case in self.cases for name in case.images)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Ids of the cases that have a segmentation whose codes nobody has explained."""
        return tuple(case.id for case in self.cases if case.labels is not None and case.scheme is None)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Modality names without repeats: the four usual ones first, in their order, then the others by alphabet."""
    there = set(names)
    return tuple([name for name in GLIOMA_MRI if name in there] + sorted(there - set(GLIOMA_MRI)))


def read_case(files: CaseFiles, modalities: Iterable[str] | None = None) -> Case:
    """Read one case: the volumes on the grid they share, labels in the file's own codes.

    modalities: names of the sequences that are wanted; all that are there where None. A wanted sequence that the case
                lacks is left out; at least one must be there.

    Raises InputError as `read_volume` does, where two files differ in shape or by more than 1e-3 mm in their affines
    (both are named), where lengths are not in mm, and where none of the wanted sequences exists.
    """
    wanted = files.images if modalities is None else {canonical(name): None for name in modalities}
    names = [name for name in files.images if name in wanted]
    if not names:
        raise InputError(
            f"case {files.id}: has {', '.join(files.images)}, none of {', '.join(wanted)}; name one it has"
        )
    refs = [files.images[name] for name in names]
    first = read_header(refs[0].path)
    if what := unit_fault(first):  # the others share its grid
        raise InputError(f"case {files.id}: {what[0]}; {what[1]}")
    for other in [ref.path for ref in refs[1:]] + ([] if files.labels is None else [files.labels]):
        if what := grid_conflict(first, read_header(other)):
            raise InputError(f"case {files.id}: {what[0]}; {what[1]}")
    images = {name: read_volume(ref.path, ref.channel)[0] for name, ref in zip(names, refs, strict=True)}
    labels = None if files.labels is None else read_labels(files.labels)[0]
    return Case(files.id, images, first.affine, labels)


def unit_fault(header: Header) -> tuple[str, str] | None:
    """Why a header's lengths cannot be taken for mm and what to do about it; None where they can."""
    edges = [round(mm, 4) for mm in header.grid.spacing_mm]
    size, (low, high) = "×".join(f"{edge:g}" for edge in edges), SPACING_MM
    if header.unit in ("meter", "micron"):
        return f"{header.path.name}: the header counts in {header.unit}s (voxels of {size}), mm are expected", MEND
    if low <= min(edges) and max(edges) <= high:
        return None
    return f"{header.path.name}: voxels of {size} mm, {low:g} to {high:g} mm are expected", MEND


def grid_conflict(first: Header, other: Header) -> tuple[str, str] | None:
    """What keeps two headers from sharing one grid and what to do about it; None where they do share it."""
    if first.grid.matches(other.grid):
        return None
    if first.shape[:3] != other.shape[:3]:
        sizes = [f"{h.path.name} is {'×'.join(map(str, h.shape[:3]))} voxels" for h in (other, first)]
        cure = f"resample them onto one grid (medmap predict --resample) if they are registered, else first {REGISTER}"
        return ", ".join(sizes), cure
    gap = float(np.abs(first.affine - other.affine).max())
    return (
        f"the affines of {first.path.name} and {other.path.name} differ by up to {gap:.3g} mm "
        f"(at most {AFFINE_TOLERANCE_MM:g} allowed)",
        "find out which file is right and copy its header, or resample onto it (medmap predict --resample)",
    )
