"""A glioma inside a head: oedema around a core, an enhancing rim around necrosis, irregular and nested.

Each compartment is the set of voxels of lowest score up to a drawn volume, so that sizes are met exactly and
WT ⊇ TC ⊇ ET holds by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.case import Grid
from medmap.core.labels import SCHEMES
from medmap.phantom.anatomy import Anatomy, Volume, axes_mm, smooth_field

CODES = SCHEMES["brats2023"].codes

Mask = NDArray[np.bool_]

SHARE_WITHOUT_ET = 0.07
HEMISPHERE_SHARE = 0.45
"""A whole tumour takes at most this share of the room it may grow in."""


@dataclass(frozen=True)
class Tumour:
    """What was drawn; the volumes on the grid are these, but for rounding and for a head too small for them.

    wt_ml, tc_ml, et_ml: volumes of the whole tumour, the core and the enhancing part
    foci:                1 or 2 centres
    stretch:             half axes of each focus relative to their geometric mean
    rough:               standard deviation of the boundary's log-radius
    rim_rough_mm:        how much the enhancing rim's thickness varies
    """

    wt_ml: float
    tc_ml: float
    et_ml: float
    foci: int
    stretch: tuple[float, float, float]
    rough: float
    rim_rough_mm: float


def draw_tumour(generator: np.random.Generator) -> Tumour:
    """A random tumour, in bands near those of 368 reference segmentations of BraTS 2020.

    Their 5th, 50th and 95th percentile: WT 21, 90, 200 ml; TC/WT 0.09, 0.39, 0.75; ET/TC 0, 0.62, 0.94; 7 % have no
    enhancing tumour.
    """
    # the square root of the reference volumes is close to normal; their logarithm has too long a tail upwards
    wt_ml = float(np.clip(generator.normal(9.4, 3.0), 2.5, 15.5) ** 2)
    tc_ml = wt_ml * float(np.clip(generator.beta(2.0, 3.0), 0.04, 0.9))
    enhances = generator.random() >= SHARE_WITHOUT_ET
    rim = float(np.clip(generator.beta(2.5, 1.5), 0.08, 0.97))
    stretch = np.exp(generator.normal(0.0, 0.18, 3))
    a, b, c = (stretch / np.prod(stretch) ** (1 / 3)).tolist()
    return Tumour(
        wt_ml=wt_ml,
        tc_ml=tc_ml,
        et_ml=tc_ml * rim if enhances else 0.0,
        foci=2 if generator.random() < 0.12 else 1,
        stretch=(a, b, c),
        rough=float(generator.uniform(0.12, 0.3)),
        rim_rough_mm=float(generator.uniform(0.5, 2.5)),
    )


def grow_tumour(tumour: Tumour, anatomy: Anatomy, grid: Grid, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Labels UInt8[X Y Z] in the codes of BraTS 2023 (1 necrotic core, 2 oedema, 3 enhancing tumour).

    Oedema prefers white matter and spares cortex and sulci; the core displaces what was there; neither enters the
    ventricles or leaves the cerebrum.
    """
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    room = (anatomy.depth_mm > 1.5) & (anatomy.ventricle_mm > 1.0)
    centres = _centres(tumour, anatomy, grid, generator)
    shifted = [centre + generator.normal(0, 0.12, 3) * radius for centre, radius in centres]
    wide, fine = smooth_field(grid, 22.0, generator), smooth_field(grid, 9.0, generator)

    spread = _distance(tumour, centres, [c for c, _ in centres], grid)
    spread = spread * np.exp(tumour.rough * (wide + 0.5 * fine)) * _resistance(anatomy, grid, centres[0][0])
    whole = _lowest(spread, room, min(tumour.wt_ml / voxel_ml, HEMISPHERE_SHARE * room.sum()))
    whole = _without_islands(whole, 0.1 / voxel_ml)

    seed = _distance(tumour, centres, shifted, grid) * np.exp(0.8 * tumour.rough * (fine - 0.5 * wide))
    core = _lowest(seed + 0.25 * spread, whole, tumour.tc_ml / tumour.wt_ml * whole.sum())
    rim = _rim_depth_mm(core, grid) + tumour.rim_rough_mm * smooth_field(grid, 6.0, generator)
    enhancing = _lowest(rim, core, tumour.et_ml / tumour.tc_ml * core.sum())

    labels = np.zeros(grid.shape, np.uint8)
    labels[whole] = CODES["ed"]
    labels[core] = CODES["ncr"]
    labels[enhancing] = CODES["et"]
    return labels


Focus = tuple[NDArray[np.float64], float]
"""Centre in mm, and the radius in mm of a ball of its share of the volume."""


def _centres(tumour: Tumour, anatomy: Anatomy, grid: Grid, generator: np.random.Generator) -> list[Focus]:
    """Foci in deep white matter; a second one lies 30 to 70 mm from the first."""
    white = anatomy.fractions["white"] * (anatomy.depth_mm > 12) * (anatomy.ventricle_mm > 5)
    places = np.argwhere(white > 0.7) @ grid.affine[:3, :3] + grid.affine[:3, 3]
    first = places[generator.integers(len(places))]
    shares = [1.0]
    chosen = [first]
    if tumour.foci == 2:
        away = np.linalg.norm(places - first, axis=1)
        near = places[(away > 30) & (away < 70)]
        if len(near):
            chosen.append(near[generator.integers(len(near))])
            small = float(generator.uniform(0.1, 0.35))
            shares = [1 - small, small]
    return [
        (centre, float(np.cbrt(3 * share * tumour.wt_ml * 1000 / (4 * np.pi))))
        for centre, share in zip(chosen, shares, strict=True)
    ]


def _distance(tumour: Tumour, foci: list[Focus], centres: list[NDArray[np.float64]], grid: Grid) -> Volume:
    """Distance from the nearest centre in units of its focus' radius, along stretched axes."""
    nearest: Volume | None = None
    for (_, radius), centre in zip(foci, centres, strict=True):
        parts = [
            ((line - np.float32(c)) / np.float32(radius * s)) ** 2
            for line, c, s in zip(axes_mm(grid), centre, tumour.stretch, strict=True)
        ]
        squared = parts[0] + parts[1] + parts[2]
        nearest = squared if nearest is None else np.minimum(nearest, squared)
    assert nearest is not None
    return np.sqrt(nearest)


def _resistance(anatomy: Anatomy, grid: Grid, centre: NDArray[np.float64]) -> Volume:
    """How much harder than through white matter it is to grow here; the falx holds most tumours on their side."""
    x, _, _ = axes_mm(grid)
    other_side = np.clip(-np.sign(centre[0]) * x / 6, 0, 1).astype(np.float32)
    grey, fluid = anatomy.fractions["grey"], anatomy.fractions["csf"]
    resistance: Volume = 1 + np.float32(0.45) * grey + np.float32(0.8) * fluid + np.float32(0.5) * other_side
    return resistance


def _lowest(score: Volume, within: Mask, count: float) -> Mask:
    """The ``count`` voxels of lowest score inside a mask."""
    chosen = np.zeros(within.shape, bool)
    where = np.flatnonzero(within)
    keep = min(round(count), len(where))
    if keep > 0:
        order = np.argpartition(score.ravel()[where], keep - 1)[:keep]
        chosen.ravel()[where[order]] = True
    return chosen


def _without_islands(mask: Mask, voxels: float) -> Mask:
    """The mask without components smaller than that; its largest one stays whatever its size."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    keep = sizes >= min(voxels, sizes.max())
    keep[0] = False
    kept: Mask = keep[parts]
    return kept


def _rim_depth_mm(core: Mask, grid: Grid) -> Volume:
    """Depth in mm below the core's surface; computed on its box, because the transform is slow."""
    depth = np.zeros(core.shape, np.float32)
    boxes = ndimage.find_objects(core.astype(np.uint8))
    if boxes:
        box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in boxes[0])
        depth[box] = ndimage.distance_transform_edt(core[box], sampling=grid.spacing_mm)
    return depth
