"""A DICOM study read from headers alone: the voxels are left where they are.

A *series* of the scanner is split here where it cannot be one volume (echoes, orientations, b-values, points in time),
and what is no whole volume keeps a *fault*: it is shown, and cannot be used.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmap.data.dicom import KEYWORDS, NUMBERS, Frame, Series, Study, along, looks_dicom, normal
from medmap.data.folders import files_below
from medmap.errors import InputError

MOST_VOLUMES = 4
"""A series that holds more volumes than this is one over time (perfusion, function, diffusion) and is kept whole."""
UNEVEN = 0.05
"""Distances of slices may differ from their median by this part of it."""


def read_study(root: Path) -> Study:
    """What a folder of DICOM files holds. Subfolders and names of files do not matter.

    Raises InputError where there is no image of DICOM, and for files of two patients or of two studies; ImportError
    where pydicom is not installed.
    """
    slices: list[_Slice] = []
    notes: list[str] = []
    for path in files_below(root):
        if not looks_dicom(path):
            continue
        try:
            slices += _slices(path)
        except ImportError:
            raise
        except Exception as error:  # pydicom raises many kinds for damaged files
            notes.append(f"{path.relative_to(root)}: cannot be read as DICOM ({error or type(error).__name__})")
    if not slices:
        broken = f"; {notes[0]}" if notes else ""
        raise InputError(f"{root}: found no image of DICOM{broken}; expected the folder of one study")
    for keywords, what in (("PatientID", "PatientName"), "patients"), (("StudyInstanceUID",), "studies"):
        _one_only(slices, keywords, what, root)
    groups: dict[str, dict[tuple[str, int], _Slice]] = defaultdict(dict)
    for each in slices:
        groups[each.series].setdefault((each.frame.uid, each.frame.index), each)
    copies = len(slices) - sum(map(len, groups.values()))
    notes += [f"{copies} files are copies of others (one SOPInstanceUID) and left out"] * bool(copies)
    series = [volume for uid, group in groups.items() for volume in _volumes(uid, list(group.values()))]
    return Study(root, tuple(sorted(series, key=lambda s: (s.number, s.uid, s.part))), tuple(notes))


# ---- one file ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slice:
    frame: Frame
    series: str
    values: Mapping[str, Any]
    shape: tuple[int, int]
    orientation: tuple[float, ...]
    pixel_mm: tuple[float, float]
    fault: str


def _slices(path: Path) -> list[_Slice]:
    """The slices that a file holds, none for what is no image's series (a directory of a disc)."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values are the rule in headers; what matters is checked here
        with open(path, "rb") as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            before_pixels = file.tell()
        if "SeriesInstanceUID" not in dataset or "SOPInstanceUID" not in dataset:
            if str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")) == _DIRECTORY:
                return []
            raise InputError("neither SeriesInstanceUID nor SOPInstanceUID")
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())
        each = dataset.get("PerFrameFunctionalGroupsSequence") or (None,)
        fault = _fault_of_file(dataset, path, before_pixels)
        return [
            _slice(path, i, [dataset, *shared] if own is None else [dataset, own, *shared], fault)
            for i, own in enumerate(each)
        ]


def _slice(path: Path, index: int, places: Sequence[Any], fault: str) -> _Slice:
    values = {keyword: _found(places, (keyword, *_ALSO.get(keyword, ()))) for keyword in KEYWORDS}
    values |= {keyword: _number(values[keyword]) for keyword in NUMBERS}
    position = _floats(_found(places, ("ImagePositionPatient",)), 3)
    orientation = _floats(_found(places, ("ImageOrientationPatient",)), 6)
    spacing = _floats(_found(places, ("PixelSpacing",)), 2)
    if not fault and not (position and orientation and spacing and min(spacing) > 0):
        fault = "it does not say where its pixels lie in the patient, as screenshots do not"
    dataset = places[0]
    if values["ContrastBolusAgent"] is None and (agents := dataset.get("ContrastBolusAgentSequence")):
        values["ContrastBolusAgent"] = str(agents[0].get("CodeMeaning") or "given")
    return _Slice(
        Frame(path, index, str(dataset.SOPInstanceUID), _triple(position or (0.0, 0.0, 0.0))),
        str(dataset.SeriesInstanceUID),
        values,
        (int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0)),
        orientation,
        (spacing[1], spacing[0]) if spacing else (0.0, 0.0),
        fault,
    )


def _fault_of_file(dataset: Any, path: Path, before_pixels: int) -> str:
    """Why the images of a file cannot be slices of a volume; empty where they can."""
    if "Rows" not in dataset or "Columns" not in dataset:
        return f"it holds no images ({dataset.get('Modality') or 'unknown modality'})"
    if dataset.get("Modality") != "MR":
        return f"its modality is {dataset.get('Modality') or 'not told'}, expected MR"
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        return "its images are in colour"
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    bits = int(dataset.get("BitsAllocated") or 16) * int(dataset.get("NumberOfFrames") or 1)
    needed, size = before_pixels + int(dataset.Rows) * int(dataset.Columns) * bits // 8, path.stat().st_size
    if (syntax is None or not (syntax.is_compressed or syntax.is_deflated)) and size < needed:
        return f"{path.name} is cut off: found {size:,} bytes, its header promises {needed:,}"
    return ""


def _found(places: Iterable[Any], keywords: Iterable[str]) -> Any:
    """The first value that a keyword has in a data set or, for a file of many frames, one level below it."""
    wanted = tuple(keywords)
    for depth, place in enumerate(places):
        inner = [item for element in place if element.VR == "SQ" for item in element.value] if depth else [place]
        for holder in inner:
            for keyword in wanted:
                if keyword in holder and (value := holder.get(keyword)) not in (None, ""):
                    return _plain(value)
    return None


def _plain(value: Any) -> Any:
    """Values without pydicom: text, numbers, and tuples of them."""
    if isinstance(value, float | int):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip("\0 ")
    if isinstance(value, Iterable) and not isinstance(value, str) and not hasattr(value, "family_name"):
        return tuple(_plain(item) for item in value)
    return "".join(sign for sign in str(value) if sign.isprintable()).strip()  # headers reach the user's terminal


def _number(value: Any) -> float | int | None:
    """A number, or the first of several; None for what is none, as damaged headers have it."""
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, float | int) and np.isfinite(first) else None


def _floats(value: Any, count: int) -> tuple[float, ...]:
    """So many finite numbers, or none at all."""
    try:
        numbers = tuple(float(part) for part in value or ())
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else ()


def _triple(numbers: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = numbers
    return x, y, z


def _one_only(slices: list[_Slice], keywords: tuple[str, ...], what: str, root: Path) -> None:
    """Raises InputError where files differ in who or what they belong to. Names no patient: logs are read by others."""
    found: dict[tuple[Any, ...], list[Path]] = defaultdict(list)
    for each in slices:
        found[tuple(each.values[keyword] for keyword in keywords)].append(each.frame.path)
    if len(found) > 1:
        shown = ", ".join(f"{paths[0].relative_to(root)} and {len(set(paths)) - 1} more" for paths in found.values())
        raise InputError(
            f"{root}: holds files of {len(found)} {what} ({shown}: {' or '.join(keywords)} differ); expected one study "
            "of one patient; give each study a folder of its own"
        )


# ---- one series --------------------------------------------------------------------------------------------------


def _volumes(uid: str, slices: list[_Slice]) -> list[Series]:
    """The volumes that a series of the scanner holds."""
    groups: dict[tuple[Any, ...], list[_Slice]] = defaultdict(list)
    for each in slices:
        groups[_kind(each)].append(each)
    parts = [part for group in groups.values() for part in _points_in_time(group)]
    parts.sort(key=lambda part: (part[0].values["EchoTime"] or 0, part[0].frame.path, part[0].frame.index))
    letters = [""] if len(parts) == 1 else [_letters(i) for i in range(len(parts))]
    return [_volume(uid, letter, part) for letter, part in zip(letters, parts, strict=True)]


def _letters(index: int) -> str:
    """a … z, aa, ab …

    >>> _letters(0), _letters(25), _letters(26)
    ('a', 'z', 'aa')
    """
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _kind(each: _Slice) -> tuple[Any, ...]:
    """What all slices of a volume share."""
    echo = each.values["EchoTime"]
    return (
        each.shape,
        tuple(np.round(each.orientation, 3) + 0.0),
        tuple(np.round(each.pixel_mm, 4)),
        each.values["ImageType"],
        each.values["EchoNumbers"],
        None if echo is None else round(echo),
    )


def _points_in_time(slices: list[_Slice]) -> list[list[_Slice]]:
    """One list a volume: split where a position occurs again and a header tells the images there apart."""
    if _repeats(slices) == 1:
        return [slices]
    for keyword in ("DiffusionBValue", "TemporalPositionIdentifier", "AcquisitionNumber", "TriggerTime"):
        groups: dict[Any, list[_Slice]] = defaultdict(list)
        for each in slices:
            groups[each.values[keyword]].append(each)
        if 1 < len(groups) <= MOST_VOLUMES and all(_repeats(group) == 1 for group in groups.values()):
            return list(groups.values())
    return [slices]


def _repeats(slices: Sequence[_Slice]) -> int:
    """How many images lie at one place, at most."""
    return max(Counter(tuple(np.round(each.frame.position_mm, 2)) for each in slices).values())


def _volume(uid: str, part: str, slices: list[_Slice]) -> Series:
    first = min(slices, key=lambda each: (each.values["InstanceNumber"] or 0, each.frame.index))
    frames = tuple(each.frame for each in slices)
    places = len({tuple(np.round(frame.position_mm, 2)) for frame in frames})
    fault = next((each.fault for each in slices if each.fault), "")
    if first.orientation:
        order = np.argsort(along(frames, first.orientation), kind="stable")
        frames = tuple(frames[i] for i in order)
    shape = (*first.shape, places if first.orientation else len(frames))
    number = first.values["SeriesNumber"]
    series = Series(
        number if isinstance(number, int) else 0,
        part,
        uid,
        first.values,
        frames,
        shape,
        first.orientation,
        first.pixel_mm,
        fault,
    )
    return series if fault else replace(series, fault=_stacking(series, places))


def _stacking(series: Series, places: int) -> str:
    """Why the slices do not make one volume; empty where they do."""
    count = len(series.frames)
    if places < count:
        return f"{count} images lie at {places} places, about {count / places:.0f} at each: a series over time"
    if count < 2:
        return "it has only one slice"
    gaps = np.diff(along(series.frames, series.orientation))
    step = float(np.median(gaps))
    wide = gaps[gaps > 1.5 * step]
    if step > 0 and len(wide):
        lost = int(np.rint(wide / step - 1).sum())
        return (
            f"slices are missing: {lost} of {count + lost}, found {count} (a gap of {wide.max():.1f} mm where slices "
            f"are {step:.1f} mm apart)"
        )
    if step <= 0 or np.abs(gaps - step).max() > UNEVEN * step:
        return f"its slices lie unevenly, {gaps.min():.2f} to {gaps.max():.2f} mm apart"
    positions = np.array([frame.position_mm for frame in series.frames])
    line = np.linspace(positions[0], positions[-1], count)
    aside = positions[-1] - positions[0] - normal(series.orientation) * gaps.sum()
    if max(np.abs(positions - line).max(), np.abs(aside).max()) > max(UNEVEN * step, 0.5 * min(series.pixel_mm)):
        return "its slices are not stacked at right angles (a tilted gantry, or a fan of slices)"
    return ""


_ALSO: dict[str, tuple[str, ...]] = {
    "EchoTime": ("EffectiveEchoTime",),
    "InversionTime": ("InversionTimes",),
    "ScanningSequence": ("EchoPulseSequence",),
    "SequenceName": ("PulseSequenceName",),
    "ImageType": ("FrameType",),
    "AcquisitionTime": ("FrameAcquisitionDateTime", "AcquisitionDateTime"),
    "TemporalPositionIdentifier": ("TemporalPositionIndex",),
    "TriggerTime": ("NominalCardiacTriggerDelayTime",),
}
"""What files of many frames call the same things."""
_DIRECTORY = "1.2.840.10008.1.3.10"
