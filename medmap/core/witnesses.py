"""The masks from several subsets of one patient's sequences, and what they say about each other without any truth.

Of the mask M from a subset S, region by region::

    agreement = mean over the proper, non-empty subsets U of S of Dice(M, mask from U)     undefined for one sequence
    soft_dice = 2 Σ_{v ∈ M} p(v) / (|M| + Σ_v p(v))       p: the region's probability; undefined for an empty mask
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Box, Boxed
from medmap.core.labels import LabelScheme
from medmap.core.metrics import dice, postprocess

CLEANED = "-pp"
"""Ends the name of a region that was cleaned (`medmap.core.metrics.postprocess`)."""

FEATURES = ("agreement", "soft_dice")
"""What the table of scores holds besides metrics, under these names."""


class Evidence(NamedTuple):
    """What speaks for one mask of one region; NaN where undefined."""

    agreement: float
    soft_dice: float
    volume_ml: float

    def features(self) -> dict[str, float]:
        """Those of `FEATURES` that are defined."""
        return {name: getattr(self, name) for name in FEATURES if np.isfinite(getattr(self, name))}


class Witnesses:
    """The masks of one patient, as they come in.

    shape:     X Y Z of the common grid; spacing_mm: edges of its voxels
    et_min_ml: an enhancing tumour below this is dropped for the region ``ET-pp``
    """

    def __init__(
        self, scheme: LabelScheme, shape: tuple[int, int, int], spacing_mm: Sequence[float], et_min_ml: float
    ) -> None:
        self.scheme, self.shape, self.spacing_mm, self.et_min_ml = scheme, shape, tuple(spacing_mm), et_min_ml
        self._masks: dict[str, _Masks] = {}

    def add(self, subset: str, box: Box, probabilities: NDArray[np.float32]) -> None:
        """The class probabilities Float32[K X Y Z] from a subset, on a box; outside it is background."""
        cut = box.within(self.shape)
        inside = probabilities[(slice(None), *cut.relative_to(box.start).slices)]
        classes = inside.argmax(axis=0).astype(np.uint8)
        cleaned = postprocess(classes, self.scheme, self.spacing_mm, self.et_min_ml)
        soft = {region: _soft_dice(self._mask(classes, region), self._share(inside, region)) for region in self.regions}
        if cleaned is not classes:
            soft["ET" + CLEANED] = np.nan
        self._masks[subset] = _Masks(Boxed(classes, cut), Boxed(cleaned, cut), soft)

    def __contains__(self, subset: str) -> bool:
        return subset in self._masks

    @property
    def regions(self) -> list[str]:
        """Those of the scheme, and ``ET-pp`` where there is an enhancing tumour among them."""
        return [*self.scheme.regions, *(["ET" + CLEANED] if "ET" in self.scheme.regions else [])]

    def about(self, subset: str) -> dict[str, Evidence]:
        """{region: what speaks for the mask from a subset}, by the subsets of it that were added."""
        whole = self._masks[subset]
        names = set(subset.split("+"))
        parts = [found for other, found in self._masks.items() if set(other.split("+")) < names]
        box, voxel_ml = whole.raw.box, float(np.prod(self.spacing_mm)) / 1000
        found = {}
        for region in self.regions:
            mask = self._mask(whole.of(region).window(box), region)
            others = (self._mask(part.of(region).window(box), region) for part in parts)
            agreement = float(np.mean([dice(mask, other) for other in others])) if parts else np.nan
            found[region] = Evidence(agreement, whole.soft[region], np.count_nonzero(mask) * voxel_ml)
        return found

    def _mask(self, classes: NDArray[np.uint8], region: str) -> NDArray[np.bool_]:
        return self.scheme.region_mask(classes, region.removesuffix(CLEANED))

    def _share(self, probabilities: NDArray[np.float32], region: str) -> NDArray[np.float32]:
        members = list(self.scheme.members(region.removesuffix(CLEANED)))
        share: NDArray[np.float32] = probabilities[members].sum(axis=0)
        return share


class _Masks(NamedTuple):
    """Class maps from one subset, as they are and cleaned, and {region: soft Dice}."""

    raw: Boxed
    cleaned: Boxed
    soft: Mapping[str, float]

    def of(self, region: str) -> Boxed:
        return self.cleaned if region.endswith(CLEANED) else self.raw


def _soft_dice(mask: NDArray[np.bool_], probability: NDArray[np.float32]) -> float:
    if not mask.any():
        return np.nan
    total = float(probability.sum(dtype=np.float64))
    return 2 * float(probability[mask].sum(dtype=np.float64)) / (int(np.count_nonzero(mask)) + total)
