"""A healthy head: how it deforms the atlas, and which tissues it has at any points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medmap.phantom.atlas import CENTRE_MM, MAPS, load_atlas
from medmap.phantom.space import Lattice, onto, per_patient, sample, smooth_field

WARP_MM = 4.0
"""Spacing of the lattice on which a head's deformation is kept."""

WARP_SHAPE = (42, 50, 42)

OUTERMOST_MM = -3.0
"""No skull-stripping leaves what lies farther out."""

WIDENING_STEPS = 6
"""The ventricles' walls move by 6 mm at most, so by 1 mm in a step: less than their outward direction changes over."""

BEND_SCALES_MM = (42.0, 18.0)
"""The deformation is the sum of a slow one, which makes heads differ in shape, and a faster one, which moves sulci."""


@dataclass(frozen=True)
class Head:
    """What differs between two healthy heads.

    size:           scale along x, y, z relative to the atlas, whose brain is larger than most
    turn_rad:       rotation about x, y, z, left over from registration
    bend_mm:        standard deviation of the velocity of the slow and the fast deformation
    ventricle_mm:   how much farther out the ventricles' walls lie
    atrophy:        0 … 2: how much of the cortex has given way to fluid
    myelin:         share of white matter in what the atlas calls cortex: its lower layers are full of fibres
    crispness:      1: tissue borders as blurred as in the average of 152 heads; above: sharper
    sinus_mm:       how much wider the great veins are
    strip_mm, strip_rough_mm: depth at which skull-stripping cut, and its standard deviation along the surface
    """

    size: tuple[float, float, float]
    turn_rad: tuple[float, float, float]
    bend_mm: tuple[float, float]
    ventricle_mm: float
    atrophy: float
    myelin: float
    crispness: float
    sinus_mm: float
    strip_mm: float
    strip_rough_mm: float


@dataclass(frozen=True)
class Mass:
    """What pushes tissue aside: a ball of new tissue, one per patient.

    centre_mm: Float[B 3]; added_ml: Float[B], its volume
    """

    centre_mm: Tensor
    added_ml: Tensor


class Anatomy:
    """The heads of B patients: a map from their space to the atlas. Values are asked for at any lattice.

    heads: what was drawn; generators: one per patient, for the deformation's random fields
    """

    def __init__(
        self, heads: Sequence[Head], generators: Sequence[np.random.Generator], device: torch.device | str = "cpu"
    ) -> None:
        self.heads = tuple(heads)
        self.lattice = Lattice.centred(WARP_SHAPE, WARP_MM, device)
        bend = [smooth_field(self.lattice, scale, generators, channels=3) for scale in BEND_SCALES_MM]
        spread = per_patient([h.bend_mm for h in heads], bend[0])
        velocity = spread[:, :1] * bend[0] + spread[:, 1:] * bend[1]
        self._displacement = _integrated(velocity, self.lattice)
        self._atlas_mm = self._into_atlas(self.lattice.points())

    def pushed_by(self, mass: Mass) -> Anatomy:
        """The same heads after something has grown in them.

        Tissue is incompressible: what was at distance r₀ of the centre is now at r with r³ = r₀³ + s³, where
        4π s³/3 is the added volume. Within 20 mm of the skull, which does not yield, the shift fades.
        """
        other = object.__new__(Anatomy)
        other.heads, other.lattice, other._displacement = self.heads, self.lattice, self._displacement
        points = self.lattice.points()
        offset = points - mass.centre_mm[:, :, None, None, None]
        radius = offset.norm(dim=1, keepdim=True).clamp(min=1e-3)
        added = (mass.added_ml * 1000 * 3 / (4 * torch.pi))[:, None, None, None, None]
        before = (radius**3 - added).clamp(min=0).pow(1 / 3)
        # in the middle of the new tissue there was nothing: all of it comes from near the centre
        before = torch.maximum(before, 0.3 * radius)
        yields = (self.at(self.lattice, ("depth",))["depth"] / 20).clamp(0, 1)
        other._atlas_mm = self._into_atlas(points + yields * (before / radius - 1) * offset)
        return other

    def atlas_mm(self, lattice: Lattice) -> Float[Tensor, "B 3 X Y Z"]:
        """Where the lattice's points lie in the atlas, in MNI mm."""
        return onto(self._atlas_mm, self.lattice, lattice)

    def at(self, lattice: Lattice, names: Sequence[str] = MAPS) -> dict[str, Float[Tensor, "B 1 X Y Z"]]:
        """The atlas' maps at a lattice's points, averaged over its voxels; see `medmap.phantom.atlas.MAPS`."""
        atlas = load_atlas(lattice.spacing_mm, lattice.start_mm.device)
        places = [MAPS.index(name) for name in names]
        run = slice(min(places), max(places) + 1)
        values = sample(atlas.maps[:, run], atlas.lattice, self.atlas_mm(lattice))
        return dict(zip(MAPS[run], torch.split(values, 1, dim=1), strict=True))

    def tissues(self, maps: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "B 1 X Y Z"]]:
        """Shares of white, cortex, deep and csf from the atlas' maps; they sum to 1."""
        crispness = per_patient([h.crispness for h in self.heads], maps["white"])
        atrophy = per_patient([h.atrophy for h in self.heads], maps["white"])
        solid = {name: maps[name].clamp(min=0) for name in ("white", "cortex", "deep")}
        inner = maps["ventricle"].clamp(0, 1)
        sulcal = (1 - inner - sum(solid.values())).clamp(0, 1).pow(1 / (1 + atrophy))
        sharp = {name: share.pow(crispness) for name, share in solid.items()}
        fluid = inner.pow(crispness) + sulcal.pow(crispness)
        whole = fluid + sum(sharp.values()) + 1e-6
        fibres = per_patient([h.myelin for h in self.heads], maps["white"]) * sharp["cortex"]
        return {
            "white": (sharp["white"] + fibres) / whole,
            "cortex": (sharp["cortex"] - fibres) / whole,
            "deep": sharp["deep"] / whole,
            "csf": fluid / whole,
        }

    def brain(
        self, maps: Mapping[str, Tensor], lattice: Lattice, generators: Sequence[np.random.Generator]
    ) -> Bool[Tensor, "B 1 X Y Z"]:
        """What skull-stripping leaves: some of the brain's surface is lost, or some of what lies round it stays."""
        cut = per_patient([h.strip_mm for h in self.heads], maps["depth"])
        rough = per_patient([h.strip_rough_mm for h in self.heads], maps["depth"])
        return maps["depth"] > (cut + rough * smooth_field(lattice, 12.0, generators)).clamp(min=OUTERMOST_MM)

    def _into_atlas(self, points: Float[Tensor, "B 3 X Y Z"]) -> Float[Tensor, "B 3 X Y Z"]:
        size = per_patient([h.size for h in self.heads], points)
        straight = torch.einsum("bij,bjxyz->bixyz", _rotation([h.turn_rad for h in self.heads], points), points) / size
        centre = torch.tensor(CENTRE_MM, device=points.device)[:, None, None, None]
        bent = straight + sample(self._displacement, self.lattice, straight) + centre
        atlas = load_atlas(2.0, points.device)
        step = per_patient([h.ventricle_mm / WIDENING_STEPS for h in self.heads], points)
        for _ in range(WIDENING_STEPS):  # a flow: in one step, narrow ventricles would fold through their middle
            bent = bent - step * sample(atlas.outward, atlas.lattice, bent)
        return bent


def draw_head(generator: np.random.Generator) -> Head:
    """A random head of an adult."""
    common = generator.normal(0.93, 0.03)
    x, y, z = np.clip(common * generator.normal(1.0, 0.02, 3), 0.84, 1.02).tolist()
    turn = np.clip(generator.normal(0.0, np.deg2rad(2.5), 3), -0.12, 0.12).tolist()
    age = generator.random()
    return Head(
        size=(x, y, z),
        turn_rad=(turn[0], turn[1], turn[2]),
        bend_mm=(float(generator.uniform(1.5, 3.5)), float(generator.uniform(0.5, 1.6))),
        ventricle_mm=float(np.clip(-0.5 + 4.0 * age + generator.normal(0, 1.0), -1.5, 6.0)),
        atrophy=float(np.clip(1.2 * age + generator.normal(0, 0.3), 0.0, 2.0)),
        myelin=float(generator.uniform(0.1, 0.5)),
        crispness=float(generator.uniform(1.0, 2.5)),
        sinus_mm=float(np.clip(generator.normal(0.0, 1.0), -2.5, 1.5)),
        strip_mm=float(generator.uniform(-2.5, 2.5)),
        strip_rough_mm=float(generator.uniform(0.2, 1.5)),
    )


def _integrated(velocity: Float[Tensor, "B 3 X Y Z"], lattice: Lattice, squarings: int = 5) -> Tensor:
    """Displacement after time 1 of a steady flow, by scaling and squaring: smooth and without folds.

    Source: Arsigny et al., A Log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006.
    """
    displacement: Tensor = velocity / 2**squarings
    points = lattice.points()
    for _ in range(squarings):
        displacement = displacement + sample(displacement, lattice, points + displacement)
    return displacement


def _rotation(angles: Sequence[tuple[float, float, float]], like: Tensor) -> Float[Tensor, "B 3 3"]:
    """Rotation about x, then y, then z."""
    turns = []
    for angle in angles:
        matrix = np.eye(3)
        for axis, (cos, sin) in enumerate(zip(np.cos(angle), np.sin(angle), strict=True)):
            turn = np.eye(3)
            i, j = (axis + 1) % 3, (axis + 2) % 3
            turn[i, i] = turn[j, j] = cos
            turn[i, j], turn[j, i] = -sin, sin
            matrix = turn @ matrix
        turns.append(matrix)
    return torch.tensor(np.stack(turns), dtype=like.dtype, device=like.device)
