"""A mask that `medmap predict` wrote becomes one HTML file: volumes, trust, pictures, a viewer, where it is from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.confidence import broken_promises
from medmap.core.case import Grid
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.volume import resample
from medmap.data.nifti import read_labels, read_volume, sha256, stem
from medmap.errors import InputError
from medmap.figures.style import REGION_NAMES, label
from medmap.report.html import part, render, unplaced, write_page
from medmap.report.slices import slices_of
from medmap.report.viewer import CLASS_NAMES, Study, inlined, paints_of, scripts, show
from medmap.segment import record_path

NEEDED = {
    dict: ("inputs", "sequences", "model", "labels", "labels.codes", "volumes_ml", "left_out", "versions"),
    list: ("warnings", "sequences.missing", "sequences.ignored"),
    str: ("case", "made", "labels.scheme"),
}
"""What a record must hold, and as what."""
_KINDS = {str: "text", dict: "an object", list: "a list"}
_NEAR_ML = 0.01


@dataclass(frozen=True)
class Origin:
    """One image that a mask was made from. file: its name, or what a series is called; path: where it lies now"""

    sequence: str
    file: str
    path: Path
    channel: int | None
    sha256: str
    resampled: bool


def case_report(
    mask: Path, out: Path | None = None, *, anonymous: bool = False, images: Mapping[str, Path] | None = None
) -> Path:
    """Write the page of one mask to ``out`` (NAME.html beside NAME.nii.gz where None); returns ``out``.

    mask:      what `medmap predict` wrote, with its NAME.medmap.json beside it
    anonymous: no id and no file name on the page, neither of the images nor of the mask
    images:    {sequence: NIfTI file} where they lie now; of a DICOM study, its series converted again, as
               `medmap.data.dicom_opened.OpenedStudy.recorded` does

    Else the images are read from where the JSON says they were, or from beside the mask. Volumes on the page are in
    ml, counted in the mask. The page loads nothing and shows the patient's images: pass it on as you would these.

    Raises InputError where the mask or its JSON cannot be read or do not belong together, where an image is gone or is
    no longer the file that the mask was made from, and where ``out`` cannot be written. The file appears whole or not
    at all.
    """
    record = read_record(mask)
    places = images or {}
    origins = [_found(mask, name, entry, places.get(name)) for name, entry in record["inputs"].items()]
    scheme = _scheme(record)
    codes, affine = read_labels(mask)
    classes = scheme.encode(codes, str(mask))
    volumes = _volumes_ml(classes, affine, scheme)
    _refuse_other_mask(mask, record, volumes)
    study = show(_images(origins, Grid(codes.shape, affine)), codes.astype(np.uint8), affine, scheme)
    page = _page(record, origins, study, scheme, volumes, anonymous)
    return write_page(page, mask.with_name(f"{stem(mask)}.html") if out is None else out)


def read_record(mask: Path) -> dict[str, Any]:
    """The JSON beside a mask.

    Raises InputError where there is none, or where it is not what `medmap predict` writes.
    """
    path = record_path(mask)
    if not path.is_file():
        raise InputError(
            f"{mask}: there is no {path.name} beside it; a report needs the JSON that `medmap predict` writes with a "
            "mask: keep the two together, or predict again"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wrong = _wrong(record)
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong:
        raise InputError(f"{path}: cannot be used ({wrong}); expected what `medmap predict` wrote: predict again")
    return dict(record)


def _wrong(record: Any) -> str:
    """What of a record is not as `medmap predict` writes it; empty where all is."""
    for kind, path in ((kind, path) for kind, paths in NEEDED.items() for path in paths):
        found = record
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, kind):
            return f"{path}: found {json.dumps(found)[:40]}, expected {_KINDS[kind]}"
    entries = record["inputs"].values()
    if not entries or not all(isinstance(entry, dict) and {"sha256"} < set(entry) for entry in entries):
        return "inputs: expected each image with its SHA-256"
    if not all(isinstance(ml, int | float) for ml in record["volumes_ml"].values()):
        return "volumes_ml: expected a number a region"
    return ""


# ---- what the mask was made from ---------------------------------------------------------------------------------


def _found(mask: Path, sequence: str, entry: Mapping[str, Any], place: Path | None) -> Origin:
    """The image, unchanged: at the place that is told, where it was, or beside the mask."""
    called = entry["called"] if "series_uid" in entry else Path(entry["file"]).name
    path = place or _where_it_was(mask, sequence, entry)
    now = sha256(path)
    if now != entry["sha256"]:
        raise InputError(
            f"{called if place else path}: is not the {label(sequence)} image that {mask.name} was made from (SHA-256 "
            f"{now[:12]}…, the record says {entry['sha256'][:12]}…); put the original back, or predict again"
        )
    return Origin(sequence, called, path, entry.get("volume"), now, bool(entry.get("resampled")))


def _where_it_was(mask: Path, sequence: str, entry: Mapping[str, Any]) -> Path:
    """The file of an image. Raises InputError where it is gone, and for a series, which has none."""
    if "series_uid" in entry:
        raise InputError(
            f"{mask}: the {label(sequence)} image is {entry['called']} of a DICOM study; name the study, a folder or "
            f".zip: medmap report {mask} --input STUDY"
        )
    was = Path(entry["file"])
    path = next((place for place in beside(mask, was) if place.is_file()), None)
    if path is None:
        raise InputError(
            f"{was}: the {label(sequence)} image that {mask.name} was made from is gone; bring it back there, or "
            "beside the mask"
        )
    return path


def beside(mask: Path, was: Path) -> tuple[Path, ...]:
    """Where something may lie that a mask was made from: where it was, from here or from the mask, or beside it."""
    return was, mask.parent / was, mask.parent / was.name


def _images(origins: list[Origin], grid: Grid) -> dict[str, NDArray[np.float32]]:
    """Every image on the mask's grid."""
    images = {}
    for origin in origins:
        volume, affine = read_volume(origin.path, origin.channel)
        x, y, z = volume.shape
        images[origin.sequence] = resample(volume, Grid((x, y, z), affine), grid, order=1)
    return images


def _scheme(record: Mapping[str, Any]) -> LabelScheme:
    """What the codes mean. Of a scheme that is not among ours the record has no regions: each class is one.

    Where regions were left out, a class that stands for several has the name of the region they make up.
    """
    name, codes = record["labels"]["scheme"], record["labels"]["codes"]
    if name not in SCHEMES or dict(SCHEMES[name].codes) != codes:
        return LabelScheme(name, ("background", *codes), codes, {cls: (cls,) for cls in codes})
    whole = SCHEMES[name]
    table, undivided = whole.without(record["left_out"])
    told = {cls: undivided.get(cls, cls) for i, cls in enumerate(whole.classes) if i and i in table}
    regions = {
        r: tuple(told[c] for c in m if c in told) for r, m in whole.regions.items() if r not in record["left_out"]
    }
    return LabelScheme(name, ("background", *told.values()), {told[c]: codes[c] for c in told}, regions)


def _volumes_ml(classes: NDArray[np.uint8], affine: NDArray[np.float64], scheme: LabelScheme) -> dict[str, float]:
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return {region: int(scheme.region_mask(classes, region).sum()) * voxel_ml for region in scheme.regions}


def _refuse_other_mask(mask: Path, record: Mapping[str, Any], volumes: Mapping[str, float]) -> None:
    for region, said in record["volumes_ml"].items():
        if region in volumes and abs(volumes[region] - said) > _NEAR_ML:
            raise InputError(
                f"{mask}: is not the mask that {record_path(mask).name} describes ({region} {volumes[region]:.2f} ml, "
                f"the record says {said:.2f} ml); was it edited? Predict again into another file"
            )


# ---- words -------------------------------------------------------------------------------------------------------


def _page(
    record: Mapping[str, Any],
    origins: list[Origin],
    study: Study,
    scheme: LabelScheme,
    volumes: Mapping[str, float],
    anonymous: bool,
) -> str:
    first = next(iter(study.images))
    return render(
        "case.html.j2",
        style=part("page.css") + part("viewer.css") + part("case.css"),
        title="Segmentation of one patient" if anonymous else record["case"],
        used=[origin.sequence for origin in origins],
        missing=record["sequences"]["missing"],
        ignored=record["sequences"]["ignored"],
        about=unplaced(record["model"].get("about", "")),
        warnings=[*_warnings(record, origins, anonymous), *_left_out(record)],
        regions=_regions(scheme, volumes),
        empty=not study.mask.any(),
        under=first,
        slices=slices_of(study, first),
        study=inlined(study),
        scripts=scripts(),
        expected=record.get("expected"),
        trust=record.get("confidence"),
        broken=broken_promises(record["confidence"]) if record.get("confidence") else [],
        facts=_facts(record, anonymous),
        origins=[(o.sequence, "" if anonymous else o.file, o.sha256, o.resampled) for o in origins],
    )


def _regions(scheme: LabelScheme, volumes: Mapping[str, float]) -> list[dict[str, Any]]:
    """A line a region: name, its codes, its volume, and the colour with the part that is seen in it."""
    colours = {paint.code: paint for paint in paints_of(scheme)}
    lines = []
    for region, members in scheme.regions.items():
        codes = [scheme.codes[name] for name in members]
        inner = {name for other, names in scheme.regions.items() if set(names) < set(members) for name in names}
        own = [colours[scheme.codes[name]] for name in members if name not in inner]
        lines.append(
            {
                "name": region,
                "meaning": REGION_NAMES.get(region, CLASS_NAMES.get(region, "")),
                "codes": codes,
                "colour": own[0].colour if own else "",
                "ml": volumes[region],
            }
        )
    return lines


def _warnings(record: Mapping[str, Any], origins: list[Origin], anonymous: bool) -> list[str]:
    """What `medmap predict` warned of, without folders; without names where ``anonymous``.

    >>> at = Path("ann_flair.nii.gz")
    >>> record = {"case": "ann", "mask": "ann_seg.nii.gz", "warnings": ["ann: /data/ann_flair.nii.gz has a hole"]}
    >>> _warnings(record, [Origin("t2f", at.name, at, None, "", False)], anonymous=True)
    ['this patient: the FLAIR image has a hole']
    """
    said = [str(unplaced(warning)) for warning in record["warnings"]]
    if not anonymous:
        return said
    names = {o.file: f"the {label(o.sequence)} image" for o in origins}
    names |= {stem(Path(o.file)): f"the {label(o.sequence)} image" for o in origins}
    names |= {str(record.get("mask")): "the mask", str(record["case"]): "this patient"}
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
    return [re.sub(longest_first, lambda found: names[found.group()], text) for text in said]


def _left_out(record: Mapping[str, Any]) -> list[str]:
    return [f"{region} left out: {why}" for region, why in record["left_out"].items()]


def _facts(record: Mapping[str, Any], anonymous: bool) -> list[tuple[str, str]]:
    """What made the mask, by name."""
    model, labels = record["model"], record["labels"]
    facts = {
        "made": record["made"],
        "mask": "" if anonymous else record.get("mask", ""),
        "model": Path(model["folder"]).name if "folder" in model else "",
        "checkpoint": model.get("checkpoint", ""),
        "networks": str(model.get("networks", "")),
        "arithmetic": ", ".join(str(model[key]) for key in ("engine", "device", "precision") if key in model),
        "label codes": f"{labels['scheme']}: " + ", ".join(f"{code} {name}" for name, code in labels["codes"].items()),
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    dropped = record.get("small_enhancing_tumour_dropped_below_ml")
    facts["cleaned"] = f"enhancing tumour below {dropped:g} ml was dropped" if dropped else ""
    facts |= {f"weights {run}".removesuffix(" ."): digest for run, digest in model.get("weights_sha256", {}).items()}
    return [(name, value) for name, value in facts.items() if value]
