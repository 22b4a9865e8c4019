"""Boxes on a voxel grid, and volumes that are stored on their own box with zeros all round.

The brain boxes of one patient's sequences differ. If a network looked at a box that depends on a sequence which is
later declared missing, that sequence would leak into the result. So each sequence lives on its own box of a common
grid; outside it the value is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index3 = tuple[int, int, int]


def _triple(values: Iterable[Any]) -> Index3:
    x, y, z = (int(v) for v in values)
    return x, y, z


@dataclass(frozen=True)
class Box:
    """A half-open box start ≤ i < stop on a voxel grid, per axis, in voxels.

    >>> Box((1, 2, 3), (4, 6, 8)).shape
    (3, 4, 5)
    """

    start: Index3
    stop: Index3

    @property
    def shape(self) -> Index3:
        """Extent in voxels."""
        return _triple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index expression that cuts this box out of its grid."""
        x, y, z = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return x, y, z

    def snapped(self, stride: int) -> Box:
        """The smallest box around this one whose faces are multiples of ``stride`` voxels (it may pass the grid's end).

        Feature maps of a network with that total stride then sit on one lattice, whatever box they were computed on.
        """
        return Box(
            _triple(a // stride * stride for a in self.start), _triple(-(-b // stride) * stride for b in self.stop)
        )

    def within(self, shape: Index3) -> Box:
        """The part of this box that lies on a grid of the given shape."""
        return Box(
            _triple(max(a, 0) for a in self.start), _triple(min(b, n) for b, n in zip(self.stop, shape, strict=True))
        )

    def shifted(self, by: Index3) -> Box:
        """This box moved by ``by`` voxels."""
        return Box(
            _triple(a + d for a, d in zip(self.start, by, strict=True)),
            _triple(b + d for b, d in zip(self.stop, by, strict=True)),
        )

    def relative_to(self, origin: Index3) -> Box:
        """This box in coordinates whose zero is ``origin``."""
        return self.shifted(_triple(-a for a in origin))

    def overlap(self, other: Box) -> Box | None:
        """What two boxes have in common; None where they do not meet.

        >>> Box((0, 0, 0), (4, 4, 4)).overlap(Box((2, 3, -1), (9, 9, 2)))
        Box(start=(2, 3, 0), stop=(4, 4, 2))
        """
        start = _triple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = _triple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    @staticmethod
    def union(boxes: Iterable[Box]) -> Box:
        """The smallest box that holds all the given ones (at least one)."""
        return reduce(
            lambda p, q: Box(
                _triple(min(a, b) for a, b in zip(p.start, q.start, strict=True)),
                _triple(max(a, b) for a, b in zip(p.stop, q.stop, strict=True)),
            ),
            boxes,
        )


def bounding_box(mask: NDArray[Any]) -> Box | None:
    """The tight box of a 3-D array's non-zero voxels, both end planes included; None where all are zero.

    >>> bounding_box(np.pad(np.ones((2, 3, 4)), 1))
    Box(start=(1, 1, 1), stop=(3, 4, 5))
    """
    occupied = mask if mask.dtype == np.bool_ else mask != 0  # a copy of a full volume costs more than the search
    start, stop = [], []
    for axis in range(3):
        line = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
        if line.size == 0:
            return None
        start.append(line[0])
        stop.append(line[-1] + 1)
    return Box(_triple(start), _triple(stop))


@dataclass(frozen=True)
class Boxed:
    """A volume stored on its own box of a larger grid; every voxel outside the box is 0.

    values: [X Y Z] array (may be memory-mapped) of the box's shape
    box:    where it sits on the grid
    """

    values: NDArray[Any]
    box: Box

    def __post_init__(self) -> None:
        assert tuple(self.values.shape) == self.box.shape, (self.values.shape, self.box)

    @classmethod
    def tight(cls, volume: NDArray[Any]) -> Boxed:
        """A full volume reduced to the box of its non-zero voxels (an empty box at the origin where it has none)."""
        box = bounding_box(volume) or Box((0, 0, 0), (0, 0, 0))
        return cls(np.ascontiguousarray(volume[box.slices]), box)

    def window(self, window: Box) -> NDArray[Any]:
        """A copy of any window of the grid (it may reach past the grid), zeros outside this volume's own box."""
        out = np.zeros(window.shape, self.values.dtype)
        overlap = self.box.overlap(window)
        if overlap is not None:
            out[overlap.relative_to(window.start).slices] = self.values[overlap.relative_to(self.box.start).slices]
        return out
