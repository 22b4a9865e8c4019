"""Volumes in space: turn to RAS+ and back, change the spacing, normalise. Pure: (array, affine) → (array, affine), mm.

The last three axes of every array are space. The affine maps voxel indices to mm in RAS+ (x to the patient's right,
y to the front, z to the head); an index points at a voxel's centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from nibabel import orientations as _orientations
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.box import Index3
from medmap.core.case import Grid
from medmap.errors import InputError

orientations: Any = _orientations  # nibabel has no types
_RAS = np.array([[0, 1], [1, 1], [2, 1]])
_RIM_VOXELS = 0.01
"""A new grid may miss this share of a voxel at its rim: headers that say 0.99999 mm must not cost a whole slice."""


def to_ras(array: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Turn a volume so that its axes point right, front and up as nearly as they can. No voxel value changes.

    array:  [… X Y Z], any stored orientation
    affine: 4×4 voxel → mm

    Only flips and permutations: an oblique volume stays oblique. Each voxel keeps its place in space. `from_ras` is
    the exact inverse.

    >>> lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    >>> turned, affine = to_ras(np.arange(4).reshape(2, 2, 1), lps)
    >>> turned[..., 0].tolist(), affine[:3, 3].tolist()
    ([[3, 2], [1, 0]], [-1.0, -1.0, 0.0])
    """
    turns = orientations.io_orientation(affine)
    shape = array.shape[-3:]
    return _turned(array, turns), np.asarray(affine @ orientations.inv_ornt_aff(turns, shape), np.float64)


def ras_grid(native: Grid) -> Grid:
    """The grid that `to_ras` turns volumes of ``native`` onto."""
    turns = orientations.io_orientation(native.affine)
    x, y, z = (int(np.flatnonzero(turns[:, 0] == axis)[0]) for axis in range(3))
    shape = (native.shape[x], native.shape[y], native.shape[z])
    return Grid(shape, np.asarray(native.affine @ orientations.inv_ornt_aff(turns, native.shape), np.float64))


def from_ras(array: NDArray[Any], native: Grid) -> NDArray[Any]:
    """Turn a volume [… X Y Z] on ``ras_grid(native)`` back onto ``native``. No voxel value changes."""
    assert array.shape[-3:] == ras_grid(native).shape, (array.shape, native)
    turned = _turned(array, orientations.ornt_transform(_RAS, orientations.io_orientation(native.affine)))
    assert turned.shape[-3:] == native.shape, (turned.shape, native)
    return turned


def _turned(array: NDArray[Any], turns: NDArray[Any]) -> NDArray[Any]:
    space_first = np.moveaxis(array, (-3, -2, -1), (0, 1, 2))
    turned = orientations.apply_orientation(space_first, turns)
    return np.ascontiguousarray(np.moveaxis(turned, (0, 1, 2), (-3, -2, -1)))


def grid_with_spacing(grid: Grid, spacing_mm: float) -> Grid:
    """The grid with cubic voxels that has the same axes and the same centre, and covers all of ``grid``.

        n'_i = ⌈n_i s_i / s'⌉        c = A ((n − 1)/2, 1)        A' = A diag(s'/s), moved so that A' ((n' − 1)/2, 1) = c

    n, s: shape in voxels and spacing in mm, per axis; s' = ``spacing_mm``; A: the affine. The centre of the field of
    view, not that of voxel 0, stays: nothing is shifted by half a voxel. A hundredth of a voxel may be lost at the rim.
    A grid that already has that spacing is returned as it is. Raises InputError for a spacing that is not positive.

    >>> grid_with_spacing(Grid((240, 240, 155), np.eye(4)), 2.0).shape
    (120, 120, 78)
    """
    check_spacing(spacing_mm)
    shape = np.array(grid.shape)
    # rounded: files of one case may differ in the last digits, and which of them is read first must change nothing
    scale = spacing_mm / np.round(grid.spacing_mm, 4)
    x, y, z = (int(n) for n in np.maximum(1, np.ceil(shape / scale - _RIM_VOXELS)))
    affine = grid.affine.copy()
    affine[:3, :3] = grid.affine[:3, :3] * scale
    centre = grid.affine[:3, :3] @ ((shape - 1) / 2) + grid.affine[:3, 3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    new = Grid((x, y, z), affine)
    return grid if new.matches(grid) else new


def check_spacing(spacing_mm: float) -> None:
    """Raises InputError for a spacing that is not a positive number of mm."""
    if not (np.isfinite(spacing_mm) and spacing_mm > 0):
        raise InputError(f"spacing {spacing_mm} mm: expected a positive number of millimetres, such as 1.0")


def resample(array: NDArray[Any], source: Grid, target: Grid, order: int) -> NDArray[Any]:
    """Values of a volume [… X Y Z] on another grid.

    order 1: trilinear, Float32. Where a target voxel is larger than a source voxel, the mean over evenly spread
             points inside it: 1 → 2 mm is the mean of each 2×2×2 block, and fine noise does not fold into structure.
    order 0: the nearest voxel, the array's own dtype.

    Grids that match cost nothing and change nothing. Up to half a voxel beyond the outermost centres the border value
    holds; beyond the source's field of view the result is 0.
    """
    assert order in (0, 1), order
    assert array.shape[-3:] == source.shape, (array.shape, source)
    if source.matches(target):
        return array
    # rounded, so that a centre that falls half-way between two voxels falls there whatever the affine's last digits
    matrix = np.round(np.linalg.inv(source.affine) @ target.affine, 9) + 0.0
    inside = _inside(matrix, source, target)
    out = np.empty((*array.shape[:-3], *target.shape), array.dtype if order == 0 else np.float32)
    for index in np.ndindex(array.shape[:-3]):
        sample = _nearest if order == 0 else _linear
        out[index] = sample(array[index], matrix, target.shape) * inside
    return out


def _nearest(volume: NDArray[Any], matrix: NDArray[np.float64], shape: Index3) -> NDArray[Any]:
    turn, shift = matrix[:3, :3], matrix[:3, 3]
    return ndimage.affine_transform(volume, turn, shift, shape, output=volume.dtype, order=0, mode="nearest")


def _linear(volume: NDArray[Any], matrix: NDArray[np.float64], shape: Index3) -> NDArray[np.float32]:
    turn, shift = matrix[:3, :3], matrix[:3, 3]
    axes = _points_in_a_voxel(turn)
    volume = volume.astype(np.float32, copy=False)
    if np.array_equal(turn, np.diag(turn.diagonal())):
        # grids with the same axes: one axis after the other gives the same at a fraction of the cost
        for axis, points in enumerate(axes):
            centres = np.arange(shape[axis])
            volume = _linear_along(volume, axis, [turn[axis, axis] * (centres + p) + shift[axis] for p in points])
        return volume
    total = np.zeros(shape, np.float32)
    for point in product(*axes):
        total += ndimage.affine_transform(volume, turn, turn @ point + shift, shape, order=1, mode="nearest")
    return total / np.float32(np.prod([len(points) for points in axes]))


def _linear_along(
    volume: NDArray[np.float32], axis: int, positions: Sequence[NDArray[np.float64]]
) -> NDArray[np.float32]:
    """Mean over ``positions`` (each: one position in voxels per output plane) of linear interpolation along an axis."""
    last = volume.shape[axis] - 1
    column = tuple(-1 if a == axis else 1 for a in range(3))
    total = np.zeros([len(positions[0]) if a == axis else size for a, size in enumerate(volume.shape)], np.float32)
    for position in positions:
        inner = position.clip(0, last)
        lower = np.floor(inner).astype(int)
        share = (inner - lower).astype(np.float32).reshape(column)
        total += (1 - share) * volume.take(lower, axis) + share * volume.take(np.minimum(lower + 1, last), axis)
    return total / np.float32(len(positions))


def resample_labels(labels: NDArray[Any], source: Grid, target: Grid) -> NDArray[Any]:
    """A map of codes on another grid: each voxel takes the code with the largest share of it (the lowest of equals).

    labels: [X Y Z] integers. The share of a code is its indicator, resampled by `resample` at order 1.
    """
    if source.matches(target):
        return labels
    best = np.zeros(target.shape, np.float32)
    out = np.zeros(target.shape, labels.dtype)
    for code in np.unique(labels):
        share = resample(labels == code, source, target, order=1)
        # shares are sums of a few float32 products: equals may differ in the last digits
        wins = share > best + 1e-5
        out[wins], best[wins] = code, share[wins]
    return out


def zscore(array: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """z = (x − mean) / std over the voxels of ``mask``, exactly 0 outside it. Float32, same shape.

    mean and std (of the population) are taken in float64 over the mask alone. Where all its voxels hold the same
    value, or it is empty, there is nothing to scale: the result is 0 everywhere. |z| < √n for n voxels in the mask.

    >>> zscore(np.array([0.0, 1.0, 3.0]), np.array([False, True, True])).tolist()
    [0.0, -1.0, 1.0]
    """
    out = np.zeros(array.shape, np.float32)
    values = array[mask].astype(np.float64)
    if values.size and values.min() < values.max():
        out[mask] = (values - values.mean()) / values.std()
    return out


def _points_in_a_voxel(turn: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Per target axis, offsets from a voxel's centre in voxels: as many as source voxels fit into it along it."""
    counts = np.ceil(np.linalg.norm(turn, axis=0) - _RIM_VOXELS).astype(int).clip(1)
    return [(np.arange(count) + 0.5) / count - 0.5 for count in counts]


def _inside(matrix: NDArray[np.float64], source: Grid, target: Grid) -> NDArray[np.bool_]:
    """Bool[X Y Z] of the target: its voxel's centre lies in the source's field of view."""
    indices = np.ogrid[: target.shape[0], : target.shape[1], : target.shape[2]]
    inside = np.ones(target.shape, bool)
    for axis, size in enumerate(source.shape):
        # terms that are 0 are left out, so that aligned grids only ever make thin arrays
        at = matrix[axis, 3] + sum(matrix[axis, j] * indices[j] for j in range(3) if matrix[axis, j])
        inside &= (at >= -0.5 - 1e-6) & (at <= size - 0.5 + 1e-6)
    return inside
