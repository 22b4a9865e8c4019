"""Shape statistics of many tumours, and how they compare with published percentiles. Labels and spacing suffice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.box import bounding_box
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.errors import InputError

PERCENTILES = (5, 25, 50, 75, 95)
COUNTED_ML = 0.05
SMALL_ET_ML = 0.5
GLIOMA = SCHEMES["brats2023"]
_TOUCHING = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Shape:
    """One tumour. Float by region (WT TC ET) or class (NCR ED); NaN where undefined.

    volume_ml:     of WT TC ET NCR ED
    components:    of WT TC ET, parts (26 neighbours) above 0.05 ml
    largest_share: of WT TC ET, volume of the largest part over the region's; undefined for an empty region
    sphericity:    of WT TC, see `sphericity`
    """

    volume_ml: Mapping[str, float]
    components: Mapping[str, int]
    largest_share: Mapping[str, float]
    sphericity: Mapping[str, float]


@dataclass(frozen=True)
class ShapeRow:
    """One statistic of a list of tumours beside its reference: a value for each percentile, or a single share.

    deviation: (found − reference) / reference; NaN where the reference is 0
    """

    name: str
    reference: tuple[float, ...]
    found: tuple[float, ...]

    @property
    def deviation(self) -> tuple[float, ...]:
        """Relative deviation of each value."""
        return tuple(
            (f - r) / r if r else (0.0 if f == r else np.nan) for f, r in zip(self.found, self.reference, strict=True)
        )


def tumour_shape(classes: NDArray[Any], spacing_mm: Sequence[SupportsFloat], scheme: LabelScheme = GLIOMA) -> Shape:
    """Volumes, parts and sphericity of one tumour.

    classes:    [X Y Z] class indices of ``scheme``, which has the regions WT TC ET and the classes ncr ed
    spacing_mm: edges of a voxel
    """
    spacing = np.array([float(mm) for mm in spacing_mm])
    box = bounding_box(classes)
    tumour = np.zeros((1, 1, 1), np.uint8) if box is None else classes[box.slices]
    voxel_ml = float(np.prod(spacing)) / 1000
    regions = {name: scheme.region_mask(tumour, name) for name in ("WT", "TC", "ET")}
    masks = {**regions, "NCR": tumour == scheme.classes.index("ncr"), "ED": tumour == scheme.classes.index("ed")}
    parts = {name: _part_volumes_ml(mask, voxel_ml) for name, mask in regions.items()}
    return Shape(
        volume_ml={name: float(mask.sum()) * voxel_ml for name, mask in masks.items()},
        components={name: int((ml > COUNTED_ML).sum()) for name, ml in parts.items()},
        largest_share={name: float(ml.max() / ml.sum()) if ml.size else np.nan for name, ml in parts.items()},
        sphericity={name: sphericity(regions[name], spacing) for name in ("WT", "TC")},
    )


def sphericity(mask: NDArray[np.bool_], spacing_mm: Sequence[SupportsFloat] | NDArray[Any]) -> float:
    """Surface of a ball of the same volume over the mask's surface: 1 for a ball, less for anything else.

    ψ = π^⅓ (6 V)^⅔ / A,   A = ⅔ Σ areas of the voxel faces between inside and outside

    V: volume, mm³. Faces of a smooth surface that looks every way add up to 3/2 of its area, hence ⅔ (so a box, which
    looks six ways only, comes out too round). It depends on the voxels: rough borders have more faces on a finer
    grid (0.03 to 0.06 less at 1 mm than after majority votes at 2 mm on two gliomas).
    NaN for an empty mask.

    >>> x = np.arange(-20, 21)
    >>> ball = x[:, None, None] ** 2 + x[None, :, None] ** 2 + x**2 < 18**2
    >>> round(sphericity(ball, (1.0, 1.0, 1.0)), 1)
    1.0
    """
    spacing = np.array([float(mm) for mm in spacing_mm])
    volume = float(mask.sum() * np.prod(spacing))
    if not volume:
        return np.nan
    padded = np.pad(mask, 1)
    faces = [float((np.diff(padded, axis=a)).sum() * np.prod(np.delete(spacing, a))) for a in range(3)]
    return float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / (sum(faces) * 2 / 3))


def shape_statistics(tumours: Iterable[tuple[NDArray[Any], Sequence[SupportsFloat]]]) -> dict[str, Any]:
    """Percentiles (5 25 50 75 95) and shares over tumours, each as (class indices, spacing in mm).

    The keys are those of published statistics: ``volume_ml``, ``share_without_ET``, ``share_without_NCR``,
    ``share_ET_below_0.5ml``, ``TC_over_WT_volume``, ``ET_over_TC_volume``, ``components_above_0.05ml``,
    ``largest_component_share``, ``sphericity``. An absent region has volume 0 and 0 parts; its largest share and its
    sphericity are left out. Raises InputError where there is no tumour at all.
    """
    return summed_up([tumour_shape(classes, spacing) for classes, spacing in tumours])


def summed_up(shapes: Sequence[Shape]) -> dict[str, Any]:
    """`shape_statistics` of tumours that were measured already."""
    shapes = [shape for shape in shapes if shape.volume_ml["WT"] > 0]
    if not shapes:
        raise InputError("no tumour at all; expected label volumes with one")
    ml = {name: np.array([s.volume_ml[name] for s in shapes]) for name in ("WT", "TC", "ET", "NCR", "ED")}
    with np.errstate(invalid="ignore"):
        ratios = {"TC_over_WT_volume": ml["TC"] / ml["WT"], "ET_over_TC_volume": ml["ET"] / ml["TC"]}
    return {
        "n": len(shapes),
        "volume_ml": {name: _percentiles(values) for name, values in ml.items()},
        "share_without_ET": float((ml["ET"] == 0).mean()),
        "share_without_NCR": float((ml["NCR"] == 0).mean()),
        "share_ET_below_0.5ml": float((ml["ET"] < SMALL_ET_ML).mean()),
        **{name: _percentiles(values) for name, values in ratios.items()},
        "components_above_0.05ml": {r: _percentiles([s.components[r] for s in shapes]) for r in ("WT", "TC", "ET")},
        "largest_component_share": {r: _percentiles([s.largest_share[r] for s in shapes]) for r in ("WT", "TC", "ET")},
        "sphericity": {r: _percentiles([s.sphericity[r] for s in shapes]) for r in ("WT", "TC")},
    }


def compare_shapes(found: Mapping[str, Any], reference: Mapping[str, Any]) -> list[ShapeRow]:
    """Every statistic that both have, in the reference's order."""
    rows = []
    for name, expected in reference.items():
        if name in ("n", "about") or name not in found:
            continue
        pairs = (
            {f"{name} {r}": (v, found[name][r]) for r, v in expected.items() if r in found[name]}
            if isinstance(expected, Mapping)
            else {name: (expected, found[name])}
        )
        rows += [
            ShapeRow(key, tuple(np.atleast_1d(a).tolist()), tuple(np.atleast_1d(b).tolist()))
            for key, (a, b) in pairs.items()
        ]
    return rows


def _part_volumes_ml(mask: NDArray[np.bool_], voxel_ml: float) -> NDArray[np.float64]:
    parts, count = ndimage.label(mask, _TOUCHING)
    volumes: NDArray[np.float64] = np.bincount(parts.ravel(), minlength=count + 1)[1:] * voxel_ml
    return volumes


def _percentiles(values: Any) -> list[float]:
    numbers = np.asarray(values, np.float64)
    there = numbers[np.isfinite(numbers)]
    return [float(v) for v in np.percentile(there, PERCENTILES)] if there.size else [np.nan] * len(PERCENTILES)
