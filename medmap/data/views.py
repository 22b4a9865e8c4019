"""An image as the eye takes it in: skull-stripped, turned upright, about 2 mm, its gain and its unit taken out.

What `medmap.data.sequences` and `medmap.data.siblings` look at. No atlas is registered: a brain's own mean and spread
along each axis say where the template's zones lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.box import bounding_box
from medmap.core.volume import to_ras

Mask = NDArray[np.bool_]
Image = NDArray[np.float32]

SPACING_MM = 2.0
"""Voxels are averaged in blocks to about this; finer detail says nothing about which sequence it is."""

BRAIN_ML = (300.0, 2200.0)
"""Less is no brain, more is a head."""

PEELED_MM = 5.0
"""The rim of a brain is what skull-stripping left of fat and dura: bright in any sequence, or dark."""

COIL_MM = 8.0
"""Standard deviation of the blur that is taken away to see detail."""

WHITE, GREY, MIDDLE = 1, 2, 4
"""Bits of the zones: white matter for certain; what is neither that nor rim, mostly cortex; round the ventricles."""


@dataclass(frozen=True, eq=False)
class View:
    """One image of a brain.

    values:     Float32[X Y Z] on blocks of voxels, RAS+, 0 outside the brain
    spacing_mm: of these blocks
    """

    values: Image
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of(cls, volume: NDArray[Any], affine: NDArray[np.float64]) -> View | None:
        """A volume [X Y Z] as read, 0 outside the brain, and its affine; None where it is not of a brain alone.

        >>> View.of(np.ones((4, 4, 4)), np.eye(4)) is None
        True
        """
        turned, turned_affine = to_ras(np.asarray(volume, np.float32), affine)
        size_mm = np.linalg.norm(turned_affine[:3, :3], axis=0)
        blocks = [max(1, round(SPACING_MM / mm)) for mm in size_mm]
        values = _averaged(turned, blocks)
        x, y, z = size_mm * blocks
        view = cls(values, (float(x), float(y), float(z)))
        low, high = BRAIN_ML
        usable = low < view.volume_ml < high and view.inner.any() and np.ptp(values[view.inner]) > 0
        return view if usable else None

    @cached_property
    def mask(self) -> Mask:
        """Where the brain is."""
        return self.values != 0

    @property
    def volume_ml(self) -> float:
        """How large it is."""
        return float(np.count_nonzero(self.mask) * np.prod(self.spacing_mm) / 1000)

    @cached_property
    def inner(self) -> Mask:
        """The brain without its rim."""
        padded = np.pad(self.mask, 1)
        steps = max(1, round(PEELED_MM / float(np.mean(self.spacing_mm))))
        return ndimage.binary_erosion(padded, iterations=steps)[1:-1, 1:-1, 1:-1]

    @cached_property
    def level(self) -> Image:
        """z = 1.349 (v − median) / (upper − lower quartile) of the brain without its rim, from −6 to 8."""
        low, middle, high = np.percentile(self.values[self.inner], (25, 50, 75))
        unit = max((high - low) / 1.349, 1e-6 * max(abs(middle), 1e-6))
        return np.clip((self.values - middle) / unit, -6, 8).astype(np.float32) * self.mask

    @cached_property
    def detail(self) -> Image:
        """`level` without what varies over more than 8 mm."""
        return (self.level - blurred(self.level, self.mask, COIL_MM, self.spacing_mm)) * self.mask

    @cached_property
    def zones(self) -> NDArray[np.uint8]:
        """Bits WHITE, GREY and MIDDLE of each voxel, from the template laid over this brain."""
        template, start_mm, step_mm, mean_mm, spread_mm = _template()
        places = []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            at = np.arange(self.mask.shape[axis]) * self.spacing_mm[axis]
            weight = self.mask.sum(axis=others)
            mean = np.average(at, weights=weight)
            spread = np.sqrt(np.average((at - mean) ** 2, weights=weight))
            mm = mean_mm[axis] + (at - mean) / spread * spread_mm[axis]
            index = np.round((mm - start_mm[axis]) / step_mm).astype(int)
            places.append(np.clip(index, 0, template.shape[axis] - 1))
        return template[np.ix_(*places)] * self.mask

    def zone(self, bit: int) -> Mask:
        """Voxels of one zone."""
        return (self.zones & bit) > 0


def blurred(image: Image, mask: Mask, sigma_mm: float, spacing_mm: tuple[float, float, float]) -> Image:
    """Gaussian blur of what is inside the mask, by what is inside the mask."""
    sigma = [sigma_mm / mm for mm in spacing_mm]
    weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma, truncate=3.0)
    total = ndimage.gaussian_filter(np.where(mask, image, np.float32(0)), sigma, truncate=3.0)
    return total / np.maximum(weight, 1e-3)


def cut(views: dict[str, View]) -> dict[str, View]:
    """Views of one grid, all cut to the box that holds all their brains."""
    box = bounding_box(np.any([view.mask for view in views.values()], axis=0))
    assert box is not None
    return {name: View(view.values[box.slices], view.spacing_mm) for name, view in views.items()}


def _averaged(volume: Image, blocks: list[int]) -> Image:
    """Means over blocks of what is not 0 there; 0 where most of a block is."""
    if max(blocks) == 1:
        return volume
    padded = np.pad(volume, [(0, -n % block) for n, block in zip(volume.shape, blocks, strict=True)])
    (x, y, z), (a, b, c) = padded.shape, blocks
    split = padded.reshape(x // a, a, y // b, b, z // c, c)
    count = np.count_nonzero(split, axis=(1, 3, 5))
    mean = split.sum(axis=(1, 3, 5)) / np.maximum(count, 1)
    return np.where(2 * count >= a * b * c, mean, 0).astype(np.float32)


@lru_cache(maxsize=1)
def _template() -> tuple[NDArray[np.uint8], NDArray[np.float64], float, NDArray[np.float64], NDArray[np.float64]]:
    with (files("medmap.data") / "zones.npz").open("rb") as file:
        stored = dict(np.load(file))
    return stored["zones"], stored["start_mm"], float(stored["step_mm"]), stored["mean_mm"], stored["spread_mm"]
