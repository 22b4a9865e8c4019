"""A skull-stripped head without a template: ellipsoids and smooth random fields make cortex, ventricles and vessels.

Space is in mm, RAS+, with the origin in the middle of the brain. Every shape is a depth in mm (positive inside), so
partial volume follows from depth and voxel size, and one patient looks alike on any grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Index3
from medmap.core.case import Grid

Volume = NDArray[np.float32]
Point = tuple[float, float, float]

REACH_MM = 132.0
"""Half the edge of the cube in which random fields exist; every field of view lies inside it."""


@dataclass(frozen=True)
class Head:
    """What differs between two healthy heads.

    size:      scale of the brain along x, y, z, about 1
    cortex_mm: thickness of the grey-matter ribbon
    sulcus_mm: width of the fluid between gyri
    ventricle: scale of the ventricles' width, about 1
    warp_mm:   standard deviation of the smooth deformation that makes left and right differ
    """

    size: Point
    cortex_mm: float
    sulcus_mm: float
    ventricle: float
    warp_mm: float


@dataclass(frozen=True)
class Anatomy:
    """A healthy head on a grid.

    fractions:    {tissue: Float32[X Y Z]}, the share of each voxel; they sum to 1 inside the brain and to 0 outside
    brain:        Bool[X Y Z], what skull-stripping leaves
    depth_mm:     Float32[X Y Z], depth below the cerebrum's hull; negative in the cerebellum and brain stem
    ventricle_mm: Float32[X Y Z], distance from the ventricles' wall; negative inside them
    """

    fractions: Mapping[str, Volume]
    brain: NDArray[np.bool_]
    depth_mm: Volume
    ventricle_mm: Volume


def centred_grid(shape: Index3, spacing_mm: float) -> Grid:
    """A RAS+ grid with isotropic voxels whose middle is the origin.

    >>> centred_grid((3, 3, 3), 2.0).affine[:3, 3].tolist()
    [-2.0, -2.0, -2.0]
    """
    affine = np.eye(4)
    affine[:3, :3] *= spacing_mm
    affine[:3, 3] = -spacing_mm * (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def axes_mm(grid: Grid) -> tuple[Volume, Volume, Volume]:
    """Voxel centres along x, y, z in mm, shaped to broadcast: [X 1 1], [1 Y 1], [1 1 Z]."""
    lines = [grid.affine[a, a] * np.arange(n) + grid.affine[a, 3] for a, n in enumerate(grid.shape)]
    x, y, z = (line.astype(np.float32) for line in lines)
    return x[:, None, None], y[None, :, None], z[None, None, :]


def smooth_field(grid: Grid, scale_mm: float, generator: np.random.Generator) -> Volume:
    """A random field of mean 0 and variance about 1 that changes over ``scale_mm``: white noise on a lattice of that
    spacing, interpolated by cubic B-splines. The lattice is fixed in space, so the field does not depend on the grid.

    >>> grid = centred_grid((9, 9, 9), 4.0)
    >>> smooth_field(grid, 20.0, np.random.default_rng(0)).shape
    (9, 9, 9)
    """
    nodes = int(np.ceil(2 * REACH_MM / scale_mm)) + 4
    noise = generator.standard_normal((nodes, nodes, nodes), dtype=np.float32)
    along_x, along_y, along_z = (_spline_weights(line.ravel(), scale_mm, nodes) for line in axes_mm(grid))
    smooth: Volume = along_y @ np.tensordot(along_x, noise, axes=1) @ along_z.T
    # 151/315 is the mean over a cell of the sum of squared cubic B-spline weights
    return smooth * np.float32((315 / 151) ** 1.5)


def _spline_weights(line_mm: Volume, scale_mm: float, nodes: int) -> Volume:
    where = (line_mm + REACH_MM) / scale_mm + 1.0
    away = np.abs(where[:, None] - np.arange(nodes, dtype=np.float32)[None, :])
    inner = 2 / 3 - away**2 * (1 - away / 2)
    outer = np.clip(2 - away, 0, None) ** 3 / 6
    weights: Volume = np.where(away < 1, inner, outer).astype(np.float32)
    return weights


def draw_head(generator: np.random.Generator) -> Head:
    """A random head."""
    # bounded, so that every head fits the field of view
    x, y, z = np.clip(generator.normal(1.0, 0.03) * generator.normal(1.0, 0.02, 3), 0.92, 1.06)
    return Head(
        size=(float(x), float(y), float(z)),
        cortex_mm=float(generator.uniform(2.4, 3.4)),
        sulcus_mm=float(generator.uniform(0.6, 2.6)),
        ventricle=float(np.exp(generator.normal(0.0, 0.25))),
        warp_mm=float(generator.uniform(1.5, 3.0)),
    )


def build_anatomy(head: Head, grid: Grid, generator: np.random.Generator) -> Anatomy:
    """The head's tissues on a grid.

    head: as drawn; grid: isotropic RAS+; generator: draws the folds and the deformation.
    """
    x, y, z = _warped(head, grid, generator)
    soft_mm = max(1.0, grid.spacing_mm[0])
    fold = smooth_field(grid, 6.5, generator) * 6.5
    branch = smooth_field(grid, 16.0, generator) * 16.0
    cerebrum = _cerebrum(x, y, z)
    cerebellum = _ellipsoid(x, y, z, (0, -46, -42), (50, 32, 24))
    stem = 12 - _capsule(x, y, z, (0, -13, -20), (0, -20, -54))
    ventricle = _ventricles(x, y, z, head.ventricle)

    rim_mm = np.clip(0.5 * head.sulcus_mm + 0.06 * branch, 0, 3)
    gyri = np.minimum(cerebrum - rim_mm, _sulci(fold, branch, cerebrum) - head.sulcus_mm / 2)
    gyri = np.minimum(gyri, _fissure(x, y, z) - 0.8)
    folia = np.minimum(cerebellum - 1.0, np.abs(fold) * 0.8 + cerebellum * 0.12)
    pial = np.maximum(np.maximum(gyri, folia), stem * 6)
    brain = np.maximum(np.maximum(cerebrum, cerebellum), stem) > 0

    tissue = _ramp(np.minimum(pial, ventricle), soft_mm)
    deep = _deep_grey(x, y, z, soft_mm) * _ramp(ventricle - 2.5, soft_mm)
    grey = np.maximum(_ramp(head.cortex_mm - pial, soft_mm), 0.7 * deep)
    vessel = (1 - tissue) * _vessels(x, fold, branch, cerebrum, soft_mm) * _ramp(ventricle, soft_mm)
    fractions = {
        "white": tissue * (1 - grey),
        "grey": tissue * grey,
        "blood": vessel,
        "csf": 1 - tissue - vessel,
    }
    inside = brain.astype(np.float32)
    return Anatomy({name: share * inside for name, share in fractions.items()}, brain, cerebrum, ventricle)


def _warped(head: Head, grid: Grid, generator: np.random.Generator) -> list[Volume]:
    return [
        line / np.float32(scale) + np.float32(head.warp_mm) * smooth_field(grid, 38.0, generator)
        for line, scale in zip(axes_mm(grid), head.size, strict=True)
    ]


def _ramp(depth_mm: Volume, width_mm: float) -> Volume:
    """Share of a voxel of that width that lies inside a surface at that depth."""
    share: Volume = np.clip(depth_mm / np.float32(width_mm) + np.float32(0.5), 0, 1)
    return share


def _ellipsoid(
    x: Volume, y: Volume, z: Volume, centre: Point, axes: tuple[Volume | float, float, Volume | float]
) -> Volume:
    u, v, w = ((line - np.float32(c)) / a for line, c, a in zip((x, y, z), centre, axes, strict=True))
    squared = u * u + v * v + w * w
    slope = np.sqrt((u / axes[0]) ** 2 + (v / axes[1]) ** 2 + (w / axes[2]) ** 2)
    # first-order distance to the level set |u| = 1
    depth: Volume = ((1 - squared) / (2 * slope + np.float32(1e-2))).astype(np.float32)
    return depth


def _cerebrum(x: Volume, y: Volume, z: Volume) -> Volume:
    width = 66 * (1 - np.float32(0.0013) * y)  # broader behind than in front
    height = np.where(z > 4, np.float32(63), np.float32(46))
    return _ellipsoid(x, y, z, (0, 0, 4), (width, 82, height))


def _capsule(x: Volume, y: Volume, z: Volume, start: Point, stop: Point) -> Volume:
    """Distance from the segment between two points."""
    sx, sy, sz = start
    dx, dy, dz = (np.float32(b - a) for a, b in zip(start, stop, strict=True))
    u, v, w = x - np.float32(sx), y - np.float32(sy), z - np.float32(sz)
    along = np.clip((u * dx + v * dy + w * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
    distance: Volume = np.sqrt((u - along * dx) ** 2 + (v - along * dy) ** 2 + (w - along * dz) ** 2)
    return distance


def _ventricles(x: Volume, y: Volume, z: Volume, scale: float) -> Volume:
    side = np.abs(x)
    walls = [_capsule(side, y, z, a, b) - np.float32(scale * radius) for (a, radius), (b, _) in pairwise(_HORNS)]
    walls.append(np.maximum(side - 1.8 * scale, _capsule(side, y, z, (0, 12, -4), (0, -6, -2)) - 8))
    walls.append(_capsule(side, y, z, (0, -24, -36), (0, -27, -50)) - np.float32(3 * scale))
    return _smallest(walls)


def _smallest(volumes: Iterable[Volume]) -> Volume:
    first, *rest = volumes
    for volume in rest:
        first = np.minimum(first, volume)
    return first


def _sulci(fold: Volume, branch: Volume, depth: Volume) -> Volume:
    """Distance from the sheets where a random field is zero; the sheets end 10 to 22 mm below the hull."""
    bottom = np.clip(depth - (16 + branch * np.float32(0.35)), 0, None)
    distance: Volume = np.hypot(fold * np.float32(0.85), bottom)
    return distance


def _fissure(x: Volume, y: Volume, z: Volume) -> Volume:
    """Distance from the plane between the hemispheres, which the corpus callosum bridges in the middle."""
    bridge = np.clip(_ellipsoid(x, y, z, (0, 0, -6), (80, 52, 34)), 0, None)
    distance: Volume = np.hypot(x, bridge)
    return distance


def _deep_grey(x: Volume, y: Volume, z: Volume, soft_mm: float) -> Volume:
    side = np.abs(x)
    share: Volume = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), np.float32)
    for centre, axes in _NUCLEI:
        share = np.maximum(share, _ramp(_ellipsoid(side, y, z, centre, axes), soft_mm))
    return share


def _vessels(x: Volume, fold: Volume, branch: Volume, depth: Volume, soft_mm: float) -> Volume:
    """Cortical veins, curves on the sulcal sheets, and the sinus along the top of the fissure."""
    vein = 1.3 - np.hypot(fold, branch * np.float32(0.35))
    sinus = 2.6 - np.hypot(x, depth - 2)
    return _ramp(np.maximum(vein, sinus), soft_mm) * (depth > -2)


_HORNS: tuple[tuple[Point, float], ...] = (
    ((12, 44, -2), 5.0),
    ((10, 24, 13), 6.0),
    ((15, -6, 17), 5.5),
    ((25, -26, 7), 5.0),
    ((27, -52, 1), 3.5),
)
"""Centre line of a lateral ventricle from front to back, and its radius from each point on, in mm."""

_NUCLEI: tuple[tuple[Point, Point], ...] = (
    ((12, -2, 0), (9, 14, 9)),  # thalamus
    ((14, 28, 1), (6, 11, 10)),  # head of the caudate
    ((27, 18, -5), (6, 16, 9)),  # putamen
)
"""Centre and half axes of the deep grey nuclei of one side, in mm."""
