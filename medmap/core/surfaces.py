"""Two masks on their common box, their surfaces, and the distances between these, in mm.

Everything that a surface metric needs is computed here once: `crop_pair` cuts both masks to the box that holds them,
`surface_distances` extracts the two surfaces and finds every nearest neighbour; HD95 and NSD only read the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from medmap.core.box import Box, bounding_box
from medmap.errors import InputError

TOLERANCE_SLACK_MM = 1e-6
"""A distance that equals the tolerance counts as within it, also after the rounding of coordinates in mm."""


@dataclass(frozen=True)
class MaskPair:
    """A predicted and a true mask, cut to the smallest box that holds both.

    prediction: Bool[x y z]
    truth:      Bool[x y z]
    spacing_mm: edges of a voxel in mm

    A metric of the pair cannot depend on how much empty space a file has round the head.
    """

    prediction: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]

    @cached_property
    def voxels(self) -> tuple[int, int, int]:
        """Number of voxels in the prediction, in the truth, in both."""
        both = np.count_nonzero(self.prediction & self.truth)
        return int(np.count_nonzero(self.prediction)), int(np.count_nonzero(self.truth)), int(both)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(np.prod(self.spacing_mm)) / 1000.0


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every surface voxel of one mask to the nearest surface voxel of the other.

    prediction_to_truth: Float64[P] in mm, P voxels on the prediction's surface
    truth_to_prediction: Float64[T] in mm, T voxels on the truth's surface

    >>> distances = SurfaceDistances(np.array([0.0, 1.0]), np.array([0.0, 3.0]))
    >>> distances.percentile_mm(100.0), distances.fraction_within(1.0)
    (3.0, 0.75)
    """

    prediction_to_truth: NDArray[np.float64]
    truth_to_prediction: NDArray[np.float64]

    def percentile_mm(self, percent: float = 95.0, *, pooled: bool = False) -> float:
        """max over the two directions of the percentile of the distances, interpolated linearly between ranks.

        With ``pooled`` the percentile is taken once, over the distances of both directions together.
        """
        directions = (self.prediction_to_truth, self.truth_to_prediction)
        parts = (np.concatenate(directions),) if pooled else directions
        return max(float(np.percentile(part, percent)) for part in parts)

    def fraction_within(self, tolerance_mm: float) -> float:
        """Share of all P + T surface voxels that lie at most ``tolerance_mm`` from the other surface."""
        both = np.concatenate((self.prediction_to_truth, self.truth_to_prediction))
        return float(np.mean(both <= tolerance_mm + TOLERANCE_SLACK_MM))


def crop_pair(prediction: NDArray[Any], truth: NDArray[Any], spacing_mm: Sequence[SupportsFloat]) -> MaskPair:
    """Both masks on the box of their union. Two empty masks give a pair of no voxels.

    prediction, truth: Bool[X Y Z] on the same grid
    spacing_mm:        edges of a voxel in mm

    Raises InputError when a mask is not boolean and 3-D, the shapes differ, or the spacing is not three lengths
    above 0.
    """
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != np.bool_ or mask.ndim != 3:
            raise InputError(
                f"{name} mask: found {mask.dtype} {mask.shape}, expected a boolean 3-D array; "
                "make a mask of one region first, such as scheme.region_mask(classes, 'WT')"
            )
    if prediction.shape != truth.shape:
        raise InputError(
            f"prediction is {prediction.shape} voxels, truth is {truth.shape}; both must lie on one grid: "
            "resample the prediction onto the truth's grid first"
        )
    spacing = _checked_spacing(spacing_mm)
    boxes = [box for box in (bounding_box(prediction), bounding_box(truth)) if box is not None]
    box = Box.union(boxes) if boxes else Box((0, 0, 0), (0, 0, 0))
    return MaskPair(np.ascontiguousarray(prediction[box.slices]), np.ascontiguousarray(truth[box.slices]), spacing)


def _checked_spacing(spacing_mm: Sequence[SupportsFloat]) -> tuple[float, float, float]:
    values = tuple(float(length) for length in spacing_mm)
    if len(values) != 3 or not all(0 < length < np.inf for length in values):
        raise InputError(f"spacing_mm: found {values}, expected three lengths in mm above 0, one per axis of the mask")
    return values


def surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask with at least one of their 6 face neighbours outside it; beyond the array all is outside.

    >>> int(surface(np.ones((3, 3, 3), dtype=bool)).sum())
    26
    """
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for neighbour in (slice(None, -2), slice(2, None)):
            window = [slice(1, -1)] * 3
            window[axis] = neighbour
            inner &= padded[tuple(window)]
    return mask & ~inner


def surface_voxels(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Int64[N 3] indices of a mask's surface voxels."""
    on_surface = surface(mask)
    indices = np.unravel_index(np.flatnonzero(on_surface), on_surface.shape)
    return np.stack(indices, axis=1).astype(np.int64)


def point_distances(prediction_mm: NDArray[np.float64], truth_mm: NDArray[np.float64]) -> SurfaceDistances:
    """Nearest-neighbour distances between two clouds of points, Float64[P 3] and Float64[T 3] in mm, neither empty."""
    assert len(prediction_mm), "the prediction has no surface; empty masks are the conventions' business"
    assert len(truth_mm), "the truth has no surface; empty masks are the conventions' business"
    return SurfaceDistances(_nearest_mm(prediction_mm, truth_mm), _nearest_mm(truth_mm, prediction_mm))


def _nearest_mm(points: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    # Measured on a whole tumour at 1 mm: two trees 17 ms, two Euclidean transforms of the tight box 57 ms, and the
    # trees do not slow down when one far speck of prediction makes the box as large as the head (70 against 1370 ms).
    tree = cKDTree(targets, leafsize=32, balanced_tree=False, compact_nodes=False)
    distances: NDArray[np.float64] = np.asarray(tree.query(points)[0], dtype=np.float64)
    return distances


def surface_distances(pair: MaskPair) -> SurfaceDistances:
    """All distances between the surfaces of two masks, neither of them empty.

    >>> prediction, truth = np.zeros((2, 4, 1, 1), dtype=bool)
    >>> prediction[0], truth[2] = True, True
    >>> surface_distances(crop_pair(prediction, truth, (3.0, 1.0, 1.0))).percentile_mm()
    6.0
    """
    spacing = np.asarray(pair.spacing_mm)
    return point_distances(surface_voxels(pair.prediction) * spacing, surface_voxels(pair.truth) * spacing)
