"""Lattices in space, random smooth fields on them, and sampling one at the points of another. Millimetres, RAS+."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from medmap.core.box import Index3

REACH_MM = 132.0
"""Half the edge of the cube in which random fields do not repeat; every head lies inside it."""


class Lattice(NamedTuple):
    """Points on a cubic lattice, one lattice per patient or one for all.

    start_mm:   Float[B 3] or Float[1 3], the first point's coordinates
    spacing_mm: distance between neighbours
    shape:      X, Y, Z points
    """

    start_mm: Tensor
    spacing_mm: float
    shape: Index3

    @classmethod
    def centred(cls, shape: Index3, spacing_mm: float, device: torch.device | str = "cpu") -> Lattice:
        """A lattice whose middle is the origin.

        >>> Lattice.centred((3, 3, 3), 2.0).start_mm.tolist()
        [[-2.0, -2.0, -2.0]]
        """
        start = -spacing_mm * (torch.tensor(shape, dtype=torch.float32, device=device) - 1) / 2
        return cls(start[None], spacing_mm, shape)

    def lines(self) -> list[Tensor]:
        """Coordinates along x, y, z: Float[B n] each."""
        device = self.start_mm.device
        return [
            self.start_mm[:, axis, None] + self.spacing_mm * torch.arange(n, dtype=torch.float32, device=device)
            for axis, n in enumerate(self.shape)
        ]

    def points(self) -> Float[Tensor, "B 3 X Y Z"]:
        """Coordinates of every point."""
        x, y, z = self.lines()
        full = (len(x), *self.shape)
        each = (x[:, :, None, None], y[:, None, :, None], z[:, None, None, :])
        return torch.stack([line.expand(full) for line in each], dim=1)


def smooth_field(
    lattice: Lattice, scale_mm: float, generators: Sequence[np.random.Generator], channels: int = 1
) -> Float[Tensor, "B C X Y Z"]:
    """Random fields of mean 0 and variance about 1 that change over ``scale_mm``.

    White noise on a grid of that spacing, interpolated by cubic B-splines. That grid is fixed in space, so a patient's
    field is the same function on every lattice. One generator per patient draws its channels, on any device alike.

    >>> smooth_field(Lattice.centred((9, 9, 9), 4.0), 20.0, [np.random.default_rng(0)]).shape
    torch.Size([1, 1, 9, 9, 9])
    """
    nodes = int(np.ceil(2 * REACH_MM / scale_mm)) + 4
    drawn = [g.standard_normal((channels, nodes, nodes, nodes), dtype=np.float32) for g in generators]
    noise = torch.from_numpy(np.stack(drawn)).to(lattice.start_mm.device)
    along_x, along_y, along_z = (_spline_weights(line, scale_mm, nodes)[:, None] for line in lattice.lines())
    smooth = noise @ along_z.mT[:, :, None]  # the innermost axis first: it makes the smallest product of the three
    smooth = along_y[:, :, None] @ smooth
    flat = smooth.flatten(-2)
    # 151/315 is the mean over a cell of the sum of squared cubic B-spline weights
    out: Tensor = torch.unflatten(along_x @ flat, -1, smooth.shape[-2:]) * (315 / 151) ** 1.5
    return out


def _spline_weights(line_mm: Float[Tensor, "B n"], scale_mm: float, nodes: int) -> Float[Tensor, "B n nodes"]:
    where = ((line_mm + REACH_MM) / scale_mm + 1.0) % nodes
    away = (where[:, :, None] - torch.arange(nodes, dtype=torch.float32, device=line_mm.device)).abs()
    away = torch.minimum(away, nodes - away)  # beyond its reach a field repeats
    inner = 2 / 3 - away**2 * (1 - away / 2)
    outer = (2 - away).clamp(min=0) ** 3 / 6
    return torch.where(away < 1, inner, outer)


def sample(
    values: Float[Tensor, "B C n n n"], lattice: Lattice, points_mm: Float[Tensor, "B 3 X Y Z"]
) -> Float[Tensor, "B C X Y Z"]:
    """Values on a lattice at other points, by trilinear interpolation; beyond the lattice its border goes on.

    Values, lattice and points are each one per patient or one for all.

    >>> lattice = Lattice.centred((3, 3, 3), 2.0)
    >>> x = lattice.points()[:, :1]
    >>> sample(x, lattice, torch.full((1, 3, 1, 1, 1), 0.5)).item()
    0.5
    """
    size = torch.tensor(lattice.shape, dtype=torch.float32, device=points_mm.device) - 1
    start = lattice.start_mm[:, :, None, None, None]
    unit = (points_mm - start) * (2 / (lattice.spacing_mm * size))[:, None, None, None] - 1
    where = unit.flip(1).movedim(1, -1)  # grid_sample names the innermost axis first
    patients = max(len(values), len(where))
    values, where = values.expand(patients, -1, -1, -1, -1), where.expand(patients, -1, -1, -1, -1)
    return grid_sample(values, where, padding_mode="border", align_corners=True)


def ramp(depth_mm: Tensor, width_mm: float | Tensor) -> Tensor:
    """Share of a voxel of that width that lies inside a surface at that depth.

    >>> ramp(torch.tensor([-2.0, 0.0, 0.5, 2.0]), 2.0).tolist()
    [0.0, 0.5, 0.75, 1.0]
    """
    return (depth_mm / width_mm + 0.5).clamp(0, 1)


def per_patient(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """One number per patient as Float[B 1 1 1 1], or C numbers per patient as Float[B C 1 1 1]."""
    column = torch.tensor(values, dtype=torch.float32, device=like.device)
    return column.reshape(len(values), -1, 1, 1, 1)


def onto(values: Float[Tensor, "B C n n n"], lattice: Lattice, other: Lattice) -> Float[Tensor, "B C X Y Z"]:
    """Values on a lattice at the points of another one: as `sample`, but both lie along the same axes, so one small
    matrix for each axis does it.

    >>> coarse, fine = Lattice.centred((3, 3, 3), 2.0), Lattice.centred((5, 5, 5), 1.0)
    >>> bool((onto(coarse.points(), coarse, fine) - fine.points()).abs().max() < 1e-5)
    True
    """
    matrices = [
        _linear_weights((line - start[:, None]) / lattice.spacing_mm, n)[:, None]
        for line, start, n in zip(other.lines(), lattice.start_mm.unbind(1), lattice.shape, strict=True)
    ]
    return along_axes(values, matrices)


def _linear_weights(where: Float[Tensor, "B n"], nodes: int) -> Float[Tensor, "B n nodes"]:
    """Weights of linear interpolation at points given in steps of the nodes; the ends go on."""
    away = where.clamp(0, nodes - 1)[:, :, None] - torch.arange(nodes, dtype=where.dtype, device=where.device)
    return (1 - away.abs()).clamp(min=0)


def along_axes(
    volumes: Float[Tensor, "*batch i j k"], matrices: Sequence[Float[Tensor, "*batch n m"]]
) -> Float[Tensor, "*batch X Y Z"]:
    """A linear map along each axis in turn: out[x y z] = Σ A[x i] B[y j] C[z k] in[i j k].

    Blurs, cut-offs in k-space and thick slices are all of this form, and on any device fast.
    """
    x, y, z = matrices
    out = volumes @ (z.mT if z.ndim == 2 else z.mT[..., None, :, :])
    out = (y if y.ndim == 2 else y[..., None, :, :]) @ out
    return torch.unflatten(x @ out.flatten(-2), -1, out.shape[-2:])


def gaussian_matrix(n: int, sigma_voxels: float, device: torch.device | str = "cpu") -> Float[Tensor, "n n"]:
    """Average along an axis of n points with a Gaussian; at the ends over what is there.

    >>> gaussian_matrix(5, 1.0).sum(dim=1).allclose(torch.ones(5))
    True
    """
    line = torch.arange(n, dtype=torch.float32, device=device)
    weights = (-((line[:, None] - line) ** 2) / (2 * max(sigma_voxels, 1e-3) ** 2)).exp()
    weights = weights * (weights > 1e-6)  # denormal numbers would make products with it many times slower
    return weights / weights.sum(dim=1, keepdim=True)
