"""One patient: as read (Case), as the network sees it (Prepared), as answered (Prediction); and many (Batch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Boxed, Index3
from medmap.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

AFFINE_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class Grid:
    """A voxel grid in space: shape in voxels and the 4×4 affine voxel → mm in RAS+."""

    shape: Index3
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of a voxel's edges in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def matches(self, other: Grid) -> bool:
        """Same shape, and no entry of the affines differs by more than 1e-3 mm."""
        return self.shape == other.shape and bool(np.abs(self.affine - other.affine).max() <= AFFINE_TOLERANCE_MM)


@dataclass(frozen=True)
class Case:
    """One patient's volumes on one grid, as read: any orientation, any unit.

    id:      the patient's name in its data set
    images:  {modality: Float32[X Y Z]}, at least one; a sequence that does not exist is simply not there
    affine:  4×4 voxel → mm in RAS+, shared by all volumes, invertible
    labels:  UInt8[X Y Z] in the file's own codes, or None

    Raises InputError when a volume is not 3-D, shapes differ, a voxel is not finite, or the affine is not finite or has
    no inverse.
    """

    id: str
    images: Mapping[str, NDArray[np.float32]]
    affine: NDArray[np.float64]
    labels: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if not self.images:
            raise InputError(f"case {self.id}: no image at all; at least one sequence is needed")
        volumes: dict[str, NDArray[Any]] = dict(self.images)
        if self.labels is not None:
            volumes["seg"] = self.labels
        first, shape = next((name, volume.shape) for name, volume in volumes.items())
        for name, volume in volumes.items():
            if volume.ndim != 3:
                raise InputError(
                    f"case {self.id}: {name} has {volume.ndim} dimensions {volume.shape}; a 3-D volume is expected"
                )
            if volume.shape != shape:
                raise InputError(
                    f"case {self.id}: {name} is {volume.shape} voxels, {first} is {shape}; all volumes of a case must "
                    "share one grid: resample them onto one (--resample) or register them first"
                )
            bad = int(volume.size - np.isfinite(volume).sum())
            if bad:
                raise InputError(f"case {self.id}: {name} holds {bad} voxels that are NaN or infinite; repair the file")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise InputError(f"case {self.id}: the affine must be a 4×4 matrix of finite numbers:\n{self.affine}")
        if abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
            raise InputError(f"case {self.id}: the affine has no inverse:\n{self.affine}")

    @property
    def grid(self) -> Grid:
        """The grid that all volumes share."""
        x, y, z = next(iter(self.images.values())).shape
        return Grid((x, y, z), self.affine)


@dataclass(frozen=True)
class Prepared:
    """One patient as a network sees it: RAS+, the model's spacing, each sequence on its own brain box.

    id:     the patient's name
    grid:   the common RAS+ grid
    native: the grid the files had; predictions return to it
    images: {modality: Boxed Float16[x y z]}, z-scored inside its own brain, exactly 0 elsewhere
    labels: Boxed UInt8[x y z] of class indices, or None
    """

    id: str
    grid: Grid
    native: Grid
    images: Mapping[str, Boxed]
    labels: Boxed | None = None


@dataclass(frozen=True)
class Prediction:
    """The answer for one patient.

    id:            the patient's name
    grid:          the grid of the arrays below
    classes:       UInt8[X Y Z] class indices
    probabilities: {region: Float32[X Y Z]} or None where they were not asked for
    used:          sequences the prediction was made from
    """

    id: str
    grid: Grid
    classes: NDArray[np.uint8]
    used: tuple[str, ...]
    probabilities: Mapping[str, NDArray[np.float32]] | None = None
    notes: tuple[str, ...] = field(default=())


class Batch(NamedTuple):
    """B samples for a network. Two masks, per sample: what is on disk, and what this pass may look at.

    images: [B M X Y Z], 0 where unseen
    seen:   Bool[B M], on disk
    kept:   Bool[B M], seen and not dropped for this pass; at least one per sample
    target: Int64[B X Y Z] class indices
    ids:    case ids
    """

    images: Tensor
    seen: Tensor
    kept: Tensor
    target: Tensor
    ids: tuple[str, ...]
