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
    (both are named), and where none of the wanted sequences exists.
    """
    wanted = files.images if modalities is None else {canonical(name): None for name in modalities}
    names = [name for name in files.images if name in wanted]
    if not names:
        raise InputError(
            f"case {files.id}: has {', '.join(files.images)}, none of {', '.join(wanted)}; name one it has"
        )
    refs = [files.images[name] for name in names]
    first = read_header(refs[0].path)
    for other in [ref.path for ref in refs[1:]] + ([] if files.labels is None else [files.labels]):
        if what := grid_conflict(first, read_header(other)):
            raise InputError(f"case {files.id}: {what[0]}; {what[1]}")
    images = {name: read_volume(ref.path, ref.channel)[0] for name, ref in zip(names, refs, strict=True)}
    labels = None if files.labels is None else read_labels(files.labels)[0]
    return Case(files.id, images, first.affine, labels)


def grid_conflict(first: Header, other: Header) -> tuple[str, str] | None:
    """What keeps two headers from sharing one grid and what to do about it; None where they do share it."""
    if first.grid.matches(other.grid):
        return None
    if first.shape[:3] != other.shape[:3]:
        sizes = [f"{h.path.name} is {'×'.join(map(str, h.shape[:3]))} voxels" for h in (other, first)]
        return ", ".join(
            sizes
        ), "resample them onto one grid (medmap predict --resample) if they are registered, else register them"
    gap = float(np.abs(first.affine - other.affine).max())
    return (
        f"the affines of {first.path.name} and {other.path.name} differ by up to {gap:.3g} mm "
        f"(at most {AFFINE_TOLERANCE_MM:g} allowed)",
        "find out which file is right and copy its header, or resample onto it (medmap predict --resample)",
    )
