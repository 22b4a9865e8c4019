"""A mask as DICOM SEG: one binary segment a region, on the slices of the series whose grid the mask has."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import medmap
from medmap.core.labels import LabelScheme
from medmap.data.colours import REGION_COLOURS, rgb
from medmap.data.dicom import Series
from medmap.data.dicom_convert import dicom_order
from medmap.data.nifti import read_labels
from medmap.data.whole import whole
from medmap.errors import InputError

SERIES_NUMBER = 9900
"""Number of the series that is written: far from those of scanners."""


def write_seg(
    out: Path,
    mask: Path,
    scheme: LabelScheme,
    reference: Series,
    others: Sequence[Series] = (),
    weights: str = "",
    left_out: Collection[str] = (),
) -> Path:
    """Write a mask as DICOM SEG (.dcm) into the patient's own study; returns ``out``.

    mask:      the NIfTI file, on the grid of ``reference``; codes of ``scheme``
    reference: series whose slices the segments lie on: patient, study and frame of reference are theirs
    others:    further series that the mask was made from, kept as references
    weights:   SHA-256 of the model's weights, told beside the algorithm's name
    left_out:  regions that get no segment

    Segments are the other regions of the scheme in their order, overlapping where regions do; each has the colour that
    it has among all regions. The file appears under its name only when it is whole. Raises InputError where the
    mask is on another grid, where headers are too poor for a SEG, and where the place cannot be written.
    """
    labels, affine = read_labels(mask)
    classes = dicom_order(reference, scheme.encode(labels, str(mask)), affine)
    told = [region for region in scheme.regions if region not in left_out]
    segments = np.stack([scheme.region_mask(classes, region) for region in told], axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values in the headers of scanners are not ours to mend
        try:
            descriptions = _descriptions(scheme, told, weights)
            seg = _seg(segments.astype(np.uint8), descriptions, reference, others)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(
                f"{reference.name}: its headers do not allow a DICOM SEG ({error}); the mask itself is whole: {mask}"
            ) from error
        _save(seg, out)
    return out


def _seg(segments: Any, descriptions: list[Any], reference: Series, others: Sequence[Series]) -> Any:
    from highdicom.seg import Segmentation
    from pydicom.uid import generate_uid

    order = [(frame.path, frame.index) for frame in reference.frames]
    if len({path for path, _ in order}) == 1:  # all slices in one file: in the order of its frames
        segments = segments[np.argsort([index for _, index in order])]
    sources = _headers(reference)
    seg = Segmentation(
        source_images=sources,
        pixel_array=segments,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=generate_uid(prefix=None),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="medmap",
        manufacturer_model_name="medmap",
        software_versions=medmap.__version__,
        device_serial_number="none",
        content_label="SEGMENTATION",
        content_description="Automatic segmentation, not for clinical use",
        series_description=f"medmap {medmap.__version__} segmentation",
    )
    # Once for the whole mask: highdicom would name every image of the others again at every frame.
    seg.ReferencedSeriesSequence.extend(_reference(series) for series in others)
    return seg


def _reference(series: Series) -> Any:
    """A series and its images, by their UIDs."""
    from pydicom.dataset import Dataset

    reference = Dataset()
    reference.SeriesInstanceUID = series.uid
    reference.ReferencedInstanceSequence = []
    for dataset in _headers(series):
        image = Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
        reference.ReferencedInstanceSequence.append(image)
    return reference


def _headers(series: Series) -> list[Any]:
    """The series' files in the order of its slices, each once, without pixels."""
    import pydicom

    files = dict.fromkeys(frame.path for frame in series.frames)
    return [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in files]


def _descriptions(scheme: LabelScheme, told: Sequence[str], weights: str) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    algorithm = AlgorithmIdentificationSequence(
        name="medmap",
        family=codes.DCM.ArtificialIntelligence,
        version=medmap.__version__,
        parameters={"weights_sha256": weights} if weights else None,
    )
    organ = next((name for cls, name in _ORGANS.items() if cls in scheme.classes), None)
    places = list(scheme.regions)
    return [
        SegmentDescription(
            segment_number=number,
            segment_label=_LABELS.get(region, region),
            segmented_property_category=getattr(codes.SCT, _CODES.get(region, _LESION)[0]),
            segmented_property_type=getattr(codes.SCT, _CODES.get(region, _LESION)[1]),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=None if organ is None else [getattr(codes.SCT, organ)],
            display_color=CIELabColor.from_rgb(*rgb(REGION_COLOURS[places.index(region) % len(REGION_COLOURS)])),
        )
        for number, region in enumerate(told, start=1)
    ]


def _save(seg: Any, out: Path) -> None:
    try:
        with whole(out) as (fresh,):
            seg.save_as(fresh)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); name another place with -o") from error


_ORGANS = {"liver": "Liver", "ncr": "Brain", "et": "Brain"}
"""{class that only this organ has: what SNOMED CT calls the organ}; of others nobody says where they lie."""
_LESION = ("MorphologicallyAbnormalStructure", "Lesion")
_CODES = {
    "WT": ("MorphologicallyAbnormalStructure", "Neoplasm"),
    "TC": ("MorphologicallyAbnormalStructure", "Neoplasm"),
    "ET": ("MorphologicallyAbnormalStructure", "Neoplasm"),
    "LIVER": ("AnatomicalStructure", "Liver"),
}
"""{region: category and type of SNOMED CT}. Whole tumour, core and enhancing tumour are parts of one neoplasm that
SNOMED CT has no codes of their own for; the segments' labels tell them apart."""
_LABELS = {"WT": "WT whole tumour", "TC": "TC tumour core", "ET": "ET enhancing tumour", "RC": "RC resection cavity"}
