"""Vessels that branch through an organ: trees of tapering tubes, and their depth at the points of a lattice."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from medmap.phantom.space import Lattice, ramp

Points = NDArray[np.floating[Any]]

STEP_MM = 9.0


class Tubes(NamedTuple):
    """Pieces of vessels: from start_mm to end_mm, Float[n 3]; radius_mm Float[n]."""

    start_mm: Points
    end_mm: Points
    radius_mm: Points


def branching(
    stem_mm: Points, targets_mm: Points, leaf_mm: float, thickest_mm: float, generator: np.random.Generator
) -> Tubes:
    """A tree that supplies all targets.

    stem_mm:     points of the stem, Float[s 3], from outside to where it may branch; only its last point branches
    targets_mm:  where twigs end, Float[t 3]
    leaf_mm:     radius of a twig; thickest_mm: no vessel is wider

    Each target, the nearest to the stem first, joins the tree where the detour is small: at the node that minimises
    distance + 0.35 × length of the way there. A vessel that feeds n twigs has radius leaf · n^(1/3) (Murray's law, PNAS
    1926: the sum of cubed radii is the same before and after a branching).
    """
    nodes = [np.asarray(point, float) for point in stem_mm]
    parents, lengths = [max(i - 1, 0) for i in range(len(nodes))], [0.0] * len(nodes)
    first = len(nodes) - 1
    ends = []
    for target in targets_mm[np.argsort(np.linalg.norm(targets_mm - nodes[-1], axis=1))]:
        there = np.stack(nodes[first:])
        cost = np.linalg.norm(there - target, axis=1) + 0.35 * np.array(lengths[first:])
        at = first + int(cost.argmin())
        for point in _bowed(nodes[at], target, generator):
            nodes.append(point)
            parents.append(at)
            lengths.append(lengths[at] + float(np.linalg.norm(point - nodes[at])))
            at = len(nodes) - 1
        ends.append(at)
    fed = np.zeros(len(nodes))
    fed[ends] = 1
    for i in range(len(nodes) - 1, 0, -1):
        fed[parents[i]] += fed[i]
    radius = np.minimum(leaf_mm * np.maximum(fed, 1) ** (1 / 3), thickest_mm)
    every = np.stack(nodes)
    return Tubes(every[parents[1:]], every[1:], radius[1:])


def _bowed(start: Points, end: Points, generator: np.random.Generator) -> Points:
    """Points on a slightly bent way, without the first."""
    way = end - start
    length = float(np.linalg.norm(way))
    share = np.linspace(0, 1, max(1, round(length / STEP_MM)) + 1)[1:, None]
    aside = generator.normal(0.0, 0.1 * length, 3)
    return start + share * way + np.sin(np.pi * share) * aside


def tube_share(tubes: Tubes, lattice: Lattice) -> Float[Tensor, "X Y Z"]:
    """Share of each voxel of a lattice that lies in the tubes; of a voxel wider than the tube, part."""
    lines = [line[0] for line in lattice.lines()]
    share = torch.zeros(lattice.shape, device=lattice.start_mm.device)
    for start, end, radius, begin, stop in zip(*tubes, *_boxes(tubes, lattice), strict=True):
        if (begin >= stop).any():
            continue
        cut = tuple(slice(int(a), int(b)) for a, b in zip(begin, stop, strict=True))
        box = torch.stack(torch.meshgrid(*(line[c] for line, c in zip(lines, cut, strict=True)), indexing="ij"))
        depth = _capsule(box, start, end, float(radius))
        most = min(1.0, 2 * float(radius) / lattice.spacing_mm)
        inside = ramp(depth, lattice.spacing_mm) * most
        share[cut] = torch.maximum(share[cut], inside)
    return share


def _boxes(tubes: Tubes, lattice: Lattice) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The part of the lattice that each piece can touch: first index and the one behind the last, Int[n 3] each."""
    origin = lattice.start_mm[0].cpu().numpy()
    reach = tubes.radius_mm[:, None] + lattice.spacing_mm
    low = (np.minimum(tubes.start_mm, tubes.end_mm) - reach - origin) / lattice.spacing_mm
    high = (np.maximum(tubes.start_mm, tubes.end_mm) + reach - origin) / lattice.spacing_mm
    begins, stops = np.clip(np.ceil(low), 0, lattice.shape), np.clip(np.floor(high) + 1, 0, lattice.shape)
    return begins.astype(np.intp), stops.astype(np.intp)


def _capsule(points: Float[Tensor, "3 x y z"], start: Points, end: Points, radius: float) -> Float[Tensor, "x y z"]:
    way = end - start
    square = max(float(way @ way), 1e-6)
    offset = [line - float(s) for line, s in zip(points, start, strict=True)]
    share = sum(o * (float(w) / square) for o, w in zip(offset, way, strict=True))
    assert isinstance(share, Tensor)
    share = share.clamp(0, 1)
    away = sum((o - share * float(w)).square() for o, w in zip(offset, way, strict=True))
    assert isinstance(away, Tensor)
    return radius - away.sqrt()
