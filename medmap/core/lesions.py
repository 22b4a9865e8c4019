"""Lesion-wise scores: every lesion counts once, whatever its size; the rule of the BraTS 2023 challenge.

The rule is stated in voxels of 1 mm, so masks of another spacing are first brought onto a 1 mm grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.box import bounding_box
from medmap.core.surfaces import MaskPair, crop_pair, point_distances, surface_voxels

MISSED_HD95_MM = 374.0
"""HD95 of a lesion that was missed, or invented: the diagonal of the BraTS volume, rounded up by the challenge."""
COUNTED_ABOVE_MM3 = 50
MERGE_STEPS = 3
SAME_SPACING_MM = 1e-3
SLACK_MM = 1e-6


@dataclass(frozen=True)
class LesionScores:
    """Lesion-wise scores of one region of one patient.

    dice:            sum of the counted lesions' Dice / (counted + false positives)
    hd95_mm:         (sum of the counted lesions' HD95 + 374 · false positives) / (counted + false positives)
    f1:              2 TP / (2 TP + FP + FN)
    true_positives:  counted lesions that a predicted component reaches
    false_positives: predicted components, of any size, that reach no lesion of any size
    false_negatives: counted lesions that no predicted component reaches
    counted:         lesions above 50 mm³ (= TP + FN)
    ignored:         lesions of 50 mm³ or less
    """

    dice: float
    hd95_mm: float
    f1: float
    true_positives: int
    false_positives: int
    false_negatives: int
    counted: int
    ignored: int


def lesion_wise(
    prediction: NDArray[Any], truth: NDArray[Any], spacing_mm: Sequence[SupportsFloat] = (1.0, 1.0, 1.0)
) -> LesionScores:
    """Lesion-wise Dice, HD95 and F1 by the rule of BraTS 2023 for glioma.

    prediction, truth: Bool[X Y Z]; spacing_mm: edges of a voxel.

    1. Truth components (26 neighbours) are one lesion when their dilations (18 neighbours, 3 steps) touch.
    2. A lesion is scored against the union of all predicted components (26 neighbours) that meet its dilation. A
       component may serve several lesions.
    3. Lesions up to 50 mm³ are not scored, but a component that meets one is no false positive.
    4. A missed lesion has Dice 0 and HD95 374 mm; so has every predicted component that meets no lesion.
    5. Nothing counted and no false positive: Dice 1, HD95 0, F1 1.

    HD95 is that of `medmap.core.metrics.hd95_mm` (surfaces made of voxels), where the challenge's own script measures
    sub-voxel surface elements. Raises InputError as `crop_pair` does.

    Source: Saluja et al., BraTS 2023 lesion-wise performance metrics.

    >>> truth = np.zeros((40, 20, 20), dtype=bool)
    >>> truth[2:8, 2:8, 2:8] = truth[25:31, 2:8, 2:8] = True
    >>> prediction = truth & (np.arange(40) < 20)[:, None, None]
    >>> scores = lesion_wise(prediction, truth)
    >>> scores.dice, scores.hd95_mm, scores.true_positives, scores.false_negatives
    (0.5, 187.0, 1, 1)
    """
    return lesion_scores(crop_pair(prediction, truth, spacing_mm))


def lesion_scores(pair: MaskPair) -> LesionScores:
    """`lesion_wise` of two masks that are already on their common box."""
    scene = _Scene.of(on_1mm_grid(pair))
    counted = [lesion for lesion in range(1, scene.lesions + 1) if scene.lesion_voxels[lesion] > COUNTED_ABOVE_MM3]
    found = [lesion for lesion in counted if scene.matches(lesion).size]
    missed, invented = len(counted) - len(found), scene.false_positives()
    scored = len(counted) + invented
    penalty_mm = MISSED_HD95_MM * (missed + invented)
    return LesionScores(
        dice=sum(scene.dice(lesion) for lesion in found) / scored if scored else 1.0,
        hd95_mm=(sum(scene.hd95_mm(lesion) for lesion in found) + penalty_mm) / scored if scored else 0.0,
        f1=2 * len(found) / (2 * len(found) + invented + missed) if scored else 1.0,
        true_positives=len(found),
        false_positives=invented,
        false_negatives=missed,
        counted=len(counted),
        ignored=scene.lesions - len(counted),
    )


def on_1mm_grid(pair: MaskPair) -> MaskPair:
    """Both masks by nearest neighbour on voxels of 1 mm over the same box; unchanged where they are 1 mm already.

    The lattice is centred on the truth's own box (the prediction's where there is no truth): what the lesions are does
    not depend on what was predicted. Exact where the spacing is a whole number of mm: every voxel becomes a block.

    >>> pair = crop_pair(*np.ones((2, 1, 1, 1), dtype=bool), (2.0, 3.0, 1.0))
    >>> on_1mm_grid(pair).truth.shape
    (2, 3, 1)
    """
    if all(abs(length - 1.0) <= SAME_SPACING_MM for length in pair.spacing_mm):
        return MaskPair(pair.prediction, pair.truth, (1.0, 1.0, 1.0))
    own = bounding_box(pair.truth) or bounding_box(pair.prediction)
    if own is None:
        return MaskPair(pair.prediction, pair.truth, (1.0, 1.0, 1.0))
    axes = zip(pair.truth.shape, own.start, own.stop, pair.spacing_mm, strict=True)
    chosen = np.ix_(*(_nearest(*axis) for axis in axes))
    return MaskPair(pair.prediction[chosen], pair.truth[chosen], (1.0, 1.0, 1.0))


def _nearest(voxels: int, start: int, stop: int, length_mm: float) -> NDArray[np.int64]:
    """Of every 1 mm cell on an axis of some voxels, the voxel it takes its value from.

    Cells, not sample points: they fill the extent of the voxels from start to stop, centred on it, so that a flip
    changes nothing, and go on over the others as far as their centres lie there.
    """
    extent_mm, end_mm = (stop - start) * length_mm, voxels * length_mm
    first_mm = start * length_mm + 0.5 + (extent_mm - max(1, round(extent_mm))) / 2
    low, high = np.ceil(-first_mm - SLACK_MM), np.floor(end_mm - first_mm + SLACK_MM)
    centres_mm = first_mm + np.arange(low, high + 1)
    indices: NDArray[np.int64] = np.floor(centres_mm / length_mm).clip(0, voxels - 1).astype(np.int64)
    return indices


@dataclass(frozen=True)
class _Scene:
    """Lesions (from 1) and predicted components (from 1) of a pair at 1 mm, and which of them meet."""

    lesions: int
    components: int
    lesion_voxels: NDArray[np.int64]
    component_voxels: NDArray[np.int64]
    overlap_voxels: NDArray[np.int64]
    meetings: NDArray[np.int64]
    lesion_surface: tuple[NDArray[np.int64], NDArray[np.float64]]
    component_surface: tuple[NDArray[np.int64], NDArray[np.float64]]

    @classmethod
    def of(cls, pair: MaskPair) -> _Scene:
        zones, lesions = _zones(pair.truth)
        predicted, components = _components(pair.prediction)
        return cls(
            lesions=lesions,
            components=components,
            lesion_voxels=np.bincount(zones[pair.truth], minlength=lesions + 1),
            component_voxels=np.bincount(predicted[pair.prediction], minlength=components + 1),
            overlap_voxels=np.bincount(zones[pair.truth & pair.prediction], minlength=lesions + 1),
            meetings=_meetings(zones, predicted, components),
            lesion_surface=_labelled_surface(pair.truth, zones),
            component_surface=_labelled_surface(pair.prediction, predicted),
        )

    def matches(self, lesion: int) -> NDArray[np.int64]:
        components: NDArray[np.int64] = self.meetings[self.meetings[:, 0] == lesion, 1]
        return components

    def false_positives(self) -> int:
        return self.components - np.unique(self.meetings[:, 1]).size

    def dice(self, lesion: int) -> float:
        total = self.lesion_voxels[lesion] + self.component_voxels[self.matches(lesion)].sum()
        return float(2 * self.overlap_voxels[lesion] / total)

    def hd95_mm(self, lesion: int) -> float:
        lesion_of, lesion_mm = self.lesion_surface
        component_of, component_mm = self.component_surface
        # Components never touch each other, so a union's surface is the union of their surfaces.
        matched = np.isin(component_of, self.matches(lesion))
        return point_distances(component_mm[matched], lesion_mm[lesion_of == lesion]).percentile_mm()


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    if not mask.any():
        return np.zeros(mask.shape, np.int32), 0
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return np.asarray(labels, dtype=np.int32), int(count)


def _zones(truth: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Components of the dilated truth: a lesion is what of the truth lies in one of them."""
    zones = np.zeros(truth.shape, np.int32)
    box = bounding_box(truth)
    if box is None:
        return zones, 0
    # No room beyond the pair's box is needed: what meets outside it also meets, moved straight back, on its face.
    near = tuple(slice(max(0, a - MERGE_STEPS), b + MERGE_STEPS) for a, b in zip(box.start, box.stop, strict=True))
    neighbours_18 = ndimage.generate_binary_structure(3, 2)
    dilated = np.asarray(ndimage.binary_dilation(truth[near], neighbours_18, iterations=MERGE_STEPS))
    zones[near], count = _components(dilated)
    return zones, count


def _meetings(zones: NDArray[np.int32], predicted: NDArray[np.int32], components: int) -> NDArray[np.int64]:
    """Int64[N 2] pairs (lesion, component) that share a voxel of the lesion's dilation."""
    shared = (zones > 0) & (predicted > 0)
    keys = np.unique(zones[shared].astype(np.int64) * (components + 1) + predicted[shared])
    return np.stack(np.divmod(keys, components + 1), axis=1)


def _labelled_surface(
    mask: NDArray[np.bool_], labels: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    voxels = surface_voxels(mask)
    return labels[tuple(voxels.T)].astype(np.int64), voxels.astype(np.float64)
