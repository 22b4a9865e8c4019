"""A liver with lesions in an abdomen, taken natively and in three phases after contrast agent, and the truth.

Sources: liver volume 1205 ± 258 ml, 594 to 2250, 369 adults (Feng et al., World J Gastroenterol 2017), and by body
surface 1267 · BSA − 794 ml (Vauthey et al., Liver Transpl 2002). Breath-hold gradient echo with fat
suppression: Rofsky et al., Radiology 1999. Diffusion with nulled fat: Takahara et al., Radiat Med 2004. How lesions
enhance: hypervascular ones in the arterial phase, washed out later, with a capsule (LI-RADS 2018); hypovascular ones by
a rim, dark in the portal phase. Concentrations, sizes and numbers of lesions: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from medmap.core.labels import SCHEMES
from medmap.core.tissues import tissue
from medmap.phantom.abdomen import SLAB_MM, Abdomen, Triple, Trunk, Volume, draw_trunk
from medmap.phantom.filling import Fields, Paint, paint_organs, paint_trunk
from medmap.phantom.organ import Body, Organ, Streams
from medmap.phantom.scan import SEQUENCES, Timing
from medmap.phantom.space import Lattice
from medmap.phantom.vessels import Points, Tubes, branching, tube_share

PHASES = ("arterial", "portal", "late")
"""Some 30 s, 70 s and 4 min after injection."""

PLACING_MM, PLACING_SHAPE = 6.0, (54, 40, 34)
"""Lattice on which lesions and vessels find their places, whatever the images' spacing."""

TWIGS = 70
DIAMETER_MM = (5.0, 60.0)
SHARE_HYPERVASCULAR = 0.45


@dataclass(frozen=True)
class Lesion:
    """A lesion, roughly an ellipsoid.

    diameter_mm: mean diameter; stretch: half axes relative to its half
    place:       0 … 1 where in the liver, as a share of its points
    rough:       standard deviation of its outline, relative to its radius
    dead:        radius of the necrotic centre relative to its own; 0: none
    """

    diameter_mm: float
    stretch: Triple
    place: float
    rough: float
    dead: float


@dataclass(frozen=True)
class LiverBody:
    """A trunk with a diseased liver.

    rim_mm: thickness of the lesions' capsule or rim
    fatty:  share of fat in the liver
    """

    trunk: Trunk
    lesions: tuple[Lesion, ...]
    rim_mm: float
    fatty: float


def draw_liver(streams: Streams, operated: bool = False, grown: bool = True) -> LiverBody:
    """A random trunk with 1 to 8 lesions. streams: trunk, lesions. Surgery is not simulated."""
    generator = streams["lesions"]
    number = int(np.clip(generator.geometric(0.35), 1, 8))
    typical_mm = float(generator.normal(np.log(22.0 if number < 3 else 16.0), 0.3))
    lesions = tuple(_draw_lesion(typical_mm, generator) for _ in range(number))
    fatty = float(generator.uniform(0.02, 0.2)) if generator.random() < 0.3 else 0.0
    return LiverBody(draw_trunk(streams["trunk"]), lesions, float(generator.uniform(1.5, 4.0)), fatty)


def _draw_lesion(typical_mm: float, generator: np.random.Generator) -> Lesion:
    between = generator.uniform
    diameter_mm = float(np.clip(np.exp(generator.normal(typical_mm, 0.45)), *DIAMETER_MM))
    x, y, z = np.exp(generator.normal(0.0, 0.1, 3)).tolist()
    dead = float(between(0.3, 0.75)) if generator.random() < (diameter_mm - 12) / 40 else 0.0
    return Lesion(diameter_mm, (x, y, z), float(generator.random()), float(between(0.03, 0.14)), dead)


def draw_agent(generator: np.random.Generator) -> dict[str, dict[str, float]]:
    """Concentration of an extracellular contrast agent in each tissue and phase, mmol/l: round `UPTAKE`, and in
    lesions round one of two `PATTERNS`, the same for all lesions of a patient."""
    dose = float(np.exp(np.clip(generator.normal(0.0, 0.12), -0.3, 0.3)))
    early = float(generator.uniform(0.6, 1.3))  # how late in the arterial phase: veins and liver are filling
    pattern = "hypervascular" if generator.random() < SHARE_HYPERVASCULAR else "hypovascular"
    amounts: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
    own = 1.0
    for name, uptake in {**UPTAKE, **PATTERNS[pattern]}.items():
        if name != "pulp":  # one organ with the spleen: once it is filled, no bands are left
            own = dose * float(np.exp(np.clip(generator.normal(0.0, 0.15), -0.35, 0.35)))
        for phase, amount in zip(PHASES, uptake, strict=True):
            filling = early if phase == "arterial" and name in ("liver", "portal_vein", "hepatic_vein") else 1.0
            amounts[phase][name] = own * amount * filling
    return amounts


UPTAKE: Mapping[str, Triple] = {
    "artery": (4.0, 1.3, 0.75),
    "portal_vein": (0.7, 1.4, 0.75),
    "hepatic_vein": (0.12, 1.2, 0.72),
    "liver": (0.10, 0.45, 0.30),
    "spleen": (1.9, 0.65, 0.38),
    "pulp": (0.2, 0.60, 0.38),
    "kidney": (1.5, 1.1, 0.7),
    "medulla": (0.25, 0.9, 0.9),
    "muscle": (0.04, 0.10, 0.12),
    "wall": (0.35, 0.40, 0.30),
    "fat": (0.01, 0.02, 0.02),
}
"""{tissue: mmol/l in the arterial, portal and late phase}."""

PATTERNS: Mapping[str, Mapping[str, Triple]] = {
    "hypervascular": {"lesion": (0.80, 0.38, 0.22), "rim": (0.60, 0.50, 0.48), "necrosis": (0.01, 0.02, 0.04)},
    "hypovascular": {"lesion": (0.07, 0.16, 0.20), "rim": (0.38, 0.32, 0.26), "necrosis": (0.01, 0.02, 0.04)},
}
"""How lesions take up agent."""


def _dynamic(phase: str, generator: np.random.Generator) -> Timing:
    """Three-dimensional spoiled gradient echo with fat suppression within a breath-hold."""
    flip = float(np.deg2rad(generator.uniform(10, 14)))
    tr_s, fat_left = generator.uniform(0.004, 0.0055), float(generator.uniform(0.05, 0.25))
    return Timing("spoiled_gradient_echo", tr_s, 0.0018, flip_rad=flip, phase=phase, fat_left=fat_left)


def _native(field_t: float, generator: np.random.Generator) -> Timing:
    return _dynamic("", generator)


def _arterial(field_t: float, generator: np.random.Generator) -> Timing:
    return _dynamic("arterial", generator)


def _portal(field_t: float, generator: np.random.Generator) -> Timing:
    return _dynamic("portal", generator)


def _late(field_t: float, generator: np.random.Generator) -> Timing:
    return _dynamic("late", generator)


def _dwi(field_t: float, generator: np.random.Generator) -> Timing:
    """Diffusion behind an inversion that nulls fat, which hardly diffuses and would outshine everything."""
    plain = SEQUENCES["dwi"](field_t, generator)
    null = float(np.log(2)) * tissue("fat", field_t).t1_s.mean
    te_s, b_s_mm2 = generator.uniform(0.055, 0.075), float(generator.choice((500.0, 600.0, 800.0)))
    return replace(plain, kind="inversion_recovery", te_s=te_s, ti_s=null, b_s_mm2=b_s_mm2)


def build_liver(bodies: Sequence[LiverBody], lattice: Lattice, streams: Sequence[Streams]) -> Body:
    """Tissues and labels on a lattice, patient by patient. streams: anatomy, vessels, places, texture of each.

    Fractions sum to less than 1 where there is air or bone, which give no signal.
    """
    starts = lattice.start_mm.expand(len(bodies), 3)
    each = [
        _build(body, lattice._replace(start_mm=start[None]), own)
        for body, start, own in zip(bodies, starts, streams, strict=True)
    ]
    fractions, labels, masks = (torch.stack(parts) for parts in zip(*each, strict=True))
    return Body(fractions, labels, masks)


def _build(body: LiverBody, lattice: Lattice, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
    abdomen = Abdomen(body.trunk, streams["anatomy"])
    depths = abdomen.at(lattice)
    rooms = _Rooms(abdomen)
    portal, hepatic = rooms.vessels(streams["vessels"])
    centres = rooms.places(body.lesions, streams["places"])
    fields = Fields(lattice, streams["texture"])
    ill = _lesions(body, centres, depths["liver"], lattice, fields)
    mask = (depths["body"] > 0) & _scanned(lattice)
    paint = Paint(lattice)
    paint_trunk(paint, body.trunk, depths, fields)
    paint.inside(depths["liver"], {"liver": 1 - body.fatty, "fat": body.fatty})
    paint_organs(paint, body.trunk, depths, fields)
    paint.over(tube_share(hepatic, lattice), {"hepatic_vein": 1.0})
    paint.over(tube_share(portal, lattice), {"portal_vein": 1.0})
    _disease(paint, body, ill)
    return paint.fractions(LIVER.tissues) * mask, _labels(depths["liver"], ill["lesion"], mask), mask


def _scanned(lattice: Lattice) -> Tensor:
    """The box that every body is cut to."""
    x, y, z = (line[0].abs() < half for line, half in zip(lattice.lines(), (159.0, 119.0, SLAB_MM), strict=True))
    return x[:, None, None] & y[:, None] & z


def _labels(liver: Volume, lesion: Volume, mask: Tensor) -> UInt8[Tensor, "X Y Z"]:
    codes = LIVER.scheme.codes
    labels = torch.zeros_like(mask, dtype=torch.uint8)
    labels[mask & (liver > 0)] = codes["liver"]
    labels[mask & (liver > 0) & (lesion > 0)] = codes["lesion"]
    return labels


class _Rooms:
    """Where in a patient lesions and vessels can be; on the CPU, so that rounding on a GPU moves none of them."""

    def __init__(self, abdomen: Abdomen) -> None:
        lattice = Lattice.centred(PLACING_SHAPE, PLACING_MM)
        depths = abdomen.at(lattice)
        self.points = lattice.points()[0].flatten(1).T.numpy()
        self.depth = depths["liver"].flatten().numpy()
        self._average = torch.stack([depths[axis] for axis in "xyz"]).flatten(1).T.numpy()

    def places(self, lesions: Sequence[Lesion], generator: np.random.Generator) -> Points:
        """Centres, Float[n 3]: the middle of a lesion is inside the liver, and it keeps off those before it."""
        centres: list[Points] = []
        for lesion in lesions:
            radius = lesion.diameter_mm / 2
            free = self.depth > min(0.6 * radius, 0.8 * self.depth.max())
            for other, centre in zip(lesions, centres, strict=False):
                apart = radius + other.diameter_mm / 2 + 5.0
                clear = free & (np.linalg.norm(self.points - centre, axis=1) > apart)
                free = clear if clear.any() else free
            room = self.points[free]
            moved = generator.uniform(-0.5, 0.5, 3) * PLACING_MM
            centres.append(room[int(lesion.place * len(room))] + moved)
        return np.stack(centres)

    def vessels(self, generator: np.random.Generator) -> tuple[Tubes, Tubes]:
        """Portal vein, with the veins that form it; hepatic veins, down to the vena cava."""
        roots = self.points[self.depth > 7]
        chosen = generator.choice(len(roots), (2, TWIGS))
        ends = roots[chosen] + generator.uniform(-0.5, 0.5, (2, TWIGS, 3)) * PLACING_MM
        trunk = self._real(((-6, 0, -95), (-4, 4, -60), (2, 8, -40), (14, 6, -20), (24, 4, -8)))
        portal = branching(trunk, ends[0], 1.6, 7.0, generator)
        splenic = self._real(((-78, -30, 8), (-56, -28, 0), (-34, -16, -10), (-14, 0, -24), (2, 8, -40)))
        with_splenic = Tubes(*(np.concatenate(both) for both in zip(portal, _tube(splenic, 4.0), strict=True)))
        confluence = self._real(((19, -10, 48), (21, -6, 44)))
        return with_splenic, branching(confluence, ends[1], 1.5, 6.5, generator)

    def _real(self, average: Sequence[Triple]) -> Points:
        """The patient's points that lie nearest to points of the average trunk."""
        nearest = [np.linalg.norm(self._average - point, axis=1).argmin() for point in average]
        rest = np.asarray(average) - self._average[nearest]
        return self.points[nearest] + 0.93 * rest


def _tube(points: Points, radius_mm: float) -> Tubes:
    return Tubes(points[:-1], points[1:], np.full(len(points) - 1, radius_mm))


def _lesions(
    body: LiverBody, centres: Points, liver: Volume, lattice: Lattice, fields: Fields
) -> dict[str, Float[Tensor, "X Y Z"]]:
    """Depths of the lesions and their necrotic centres."""
    points = lattice.points()[0]
    lesion, dead = torch.full_like(liver, -50.0), torch.full_like(liver, -50.0)
    bumps = 0.85 * fields.rough + 0.5 * fields.grain
    for one, centre in zip(body.lesions, centres, strict=True):
        radius = one.diameter_mm / 2
        offset = [(p - float(c)) / s for p, c, s in zip(points, centre, one.stretch, strict=True)]
        away = (offset[0].square() + offset[1].square() + offset[2].square()).sqrt()
        lesion = torch.maximum(lesion, radius * (1 + one.rough * bumps) - away)
        if one.dead:
            dead = torch.maximum(dead, radius * (one.dead + 0.15 * fields.rough) - away)
    lesion = torch.minimum(lesion, liver)
    return {"lesion": lesion, "necrosis": torch.minimum(dead, lesion - 2.0)}


def _disease(paint: Paint, body: LiverBody, ill: Mapping[str, Volume]) -> None:
    paint.inside(ill["lesion"], {"rim": 1.0})
    paint.inside(ill["lesion"] - body.rim_mm, {"lesion": 1.0})
    paint.inside(ill["necrosis"], {"necrosis": 1.0})


LIVER = Organ(
    tissues={
        "liver": "liver",
        "lesion": "liver_lesion",
        "rim": "liver_lesion",  # a capsule, or where a lesion grows
        "necrosis": "necrosis",
        "artery": "blood",
        "portal_vein": "blood",
        "hepatic_vein": "blood",  # and all other veins
        "spleen": "spleen",
        "pulp": "spleen",  # bands that fill later
        "kidney": "kidney",
        "medulla": "kidney",
        "muscle": "muscle",
        "wall": "muscle",  # of stomach and bowel
        "fat": "fat",
        "fluid": "csf",
        "cord": "white",
    },
    sick=("lesion", "rim", "necrosis"),
    reference=("liver", "spleen"),
    scheme=SCHEMES["liver"],
    sequences={
        "t1n": _native,
        "arterial": _arterial,
        "portal": _portal,
        "late": _late,
        "t2w": SEQUENCES["t2w"],
        "dwi": _dwi,
        "adc": SEQUENCES["adc"],
    },
    usual=PHASES,
    extent_mm=(320.0, 240.0, 200.0),
    drawn=("trunk", "lesions"),
    draw=draw_liver,
    agent=draw_agent,
    built=("anatomy", "vessels", "places", "texture"),
    build=build_liver,
)
"""A liver with lesions."""
