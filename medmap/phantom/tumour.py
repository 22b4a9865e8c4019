"""A glioma: reaction–diffusion growth in a head, and the nested compartments that a reader would outline.

Cells spread and divide (Fisher–Kolmogorov):

    ∂c/∂t = ∇·(D ∇c) + ρ c (1 − c),      no flux into fluid or out of the brain

c: cell density relative to the most that tissue holds, 0 … 1; D: diffusivity, mm²/day, several times larger in white
than in grey matter; ρ: net proliferation, 1/day. Growth stops when the tumour has the volume that was drawn. Its front
is √(D/ρ) wide, which decides how far oedema reaches beyond the core.

Sources: Swanson, Alvord, Murray, Cell Prolif 2000: ρ = 0.012/day and D = 0.65 mm²/day in white matter of high-grade
glioma, five times the diffusivity of grey matter; ρ about 0.0012/day for low grade; c = 0.16 at the edge of what T2
shows (Swanson et al. 2008). Volumes and their ratios: 368 reference segmentations of BraTS 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import ndtr
from torch import Tensor

from medmap.phantom.anatomy import Anatomy, Mass
from medmap.phantom.atlas import SHARES
from medmap.phantom.space import Lattice, along_axes, gaussian_matrix, onto, per_patient, smooth_field

EDGE_DENSITY = 0.16
GROWTH_MM = 3.0
GROWTH_CUBE = 48
CUBE_SLACK_MM = (0.0, 22.0, 4.0)
"""How far the cube's middle may lie from the head's: as far as there is head on all sides of it."""

OUTLINE_MM = 2.0
OUTLINE_CUBE = 72
MOST_STEPS = 400
FAR_OUTSIDE_MM = -50.0
ROOM_BELOW_ML = 60.0
"""Only smaller tumours are drawn below the tentorium."""

STABILITY = 6.5
"""Explicit steps in three dimensions are stable where D Δt / h² ≤ 1/6."""

PERCENTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHARE_WITHOUT_ET = 0.073
WT_ML = (PERCENTILES, (4.0, 20.78, 50.15, 89.74, 144.37, 200.4, 270.0))
TC_OF_WT = (PERCENTILES, (0.03, 0.09, 0.24, 0.39, 0.56, 0.75, 0.93))
ET_OF_TC = ((SHARE_WITHOUT_ET, 0.25, 0.5, 0.75, 0.95, 1.0), (0.02, 0.43, 0.62, 0.78, 0.94, 0.99))
"""Quantile functions: shares of tumours, and the value that so many do not exceed. The ends are ours."""

COPULA = np.array([[1.0, 0.15, 0.0], [0.15, 1.0, -0.7], [0.0, -0.7, 1.0]])
"""Correlations between the normal scores of the three above, chosen so that the volumes of TC, ET, NCR and ED, which
are products of them, have the percentiles of the reference too: large cores are those that enhance little."""


@dataclass(frozen=True)
class Tumour:
    """What was drawn; on a grid the volumes are these, but for rounding and for a head too small for them.

    wt_ml, tc_ml, et_ml, cavity_ml: whole tumour, core, enhancing part, resection cavity (0: not operated)
    foci:                centres of growth, 1 … 3
    rho_per_day:         net proliferation rate
    infiltration_mm:     √(D/ρ) in white matter
    grey_ratio:          diffusivity of white over grey matter
    rough, core_rough:   standard deviation of the outline's log-density, of the whole tumour and of the core
    rim_rough:           how much the enhancing rim's thickness varies, relative to itself
    patchy:              0: a rim round necrosis; 1: enhancing nodules anywhere in the core
    displaced:           share of the core's volume, and of a third of the oedema's, that pushed tissue aside
    below_tentorium:     it grows in the cerebellum or the brainstem
    grown:               by reaction–diffusion; else it is round the foci, whatever the tissue, as far as its outline
                         is not rough
    """

    wt_ml: float
    tc_ml: float
    et_ml: float
    cavity_ml: float
    foci: int
    rho_per_day: float
    infiltration_mm: float
    grey_ratio: float
    rough: float
    core_rough: float
    rim_rough: float
    patchy: float
    displaced: float
    below_tentorium: bool
    grown: bool = True

    @property
    def diffusivity_mm2_day(self) -> float:
        """D in white matter."""
        return self.rho_per_day * self.infiltration_mm**2


class Grown(NamedTuple):
    """B tumours after growth.

    density: Float[B 1 n n n], c; age: Float[B 1 n n n], ∫ c dt relative to the tumour's oldest point; lattice: of both
    """

    density: Tensor
    age: Tensor
    lattice: Lattice


@dataclass(frozen=True)
class Outlines:
    """Where each compartment is: depth below its surface in mm (positive inside), Float[B 4 X Y Z] on a lattice.

    Channels: whole tumour; core, with the cavity; enhancing part of the core; cavity. Each one's surface is its own: it
    is to be cut with those before, so that a thin rim stays as thick as it is when sampled between the points.
    """

    depth_mm: Tensor
    lattice: Lattice

    def at(self, lattice: Lattice) -> dict[str, Float[Tensor, "B 1 X Y Z"]]:
        """The depths at other points."""
        depth = onto(self.depth_mm, self.lattice, lattice)
        return dict(zip(("wt", "tc", "et", "rc"), torch.split(depth, 1, dim=1), strict=True))


def draw_tumour(generator: np.random.Generator, *, operated: bool = False, grown: bool = True) -> Tumour:
    """A random tumour. operated: after surgery, with a resection cavity; grown: by reaction–diffusion."""
    scores = np.linalg.cholesky(COPULA) @ generator.standard_normal(3)
    wt, core, rim = (float(u) for u in ndtr(scores))
    wt_ml = _quantile(wt, WT_ML)
    tc_ml = wt_ml * _quantile(core, TC_OF_WT)
    et_ml = tc_ml * _quantile(rim, ET_OF_TC) if rim > SHARE_WITHOUT_ET else 0.0
    cavity_ml = tc_ml * float(generator.uniform(0.3, 0.8)) if operated else 0.0
    # the oedema's thickness, were all balls, is ln(0.8/0.16) fronts wide
    thickness_mm = (3e3 / (4 * np.pi)) ** (1 / 3) * (wt_ml ** (1 / 3) - tc_ml ** (1 / 3))
    infiltration_mm = np.clip(thickness_mm / np.log(0.8 / EDGE_DENSITY) * np.exp(generator.normal(0, 0.2)), 2.5, 9.0)
    return Tumour(
        wt_ml=wt_ml,
        tc_ml=tc_ml,
        et_ml=min(et_ml, tc_ml - cavity_ml),
        cavity_ml=cavity_ml,
        foci=1 + int(generator.random() < 0.12) + int(generator.random() < 0.03),
        rho_per_day=float(np.exp(generator.uniform(np.log(0.0012), np.log(0.012)))) * (2.0 if et_ml else 1.0),
        infiltration_mm=float(infiltration_mm),
        grey_ratio=float(generator.uniform(4.0, 12.0)),
        rough=float(generator.uniform(0.2, 0.8)),
        core_rough=float(generator.uniform(0.1, 0.4)),
        rim_rough=float(generator.uniform(0.02, 0.3)),
        patchy=float(generator.uniform(0, 1) ** 3),
        displaced=float(generator.uniform(0.1, 0.9)),
        below_tentorium=bool(generator.random() < 0.2) and wt_ml < ROOM_BELOW_ML,
        grown=grown,
    )


def _quantile(u: float, function: tuple[tuple[float, ...], tuple[float, ...]]) -> float:
    return float(np.interp(u, *function))


def place(
    tumours: Sequence[Tumour], anatomy: Anatomy, generators: Sequence[np.random.Generator]
) -> Float[Tensor, "B 3 3"]:
    """Centres of growth in mm, in deep white matter: B patients, 3 foci (those not used repeat)."""
    maps = anatomy.at(anatomy.lattice, ("white", "depth", "wall"))
    x_mm, y_mm, z_mm = torch.split(anatomy.atlas_mm(anatomy.lattice), 1, dim=1)
    above = (maps["white"] > 0.6) & (maps["depth"] > 9) & (maps["wall"] > 4) & (z_mm > -12)
    below = (maps["white"] > 0.5) & (maps["depth"] > 6) & (maps["wall"] > 2)
    below = below & (z_mm < -26) & (y_mm < -20) & (x_mm.abs() < 40)  # not the temporal lobe
    suits = torch.where(per_patient([t.below_tentorium for t in tumours], z_mm) > 0, below, above)
    points = anatomy.lattice.points()[0].flatten(1).T.cpu().numpy()
    chosen = []
    for tumour, row, generator in zip(tumours, suits.flatten(1).cpu().numpy(), generators, strict=True):
        places = points[row]
        foci = [places[generator.integers(len(places))]]
        away = np.linalg.norm(places - foci[0], axis=1)
        near = places[(away > 22) & (away < 50)]
        while len(foci) < tumour.foci and len(near):
            foci.append(near[generator.integers(len(near))])
        chosen.append(np.stack([*foci, *[foci[0]] * (3 - len(foci))]))
    return torch.tensor(np.stack(chosen), dtype=torch.float32, device=maps["white"].device)


def mass_of(tumours: Sequence[Tumour], foci: Float[Tensor, "B 3 3"]) -> Mass:
    """What the tumours push aside."""
    added = [t.displaced * (t.tc_ml + 0.3 * (t.wt_ml - t.tc_ml)) for t in tumours]
    return Mass(foci[:, 0], torch.tensor(added, dtype=torch.float32, device=foci.device))


def grow(
    tumours: Sequence[Tumour],
    anatomy: Anatomy,
    foci: Float[Tensor, "B 3 3"],
    generators: Sequence[np.random.Generator],
) -> Grown:
    """Let each tumour grow until it has reached its volume, on a lattice of 3 mm over the part of the head round it."""
    slack = torch.tensor(CUBE_SLACK_MM, device=foci.device)
    lattice = _cube(foci[:, 0].clamp(-slack, slack), GROWTH_MM, GROWTH_CUBE)
    tissues = anatomy.tissues(maps := anatomy.at(lattice, (*SHARES, "depth")))
    grey = 1 / per_patient([t.grey_ratio for t in tumours], foci)
    above = torch.sigmoid((anatomy.atlas_mm(lattice)[:, 2:] + 22) / 4)
    own_side = torch.where(per_patient([t.below_tentorium for t in tumours], foci) > 0, 1 - above, above)
    spread = tissues["white"] + grey * (tissues["cortex"] + tissues["deep"])
    spread = spread * (maps["depth"] > 0) * (tissues["csf"] < 0.5) * (0.1 + 0.9 * own_side)
    faces = [_between(spread, axis) for axis in (2, 3, 4)]
    pace = (GROWTH_MM / per_patient([t.infiltration_mm for t in tumours], foci)) ** 2 / STABILITY
    pace = pace * (0.5 * smooth_field(lattice, 22.0, generators)).exp() * (spread > 0)
    wanted = torch.tensor([t.wt_ml * 1000 / GROWTH_MM**3 if t.grown else 0.0 for t in tumours], device=foci.device)
    density = _seeds(tumours, foci, lattice) * (spread > 0)
    age = torch.zeros_like(density)
    for step in range(MOST_STEPS):
        if step % 8 == 0:
            small = (density > EDGE_DENSITY).flatten(1).sum(1) < wanted
            if not small.any():
                break
            density = density * (density > 1e-12)  # nor shall a front's far tail become denormal, which is slow
            active = small.to(density.dtype)[:, None, None, None, None]
        density = density + active * (_divergence(density, faces) / STABILITY + pace * density * (1 - density))
        age = age + active * density
    age = age / age.amax(dim=(2, 3, 4), keepdim=True).clamp(min=1)
    if all(t.grown for t in tumours):
        return Grown(density, age, lattice)
    grown, around = per_patient([t.grown for t in tumours], foci) > 0, _balls(tumours, foci, lattice)
    return Grown(torch.where(grown, density, around), torch.where(grown, age, around), lattice)


def outline(
    tumours: Sequence[Tumour],
    anatomy: Anatomy,
    grown: Grown,
    generators: Sequence[np.random.Generator],
) -> Outlines:
    """Compartments of exactly the drawn volumes: the points of largest density, deepest core, outermost rim."""
    lattice = Lattice(grown.lattice.start_mm, OUTLINE_MM, (OUTLINE_CUBE,) * 3)
    tissues = anatomy.tissues(maps := anatomy.at(lattice, (*SHARES, "depth", "wall")))
    wide, fine = smooth_field(lattice, 16.0, generators), smooth_field(lattice, 6.0, generators)
    core_wide, core_fine = smooth_field(lattice, 20.0, generators), smooth_field(lattice, 7.0, generators)
    sector = smooth_field(lattice, 18.0, generators)

    def column(name: str) -> Tensor:
        return per_patient([getattr(t, name) for t in tumours], grown.density)

    level = onto(_through_fluid(grown.density).clamp(min=1e-12).log(), grown.lattice, lattice)
    age = onto(_through_fluid(grown.age), grown.lattice, lattice)
    inside = (maps["depth"] > 0.5) & (maps["wall"] > 0) & _off_the_border(lattice)
    # readers leave cortex and sulci out of the oedema; the density there is not much lower
    left_out = 1.5 * tissues["cortex"] + 3.0 * tissues["csf"]
    whole = level + column("rough") * (wide + 0.5 * fine) - column("grown") * left_out
    wt = _outlined(whole, inside, column("wt_ml"), lattice)
    wt = torch.where(inside, wt, wt.clamp(max=-1.0))
    wt = torch.where(_off_the_border(lattice), wt, FAR_OUTSIDE_MM)
    # the core is where cells have been longest: around the foci, whether or not the density there is already full
    core = age + 0.3 * column("core_rough") * (core_wide + 0.4 * core_fine)
    tc = _outlined(core, wt > 0, column("tc_ml"), lattice)
    all_core = (wt > 0) & (tc > 0)
    buried = _buried(all_core.float())
    ring = -buried + column("rim_rough") * (0.5 * sector + 0.25 * core_fine)
    nodules = 0.6 * sector + 0.4 * core_fine
    patchy = column("patchy")
    cavity = _outlined(buried + 0.3 * core_wide, all_core, column("cavity_ml"), lattice)
    rim = (1 - patchy) * ring + patchy * nodules
    et = _outlined(rim, all_core & (cavity <= 0), column("et_ml"), lattice)
    return Outlines(torch.cat([wt, tc, et, cavity], dim=1), lattice)


def _cube(centre_mm: Float[Tensor, "B 3"], spacing_mm: float, n: int) -> Lattice:
    return Lattice(centre_mm - spacing_mm * (n - 1) / 2, spacing_mm, (n, n, n))


def _off_the_border(lattice: Lattice) -> Bool[Tensor, "X Y Z"]:
    """False on the lattice's outermost points: beyond them their values go on, and a tumour must not."""
    inner = torch.zeros(lattice.shape, dtype=torch.bool, device=lattice.start_mm.device)
    inner[1:-1, 1:-1, 1:-1] = True
    return inner


def _seeds(tumours: Sequence[Tumour], foci: Float[Tensor, "B 3 3"], lattice: Lattice) -> Float[Tensor, "B 1 n n n"]:
    """Small balls of cells; later foci start with fewer, so they stay smaller."""
    points = lattice.points()
    balls = []
    for number in range(3):
        strength = per_patient([0.8 * 0.03**number * (number < t.foci) for t in tumours], foci)
        away = points - foci[:, number, :, None, None, None]
        ball = (-away.square().sum(1, keepdim=True) / (2 * GROWTH_MM**2)).exp()
        balls.append(strength * ball * (ball > 1e-3))  # or the tail would start growth beyond a sulcus
    return torch.stack(balls).amax(dim=0)


def _balls(tumours: Sequence[Tumour], foci: Float[Tensor, "B 3 3"], lattice: Lattice) -> Float[Tensor, "B 1 n n n"]:
    """A density that falls off with the distance from the nearest focus alone, as a front of this width would."""
    away = (lattice.points()[:, None] - foci[..., None, None, None]).norm(dim=2).amin(dim=1, keepdim=True)
    return (-away / (3 * per_patient([t.infiltration_mm for t in tumours], foci))).exp()


def _between(spread: Tensor, axis: int) -> Tensor:
    """Diffusivity of the faces between neighbours along an axis: the harmonic mean, 0 where either side is a wall."""
    n = spread.shape[axis] - 1
    here, there = spread.narrow(axis, 0, n), spread.narrow(axis, 1, n)
    return 2 * here * there / (here + there + 1e-9)


def _divergence(density: Tensor, faces: Sequence[Tensor]) -> Tensor:
    """Σ over faces of D (c_neighbour − c): what diffuses into each point, in lattice units."""
    change = torch.zeros_like(density)
    for axis, face in zip((2, 3, 4), faces, strict=True):
        flux = face * density.diff(dim=axis)
        n = flux.shape[axis]
        change.narrow(axis, 0, n).add_(flux)
        change.narrow(axis, 1, n).sub_(flux)
    return change


def _through_fluid(density: Tensor) -> Tensor:
    """The density, and in sulci, where there are no cells, the average of those around: a tumour swallows them."""
    blur = [gaussian_matrix(density.shape[-1], 1.0, density.device)] * 3
    there = (density > 0).to(density.dtype)
    around = along_axes(density, blur) / along_axes(there, blur).clamp(min=0.05)
    return torch.where(density > 0, density, around)


def _outlined(score: Tensor, within: Tensor, volume_ml: Tensor, lattice: Lattice) -> Tensor:
    """Depth in mm below a surface of equal score, inside which the points of ``within`` have the volume."""
    voxel_ml = lattice.spacing_mm**3 / 1000
    out = torch.full_like(score, FAR_OUTSIDE_MM)
    for row, (values, room, ml) in enumerate(zip(score[:, 0], within[:, 0], volume_ml.flatten().tolist(), strict=True)):
        candidates = values[room]
        count = min(round(ml / voxel_ml), candidates.numel())
        if count == 0:
            continue
        threshold = candidates.kthvalue(candidates.numel() - count + 1).values
        slope = torch.stack(torch.gradient(values)).square().sum(dim=0).sqrt() / lattice.spacing_mm
        near = room & ((values - threshold).abs() < 2 * slope * lattice.spacing_mm)
        steepness = slope[near].median() if near.any() else slope.new_tensor(1.0)
        out[row, 0] = (values - threshold) / steepness.clamp(min=1e-4) + 1e-3
    return out


def _buried(mask: Tensor) -> Tensor:
    """How deep inside a mask each point lies, up to a few cm: its average over balls of several sizes, 0 … 1."""
    blurs = (gaussian_matrix(mask.shape[-1], sigma, mask.device) for sigma in (1.0, 2.0, 4.0, 8.0))
    return torch.stack([along_axes(mask, [blur] * 3) for blur in blurs]).mean(dim=0)
