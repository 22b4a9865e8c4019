"""What a DICOM study is here: volumes, their slices and headers; and how DICOM is told from other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.data.filenames import SUFFIXES
from medmap.data.folders import files_below
from medmap.data.own import recorded
from medmap.errors import InputError


@dataclass(frozen=True)
class Frame:
    """One slice: its file, which frame of the file it is, its identity, and where its first pixel lies (mm, LPS)."""

    path: Path
    index: int
    uid: str
    position_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Series:
    """One volume of a study.

    number:      series number, 0 where there is none
    part:        a, b … where the scanner's series holds several volumes, else empty
    uid:         SeriesInstanceUID
    headers:     {keyword of DICOM: value} of the first slice, from KEYWORDS; None for what is not there
    frames:      slices from the first to the last along the normal of `orientation`
    shape:       columns, rows, slices
    orientation: direction of a row, then of a column: six cosines (LPS)
    pixel_mm:    distance of columns, distance of rows
    fault:       why this is no volume that can be used; empty where it is one
    """

    number: int
    part: str
    uid: str
    headers: Mapping[str, Any]
    frames: tuple[Frame, ...]
    shape: tuple[int, int, int]
    orientation: tuple[float, ...] = ()
    pixel_mm: tuple[float, float] = (0.0, 0.0)
    fault: str = ""

    @property
    def label(self) -> str:
        """Number and part, as the table shows them."""
        return f"{self.number}{self.part}"

    @property
    def name(self) -> str:
        """What messages call it."""
        described = str(self.headers.get("SeriesDescription") or self.headers.get("ProtocolName") or "").strip()
        return f"series {self.label}" + (f" ({described})" if described else "")

    @property
    def slice_mm(self) -> float:
        """Distance of neighbouring slices; 0 for fewer than two."""
        steps = np.diff(along(self.frames, self.orientation)) if len(self.frames) > 1 else np.zeros(1)
        return float(np.median(steps))

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return self.pixel_mm[0] * self.pixel_mm[1] * self.slice_mm

    @property
    def affine(self) -> NDArray[np.float64]:
        """4×4: (column, row, slice) → mm in RAS+, as NIfTI counts. Only where there is no fault."""
        first, last = (np.array(self.frames[i].position_mm) for i in (0, -1))
        matrix = np.eye(4)
        matrix[:3, 0] = np.array(self.orientation[:3]) * self.pixel_mm[0]
        matrix[:3, 1] = np.array(self.orientation[3:]) * self.pixel_mm[1]
        matrix[:3, 2] = (last - first) / (len(self.frames) - 1)
        matrix[:3, 3] = first
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


@dataclass(frozen=True)
class Study:
    """One study of one patient: its volumes in the order of their numbers, and what was left out, a sentence each."""

    root: Path
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()

    def find(self, asked: str) -> Series:
        """The series that a user names by number (5, or 5b) or by SeriesInstanceUID.

        Raises InputError for one that is not there, a name that fits several, and a series with a fault.
        """
        found = [series for series in self.series if asked.lower() in (series.label, series.uid)]
        if len(found) != 1:
            there = ", ".join(series.label for series in self.series)
            if len(found) > 1:
                there = ", ".join(f"{series.label} of {series.uid}" for series in found)
            elif parts := [series.label for series in self.series if asked == str(series.number)]:
                there = ", ".join(parts)
            what = "fits several series" if found else "is no series of this study"
            raise InputError(f"{asked}: {what}; expected one of {there}")
        if found[0].fault:
            raise InputError(f"{found[0].name} cannot be used: {found[0].fault}; name another series")
        return found[0]


def is_study(path: Path) -> bool:
    """Whether a path is a zip file, or a folder that holds DICOM and no NIfTI, by content and not by name.

    NIfTI files that medmap wrote do not count: a mask may lie in the folder of the study that it was made from.

    >>> is_study(Path("nowhere"))
    False
    """
    if path.is_file():
        return path.suffix.lower() == ".zip"
    found = False
    for file in files_below(path):
        if file.name.lower().endswith(SUFFIXES) and not _by_medmap(file):
            return False
        found = found or looks_dicom(file)
    return found


def _by_medmap(file: Path) -> bool:
    """Whether a NIfTI file is a mask with its record beside it, a region of such a mask, or part of an explanation."""
    return recorded(file) or file.with_name("explanation.json").is_file()  # as `medmap.explain` names it


def looks_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does: the letters DICM after 128 bytes, or group 8 first, as old files have it."""
    try:
        with open(path, "rb") as file:
            return begins_as_dicom(file.read(132))
    except OSError:
        return False


def begins_as_dicom(start: bytes) -> bool:
    """Whether these first 132 bytes are DICOM's.

    >>> begins_as_dicom(bytes(128) + b"DICM"), begins_as_dicom(b"PK")
    (True, False)
    """
    return start[128:132] == b"DICM" or (start[:2] == b"\x08\x00" and start[3:4] == b"\x00" and start[2] < 0x20)


def in_words(text: str, names: Mapping[Path, str]) -> str:
    """A sentence with files called by other names.

    >>> in_words("a/b.nii: empty; b.nii is 3×3×3", {Path("a/b.nii"): "series 5"})
    'series 5: empty; series 5 is 3×3×3'
    """
    for path, name in names.items():
        text = text.replace(str(path), name).replace(path.name, name)
    return text


def normal(orientation: Sequence[float]) -> NDArray[np.float64]:
    normal: NDArray[np.float64] = np.cross(orientation[:3], orientation[3:])
    return normal


def along(frames: Sequence[Frame], orientation: Sequence[float]) -> NDArray[np.float64]:
    """Where slices lie along their normal, mm."""
    places: NDArray[np.float64] = np.array([frame.position_mm for frame in frames]) @ normal(orientation)
    return places


NUMBERS = (
    *("SeriesNumber", "InstanceNumber", "AcquisitionNumber", "EchoNumbers", "TemporalPositionIdentifier"),
    *("RepetitionTime", "EchoTime", "InversionTime", "FlipAngle", "EchoTrainLength", "DiffusionBValue", "TriggerTime"),
)
"""Headers that are numbers; times in ms."""
KEYWORDS = (
    *NUMBERS,
    *("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "Manufacturer"),
    *("SeriesDescription", "ProtocolName", "SequenceName", "ImageType", "BodyPartExamined"),
    *("ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType", "AngioFlag", "ContrastBolusAgent"),
    *("AcquisitionDate", "AcquisitionTime", "SeriesDate", "SeriesTime", "ContentTime"),
)
"""What is kept of a header."""
