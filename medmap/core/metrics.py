"""How well a predicted region agrees with the truth: overlap, surfaces, volume, lesions.

All masks are Bool[X Y Z] on one grid, all lengths in mm, all volumes in ml. Nothing depends on the empty space round a
mask, on the orientation in which a file stores it, or on anything measured in voxels.

An empty mask has no surface and no overlap; what then stands in the table is a *named* convention (`CONVENTIONS`).
`METRICS` at the foot lists every number that `score_region` returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from medmap.core.labels import LabelScheme
from medmap.core.lesions import LesionScores as LesionScores
from medmap.core.lesions import lesion_scores
from medmap.core.lesions import lesion_wise as lesion_wise
from medmap.core.surfaces import MaskPair, SurfaceDistances, crop_pair, surface_distances
from medmap.errors import InputError

Spacing = Sequence[SupportsFloat]
_1MM = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Convention:
    """What dice, hd95_mm and nsd are when a mask is empty.

    name:       how the user and the table call it
    both_empty: {metric: value} when neither mask has a voxel
    one_empty:  {metric: value} when exactly one has: a missed tumour or an invented one
    pooled:     HD95 as one percentile over both directions together instead of the larger of two percentiles
    note:       one line for the foot of a table
    """

    name: str
    both_empty: Mapping[str, float]
    one_empty: Mapping[str, float]
    note: str
    pooled: bool = False


def convention_named(name: str) -> Convention:
    """A convention by name. Raises InputError with the list of names."""
    if name not in CONVENTIONS:
        raise InputError(f"empty-region convention {name!r} is not known; expected one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def dice(prediction: NDArray[Any], truth: NDArray[Any], *, convention: str = "brats") -> float:
    """2 |P ∩ T| / (|P| + |T|), between 0 and 1; P, T the voxels of prediction and truth, Bool[X Y Z].

    Raises InputError for masks that are not boolean, 3-D and of one shape, or an unknown convention.

    >>> prediction, truth = np.zeros((2, 4, 1, 1), dtype=bool)
    >>> prediction[:3], truth[2:] = True, True
    >>> dice(prediction, truth)
    0.4
    """
    return _dice(crop_pair(prediction, truth, _1MM), convention_named(convention))


def hd95_mm(prediction: NDArray[Any], truth: NDArray[Any], spacing_mm: Spacing, *, convention: str = "brats") -> float:
    """95 % Hausdorff distance in mm: max(P95 of d(p, ∂T) over p ∈ ∂P, P95 of d(t, ∂P) over t ∈ ∂T).

    ∂P, ∂T:     voxels of a mask with a face neighbour outside it; d is Euclidean between voxel centres, in mm
    P95:        95th percentile, linear between ranks
    spacing_mm: edges of a voxel, one per axis of the masks

    This is the definition (and the surface) of MONAI's ``HausdorffDistanceMetric(percentile=95)``. With the convention
    ``legacy`` P95 is taken once over both directions together, as MedPy does.
    Raises InputError as `dice` does, and for a spacing that is not three lengths above 0.

    >>> prediction, truth = np.zeros((2, 4, 1, 1), dtype=bool)
    >>> prediction[0], truth[3] = True, True
    >>> hd95_mm(prediction, truth, (2.5, 1.0, 1.0)), hd95_mm(prediction, truth & False, (2.5, 1.0, 1.0))
    (7.5, 373.13)
    """
    pair, rule = crop_pair(prediction, truth, spacing_mm), convention_named(convention)
    return _hd95_mm(pair, rule, _distances(pair))


def nsd(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    spacing_mm: Spacing,
    tolerance_mm: float = 1.0,
    *,
    convention: str = "brats",
) -> float:
    """Normalised surface Dice: share of the surface voxels of both masks within a tolerance of the other surface.

    (|{p ∈ ∂P: d(p, ∂T) ≤ τ}| + |{t ∈ ∂T: d(t, ∂P) ≤ τ}|) / (|∂P| + |∂T|)

    with τ = ``tolerance_mm`` and the symbols of `hd95_mm`.

    Surfaces are counted in voxels, as MONAI's ``SurfaceDiceMetric(use_subvoxels=False)`` does: no triangle areas, so
    on strongly anisotropic grids an oblique surface weighs a little differently than in DeepMind's surface-distance.
    Raises InputError as `hd95_mm` does, and for a negative tolerance.

    >>> prediction, truth = np.zeros((2, 4, 1, 1), dtype=bool)
    >>> prediction[:3], truth[:1] = True, True
    >>> nsd(prediction, truth, (1.0, 1.0, 1.0), tolerance_mm=1.0)
    0.75
    """
    pair, rule = crop_pair(prediction, truth, spacing_mm), convention_named(convention)
    return _nsd(pair, rule, _distances(pair), tolerance_mm)


def volume_error_ml(prediction: NDArray[Any], truth: NDArray[Any], spacing_mm: Spacing) -> float:
    """| |P| − |T| | in ml. Without its sign: a missed tumour must not make good for an invented one in a mean.

    >>> mask = np.ones((10, 10, 10), dtype=bool)
    >>> volume_error_ml(mask, mask & False, (2.0, 1.0, 1.0))
    2.0
    """
    return _volume_error_ml(crop_pair(prediction, truth, spacing_mm))


def drop_small(mask: NDArray[np.bool_], spacing_mm: Spacing, min_ml: float) -> NDArray[np.bool_]:
    """The mask, or an empty one when its whole volume is below ``min_ml``.

    The usual rule for the enhancing tumour is 0.5 ml, which is 500 voxels of 1 mm³: a few predicted voxels in a patient
    without enhancement otherwise turn a Dice of 1 into 0.

    >>> mask = np.ones((7, 7, 10), dtype=bool)
    >>> int(drop_small(mask, (1.0, 1.0, 1.0), 0.5).sum()), int(drop_small(mask, (1.0, 1.0, 1.1), 0.5).sum())
    (0, 490)
    """
    volume_ml = np.count_nonzero(mask) * float(np.prod([float(mm) for mm in spacing_mm])) / 1000.0
    # Headers round 1 mm to 0.9999999: exactly the threshold must stay on its side.
    kept = volume_ml >= min_ml * (1.0 - 1e-5)
    return mask if kept else np.zeros_like(mask)


def postprocess(
    classes: NDArray[np.uint8], scheme: LabelScheme, spacing_mm: Sequence[float], et_min_ml: float
) -> NDArray[np.uint8]:
    """A class map in which an enhancing tumour below ``et_min_ml`` ml has become necrotic core (TC stays as it is).

    Labels that do not tell the two apart are returned as they are: there is nothing that the voxels could become.
    """
    if not {"et", "ncr"} <= set(scheme.classes) or et_min_ml <= 0:
        return classes
    et = classes == scheme.classes.index("et")
    if not et.any() or drop_small(et, spacing_mm, et_min_ml).any():
        return classes
    return np.where(et, np.uint8(scheme.classes.index("ncr")), classes)


def score_region(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    spacing_mm: Spacing,
    convention: str = "brats",
    tolerance_mm: float = 1.0,
) -> dict[str, float]:
    """Every number of `METRICS` for one region of one patient; the boxes and surfaces are computed once.

    prediction, truth: Bool[X Y Z]; spacing_mm: edges of a voxel; convention: a name in `CONVENTIONS`;
    tolerance_mm: of the surface Dice. The lesion-wise numbers follow their own rule under every convention.
    Raises InputError as `nsd` does.

    >>> mask = np.ones((10, 10, 10), dtype=bool)
    >>> scores = score_region(mask, mask, (1.0, 1.0, 1.0))
    >>> scores["dice"], scores["hd95_mm"], scores["lesion_f1"], scores["truth_ml"], list(scores) == list(METRICS)
    (1.0, 0.0, 1.0, 1.0, True)
    """
    pair, rule = crop_pair(prediction, truth, spacing_mm), convention_named(convention)
    distances, lesions = _distances(pair), lesion_scores(pair)
    predicted, true, _ = pair.voxels
    return {
        "dice": _dice(pair, rule),
        "hd95_mm": _hd95_mm(pair, rule, distances),
        "nsd": _nsd(pair, rule, distances, tolerance_mm),
        "volume_error_ml": _volume_error_ml(pair),
        "lesion_dice": lesions.dice,
        "lesion_hd95_mm": lesions.hd95_mm,
        "lesion_f1": lesions.f1,
        "truth_ml": true * pair.voxel_ml,
        "predicted_ml": predicted * pair.voxel_ml,
    }


def _when_empty(pair: MaskPair, rule: Convention) -> Mapping[str, float] | None:
    predicted, true, _ = pair.voxels
    if predicted and true:
        return None
    return rule.one_empty if predicted or true else rule.both_empty


def _distances(pair: MaskPair) -> SurfaceDistances | None:
    """None where a mask is empty: then the convention speaks."""
    predicted, true, _ = pair.voxels
    return surface_distances(pair) if predicted and true else None


def _dice(pair: MaskPair, rule: Convention) -> float:
    stated = _when_empty(pair, rule)
    if stated is not None:
        return stated["dice"]
    predicted, true, both = pair.voxels
    return 2 * both / (predicted + true)


def _hd95_mm(pair: MaskPair, rule: Convention, distances: SurfaceDistances | None) -> float:
    stated = _when_empty(pair, rule)
    if stated is not None:
        return stated["hd95_mm"]
    assert distances is not None
    return distances.percentile_mm(95.0, pooled=rule.pooled)


def _nsd(pair: MaskPair, rule: Convention, distances: SurfaceDistances | None, tolerance_mm: float) -> float:
    if not tolerance_mm >= 0:
        raise InputError(f"tolerance_mm: found {tolerance_mm}, expected a distance in mm of 0 or more")
    stated = _when_empty(pair, rule)
    if stated is not None:
        return stated["nsd"]
    assert distances is not None
    return distances.fraction_within(tolerance_mm)


def _volume_error_ml(pair: MaskPair) -> float:
    predicted, true, _ = pair.voxels
    return abs(predicted - true) * pair.voxel_ml


ABSENT_HD95_MM = 373.13
"""HD95 where one mask is empty: the diagonal of the BraTS volume, √(240² + 240² + 155²) mm, on every grid alike."""

_PERFECT = {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0}
_WRONG = {"dice": 0.0, "hd95_mm": ABSENT_HD95_MM, "nsd": 0.0}
_NAN = float("nan")

CONVENTIONS: dict[str, Convention] = {
    rule.name: rule
    for rule in (
        Convention("brats", _PERFECT, _WRONG, "both empty: Dice 1, HD95 0, NSD 1; one empty: 0, 373.13, 0"),
        Convention(
            "nan",
            dict.fromkeys(_PERFECT, _NAN),
            {"dice": 0.0, "hd95_mm": _NAN, "nsd": 0.0},
            "both empty: undefined; one empty: Dice 0, NSD 0, HD95 undefined, so a mean HD95 leaves missed tumours "
            "out and is worth nothing without the number of cases it is over",
        ),
        Convention(
            "legacy",
            _PERFECT,
            _WRONG,
            "as older missing-sequence tables: HD95 is one percentile of both directions (MedPy); both empty: 1, 0, 1; "
            "one empty: 0, 373.13, 0, not the HD95 of 1 mm of several of those scripts, which rewards a missed tumour",
            pooled=True,
        ),
    )
}
"""What an empty mask means. A missed tumour never improves a mean under ``brats`` and ``legacy``."""


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`: what a number says, its unit ("" for a ratio), and whether more is better (None: neither)."""

    description: str
    unit: str
    higher_is_better: bool | None


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", True),
    "hd95_mm": Metric("95 % Hausdorff distance", "mm", False),
    "nsd": Metric("normalised surface Dice", "", True),
    "volume_error_ml": Metric("absolute volume error", "ml", False),
    "lesion_dice": Metric("lesion-wise Dice (BraTS 2023)", "", True),
    "lesion_hd95_mm": Metric("lesion-wise 95 % Hausdorff distance (BraTS 2023)", "mm", False),
    "lesion_f1": Metric("lesion-wise F1 (BraTS 2023)", "", True),
    "truth_ml": Metric("true volume", "ml", None),
    "predicted_ml": Metric("predicted volume", "ml", None),
}
