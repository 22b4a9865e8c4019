"""Studies as a scanner would send them, written with pydicom from volumes whose place is known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

HEADERS: dict[str, dict[str, Any]] = {
    "t1n": {
        "SeriesNumber": 3,
        "SeriesDescription": "t1_se_tra",
        "ScanningSequence": "SE",
        "RepetitionTime": 550.0,
        "EchoTime": 9.0,
        "AcquisitionTime": "101500",
    },
    "t2w": {
        "SeriesNumber": 4,
        "SeriesDescription": "AX T2 TSE",
        "ScanningSequence": "SE",
        "RepetitionTime": 4500.0,
        "EchoTime": 98.0,
        "AcquisitionTime": "102000",
    },
    "t2f": {
        "SeriesNumber": 5,
        "SeriesDescription": "t2_tirm_tra_dark-fluid",
        "ScanningSequence": ["SE", "IR"],
        "RepetitionTime": 9000.0,
        "EchoTime": 92.0,
        "InversionTime": 2500.0,
        "AcquisitionTime": "102500",
    },
    "t1c": {
        "SeriesNumber": 7,
        "SeriesDescription": "t1_se_tra",
        "ScanningSequence": "SE",
        "RepetitionTime": 550.0,
        "EchoTime": 9.0,
        "ContrastBolusAgent": "Gadovist",
        "AcquisitionTime": "103500",
    },
}
"""What four series of a study say; the two T1 have one name, as they often do."""
PLANES = {
    "axial": ((0, -1), (1, -1), (2, 1)),
    "sagittal": ((1, -1), (2, -1), (0, 1)),
    "coronal": ((0, -1), (2, -1), (1, 1)),
}
"""{plane: axis and sign of a RAS+ array along columns' index, rows' index, slices}."""


def write_study(root: Path, patient: Path, **options: Any) -> dict[str, str]:
    """The four files of a phantom as four series; {sequence: SeriesInstanceUID}. turn: 4×4, moves the patient."""
    study = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid(), **options.pop("study", {})}
    found, turn = {}, options.pop("turn", np.eye(4))
    for name, headers in HEADERS.items():
        image = nib.load(patient / f"{patient.name}-{name}.nii.gz")
        headers = {**study, **headers, **options.get("headers", {})}
        volume = np.asarray(image.dataobj)
        rest = {key: value for key, value in options.items() if key != "headers"}
        found[name] = write_series(root / name, volume, turn @ image.affine, headers=headers, **rest)
    return found


def write_series(
    folder: Path,
    volume: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    headers: Mapping[str, Any] | None = None,
    plane: str = "axial",
    reverse: bool = False,
    suffix: str = ".dcm",
    syntax: Any = None,
    slope: float = 1.0,
    skip: tuple[int, ...] = (),
) -> str:
    """A volume [X Y Z] on a grid (4×4, RAS+) as one file a slice; returns the SeriesInstanceUID.

    reverse: number the slices from the other end; skip: slices that are lost on the way
    """
    pixels, matrix = turned(volume, affine, plane)
    levels = np.rint(pixels / (slope * max(1.0, pixels.max() / slope / 4000))).astype(np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    uid = str((headers or {}).get("SeriesInstanceUID") or generate_uid())
    order = range(len(levels))[::-1] if reverse else range(len(levels))
    for number, k in enumerate(order, start=1):
        if k in skip:
            continue
        dataset = base(MRImageStorage, {**(headers or {}), "SeriesInstanceUID": uid}, levels[k])
        place(dataset, matrix, k)
        dataset.InstanceNumber = number
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if syntax is not None:
                dataset.compress(syntax)
            dataset.save_as(folder / f"IM{number:04d}{suffix}", enforce_file_format=True)
    return uid


def write_enhanced(file: Path, volume: NDArray[Any], affine: NDArray[np.float64], headers: Mapping[str, Any]) -> str:
    """A volume as one file of many frames, the last slice first."""
    pixels, matrix = turned(volume, affine, "axial")
    levels = np.rint(pixels * (4000 / pixels.max())).astype(np.uint16)[::-1]
    own = {key: value for key, value in headers.items() if key not in ("EchoTime", "RepetitionTime", "InversionTime")}
    dataset = base(EnhancedMRImageStorage, {**own, "SeriesInstanceUID": generate_uid()}, levels)
    dataset.NumberOfFrames = len(levels)
    shared = Dataset()
    echo, timing, measures, orientation = Dataset(), Dataset(), Dataset(), Dataset()
    echo.EffectiveEchoTime = headers["EchoTime"]
    timing.RepetitionTime = headers["RepetitionTime"]
    probe = Dataset()
    place(probe, matrix, 0)
    measures.PixelSpacing, measures.SliceThickness = probe.PixelSpacing, probe.SliceThickness
    orientation.ImageOrientationPatient = probe.ImageOrientationPatient
    shared.MREchoSequence = Sequence([echo])
    shared.MRTimingAndRelatedParametersSequence = Sequence([timing])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for number in range(len(levels)):
        each, content, position = Dataset(), Dataset(), Dataset()
        probe = Dataset()
        place(probe, matrix, len(levels) - 1 - number)
        content.StackID, content.InStackPositionNumber = "1", number + 1
        content.DimensionIndexValues = [1, number + 1]
        position.ImagePositionPatient = probe.ImagePositionPatient
        each.FrameContentSequence, each.PlanePositionSequence = Sequence([content]), Sequence([position])
        groups.append(each)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return str(dataset.SeriesInstanceUID)


def turned(volume: NDArray[Any], affine: NDArray[np.float64], plane: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """[slice row column] and the matrix (column, row, slice) → mm in LPS."""
    matrix = np.eye(4)
    matrix[:3, 3] = affine[:3, 3]
    for j, (axis, sign) in enumerate(PLANES[plane]):
        matrix[:3, j] = sign * affine[:3, axis]
        if sign < 0:
            matrix[:3, 3] += affine[:3, axis] * (volume.shape[axis] - 1)
            volume = np.flip(volume, axis)
    axes = [axis for axis, _ in PLANES[plane]]
    return volume.transpose(axes[::-1]), np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def place(dataset: Dataset, matrix: NDArray[np.float64], k: int) -> None:
    """Where slice k lies, in numbers as long as DICOM allows."""
    sizes = np.linalg.norm(matrix[:3, :3], axis=0)
    cosines = np.concatenate([matrix[:3, 0] / sizes[0], matrix[:3, 1] / sizes[1]])
    dataset.ImageOrientationPatient = [f"{cosine:.12f}"[:16] for cosine in cosines]
    dataset.ImagePositionPatient = [f"{number:.10f}"[:16] for number in (matrix @ [0, 0, k, 1])[:3]]
    dataset.PixelSpacing = [f"{sizes[1]:.10f}", f"{sizes[0]:.10f}"]
    dataset.SliceThickness = dataset.SpacingBetweenSlices = f"{sizes[2]:.8f}"


def base(kind: str, headers: Mapping[str, Any], pixels: NDArray[np.uint16]) -> FileDataset:
    """What every image has, and its pixels [… row column]."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    common = {
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientName": "Phantom^Ada",
        "PatientID": "P-1",
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyInstanceUID": "1.2.3",
        "FrameOfReferenceUID": "1.2.4",
        "StudyDate": "20240102",
        "StudyTime": "100000",
        "StudyID": "S1",
        "AccessionNumber": "A1",
        "ReferringPhysicianName": "",
        "Modality": "MR",
        "Manufacturer": "SIEMENS",
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
        "AcquisitionDate": "20240102",
        "ContentDate": "20240102",
        "ContentTime": "103000",
        "MRAcquisitionType": "2D",
        "SequenceVariant": "SK",
        "ScanOptions": "",
        "EchoTrainLength": 1,
        "EchoNumbers": 1,
        "FlipAngle": 90.0,
        "PatientPosition": "HFS",
        "PositionReferenceIndicator": "",
        "Laterality": "",
        "InstanceNumber": 1,
    }
    for keyword, value in {**common, **headers}.items():
        setattr(dataset, keyword, value)
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelData = np.ascontiguousarray(pixels, "<u2").tobytes()
    return dataset
