"""The head that every simulated head is a deformation of: tissue maps of the ICBM 152 template (see NOTICE).

`scripts/make_atlas.py` made the file. Coordinates are MNI millimetres, RAS+. Maps:

    white, cortex, deep, ventricle   share of each tissue, 0 … 1; what is left inside the brain is fluid in sulci
    depth                            mm below the brain's surface, negative outside, at most ± 24
    wall                             mm from the ventricles' wall, negative inside them, at most 24
    sinus                            mm below the surface of the great veins and of the plexus, negative outside
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import avg_pool3d, interpolate

from medmap.core.box import Index3
from medmap.phantom.space import Lattice

SHARES = ("white", "cortex", "deep", "ventricle")
MAPS = (*SHARES, "depth", "wall", "sinus")
CENTRE_MM = (0.0, -17.0, 5.0)
"""Middle of the brain in MNI coordinates; a patient's own origin lies here."""

FARTHEST_MM = 24.0

Knot = tuple[float, float, float, float]
GREAT_VEINS: tuple[tuple[Knot, ...], ...] = (
    # the sagittal sinus, along the brain's upper edge to the confluence behind it
    (
        (0, 71, 2, 1.0),
        (0, 63, 30, 1.5),
        (0, 46, 54, 2.0),
        (0, 20, 69, 2.5),
        (0, -10, 78, 3.0),
        (0, -40, 78, 3.5),
        (0, -66, 66, 4.0),
        (0, -89, 43, 4.5),
        (0, -101, 12, 5.0),
        (0, -97, -14, 5.5),
    ),
    # the transverse and the sigmoid sinus, round the edge of the tentorium
    ((0, -97, -14, 5.5), (18, -97, -17, 4.5), (38, -88, -21, 4.0), (54, -68, -27, 4.0), (57, -46, -38, 4.0)),
    # the inner cerebral vein, the great vein of Galen, the straight sinus
    ((3, -4, 15, 0.8), (3, -20, 18, 1.0), (2, -36, 16, 1.5), (0, -42, 10, 2.5), (0, -50, 9, 2.5), (0, -97, -14, 3.5)),
    # plexus of a side ventricle; what lies beyond the ventricle's wall does not count
    ((8, -4, 14, 1.0), (13, -24, 18, 2.0), (22, -38, 14, 3.0), (24, -43, 7, 4.5), (31, -28, -9, 1.5)),
)
"""Lines through the great veins and plexus of the right side: x, y, z and radius at each knot, mm. The left has the
same. Their places are where the template has fissures and sulci for them; radii are ours."""

VEINS_REACH_MM = 12.0
"""Beyond this the depth below a vein is not worked out."""

MARGIN = 8
"""Voxels of nothing round the head, so that what lies beyond the atlas lies outside the head."""


class Atlas(NamedTuple):
    """The maps on a lattice.

    maps: Float[1 7 X Y Z], in the order of `MAPS`; lattice: where they are; outward: Float[1 3 X Y Z], the direction
    away from the nearest ventricle, of length 1 at its wall and fading over 15 mm
    """

    maps: Tensor
    lattice: Lattice
    outward: Tensor


def load_atlas(spacing_mm: float, device: torch.device | str = "cpu") -> Atlas:
    """The atlas averaged over voxels of 1, 2, 3 or 4 mm, the nearest to ``spacing_mm``; read once, then kept.

    >>> load_atlas(4.0).maps.shape[:2]
    torch.Size([1, 7])
    """
    return _load(int(np.clip(round(spacing_mm), 1, 4)), str(device))


@lru_cache(maxsize=8)
def _load(voxel: int, device: str) -> Atlas:
    if (voxel, device) != (1, "cpu"):
        return _coarser(_load(1, "cpu"), voxel, device)
    with resources.files("medmap.phantom").joinpath("atlas.npz").open("rb") as file:
        stored = dict(np.load(file))
    stored_maps = ("white", "cortex", "deep", "ventricle", "brain")
    whole = {name: _mirrored(stored[name] / np.float32(stored["levels"])) for name in stored_maps}
    whole["depth"] = _signed_distance(whole["brain"] > 0.5)
    whole["wall"] = -_signed_distance(whole["ventricle"] > 0.5)
    x, y, z = whole["brain"].shape
    corner = stored["corner_mm"].astype(np.float32)
    start = torch.tensor([[-(x - 1) / 2, corner[1] - MARGIN, corner[2] - MARGIN]])
    whole["sinus"] = _depth_in_veins((x, y, z), start[0].numpy())
    maps = torch.from_numpy(np.stack([whole[name] for name in MAPS]).astype(np.float32))[None]
    return Atlas(_at_once(maps), Lattice(start, 1.0, (x, y, z)), _at_once(_outward(whole["wall"])))


def _mirrored(half: NDArray[np.floating]) -> NDArray[np.floating]:
    """Left and right from the right side, whose first slice is the middle; with nothing all round."""
    return np.pad(np.concatenate([half[:0:-1], half]), MARGIN)


def _signed_distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance in mm from the mask's surface, positive inside; worked out on every second voxel, which is enough."""
    coarse = mask[::2, ::2, ::2]
    inside, outside = (ndimage.distance_transform_edt(side) * 2 for side in (coarse, ~coarse))
    signed = np.clip(np.where(coarse, inside - 1, 1 - outside), -FARTHEST_MM, FARTHEST_MM).astype(np.float32)
    between = tuple(2 * n - 1 for n in signed.shape)
    fine = interpolate(torch.from_numpy(signed)[None, None], size=between, mode="trilinear", align_corners=True)
    short = [(0, n - m) for n, m in zip(mask.shape, between, strict=True)]
    return np.pad(fine[0, 0].numpy(), short, mode="edge")


def _depth_in_veins(shape: Index3, start_mm: NDArray[np.floating]) -> NDArray[np.float32]:
    """Depth in mm below the surface of the great veins; at most FARTHEST_MM outside."""
    lines = [start + np.arange(n, dtype=np.float32) for start, n in zip(start_mm, shape, strict=True)]
    lines[0] = np.abs(lines[0])
    depth = np.full(shape, -FARTHEST_MM, np.float32)
    for one, other in (pair for vein in GREAT_VEINS for pair in pairwise(np.array(vein, np.float32))):
        low, high = np.minimum(one, other)[:3] - VEINS_REACH_MM, np.maximum(one, other)[:3] + VEINS_REACH_MM
        box = np.ix_(*((line > a) & (line < b) for line, a, b in zip(lines, low, high, strict=True)))
        near = np.stack(np.meshgrid(*(line[i.ravel()] for line, i in zip(lines, box, strict=True)), indexing="ij"), -1)
        way, offset = (other - one)[:3], near - one[:3]
        share = np.clip(offset @ way / (way @ way), 0, 1)
        radius = one[3] + share * (other - one)[3]
        depth[box] = np.maximum(depth[box], radius - np.linalg.norm(offset - share[..., None] * way, axis=-1))
    return depth


def _outward(wall_mm: NDArray[np.float32]) -> Tensor:
    smooth = ndimage.gaussian_filter(wall_mm, 2.0)
    slope = np.stack([np.gradient(smooth, axis=axis) for axis in range(3)])
    fade = np.exp(-((np.clip(wall_mm, 0, None) / 15.0) ** 2))
    return torch.from_numpy((slope / np.maximum(np.linalg.norm(slope, axis=0), 0.3) * fade).astype(np.float32))[None]


def _coarser(atlas: Atlas, voxel: int, device: str) -> Atlas:
    maps: Float[Tensor, "1 7 X Y Z"] = avg_pool3d(atlas.maps, voxel)
    x, y, z = maps.shape[2:]
    lattice = Lattice((atlas.lattice.start_mm + (voxel - 1) / 2).to(device), float(voxel), (x, y, z))
    return Atlas(_at_once(maps.to(device)), lattice, _at_once(avg_pool3d(atlas.outward, voxel).to(device)))


def _at_once(values: Tensor) -> Tensor:
    """The values of one voxel side by side in memory, as they are read: a third less time on a CPU."""
    return values.contiguous(memory_format=torch.channels_last_3d)
