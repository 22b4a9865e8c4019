"""The trunk at the height of the liver, as depths below smooth surfaces. No template: everything is a formula.

Shapes live in the coordinates of an average trunk (mm: x to the right, y forwards, z upwards, the middle of the slab is
the origin); a patient's space is bent and scaled into them. A depth is positive inside a shape, in mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medmap.phantom.space import Lattice, onto, smooth_field

Volume = Float[Tensor, "X Y Z"]
Triple = tuple[float, float, float]

SLAB_MM = 98.0
"""Half the height of what is scanned."""

WALL_MM = (132.0, 100.0)
"""Half axes of the trunk without its fat, to the side and to the front."""

SPINE_Y_MM = -42.0
BEND_MM = 8.0
BEND_SHAPE = (42, 32, 28)
"""Lattice on which a trunk's deformation is kept."""


@dataclass(frozen=True)
class Trunk:
    """What differs between two healthy trunks.

    size:       scale along x, y, z relative to the average trunk
    bend_mm:    standard deviation of the deformation
    fat_mm:     fat under the skin, at the sides
    wall_mm:    muscles and ribs of the wall
    dome_mm:    height of the diaphragm's right dome
    hilum_mm:   how much lower (> 0) or higher the liver's under surface lies: what sets its volume
    left_mm:    how far the left lobe reaches beyond the average
    spleen:     scale of the spleen
    kidney_mm:  height of the right kidney's middle
    gas:        share of the stomach that is gas
    loops:      how much of the belly's room is bowel, as a normal score
    """

    size: Triple
    bend_mm: float
    fat_mm: float
    wall_mm: float
    dome_mm: float
    hilum_mm: float
    left_mm: float
    spleen: float
    kidney_mm: float
    gas: float
    loops: float


def draw_trunk(generator: np.random.Generator) -> Trunk:
    """A random trunk of an adult."""
    between = generator.uniform
    common = generator.normal(0.93, 0.025)
    x, y, z = np.clip(common * generator.normal(1.0, 0.02, 3), 0.86, 1.0).tolist()
    return Trunk(
        size=(x, y, z),
        bend_mm=float(between(2.0, 5.0)),
        fat_mm=float(np.clip(np.exp(generator.normal(np.log(11.0), 0.4)), 5.0, 20.0)),
        wall_mm=float(between(9.0, 13.0)),
        dome_mm=float(between(68.0, 82.0)),
        hilum_mm=float(np.clip(generator.normal(0.0, 6.0), -10.0, 12.0)),
        left_mm=float(np.clip(generator.normal(0.0, 10.0), -20.0, 20.0)),
        spleen=float(np.exp(np.clip(generator.normal(0.0, 0.12), -0.25, 0.3))),
        kidney_mm=float(between(-70.0, -50.0)),
        gas=float(between(0.0, 0.6)),
        loops=float(between(0.6, 1.6)),
    )


class Abdomen:
    """The trunk of one patient; values are asked for at any lattice, on any device.

    generator: draws the random fields of its deformation
    """

    def __init__(self, trunk: Trunk, generator: np.random.Generator) -> None:
        self.trunk = trunk
        self.lattice = Lattice.centred(BEND_SHAPE, BEND_MM)
        slow = smooth_field(self.lattice, 48.0, [generator], channels=3)
        fast = smooth_field(self.lattice, 22.0, [generator], channels=3)
        self._bend = trunk.bend_mm * (0.9 * slow + 0.35 * fast)

    def points(self, lattice: Lattice) -> tuple[Volume, Volume, Volume]:
        """Where a lattice's points lie in the average trunk."""
        device = lattice.start_mm.device
        kept = self.lattice._replace(start_mm=self.lattice.start_mm.to(device))
        bent = lattice.points()[0] + onto(self._bend.to(device), kept, lattice)[0]
        x, y, z = (line / scale for line, scale in zip(bent, self.trunk.size, strict=True))
        return x, y, z

    def at(self, lattice: Lattice) -> dict[str, Volume]:
        """Depths below the surfaces of the trunk and its organs; ``x``, ``y``, ``z``: the points in the average trunk.

        body: skin; wall: muscles; cavity: inner surface of chest and belly; belly: below the diaphragm; the rest are
        organs, which do not overlap but for what a word says: kidneys with cortex and medulla, stomach with content.
        """
        x, y, z = self.points(lattice)
        t = self.trunk
        outline = _superellipse(x, y, *WALL_MM)
        # less fat in front and behind; the wall's outline is round, so that its depth goes on outwards
        depths = {"x": x, "y": y, "z": z, "wall": outline, "body": outline + t.fat_mm * (1 - 0.25 * (y / 115).square())}
        depths |= self._spine(x, y, z)
        back = smax(ellipsoid(x.abs() - 33, y + 88, None, (31.0, 22.0, 1.0)), depths["vertebra"] + 3, 6.0)
        back = torch.minimum(back, outline + 2)
        depths["back"] = torch.maximum(back, ellipsoid(x.abs() - 38, y + 45, None, (15.0, 17.0, 1.0)) - (z + 45) / 5)
        depths["cavity"] = smin(outline - t.wall_mm, -depths["back"], 10.0)
        depths["dome"] = self._diaphragm(x, y, z)
        depths["belly"] = smin(depths["cavity"], depths["dome"], 8.0)
        depths |= self._great_vessels(x, y, z)
        depths |= self._kidneys(x, y, z, depths["belly"])
        depths["gallbladder"] = ellipsoid(x - 42, y - 42, z + 32 + 0.5 * (y - 42), (12.0, 13.0, 26.0))
        depths["liver"] = self._liver(x, y, z, depths)
        depths["gallbladder"] = torch.minimum(depths["gallbladder"], depths["belly"] - 4)
        depths["spleen"] = self._spleen(x, y, z, depths)
        apart = torch.stack([depths["liver"], depths["spleen"], depths["kidney"], depths["celiac"]]).amax(dim=0)
        stomach = ellipsoid(x + 54 + 0.3 * (z - 12), y - 20 + 0.3 * (x + 54), z - 12, (36.0, 38.0, 54.0))
        depths["stomach"] = smin(smin(stomach, -apart - 3, 6.0), depths["belly"] - 3, 6.0)
        heart = ellipsoid(x + 18, y - 38, z - 98 - 0.15 * (x + 18), (60.0, 44.0, 46.0))
        depths["heart"] = torch.minimum(torch.minimum(heart, depths["cavity"] - 3), -depths["dome"] - 2)
        return depths

    def _spine(self, x: Volume, y: Volume, z: Volume) -> dict[str, Volume]:
        body = ellipsoid(x, y - SPINE_Y_MM, None, (22.0, 17.0, 1.0))
        canal = ellipsoid(x, y - SPINE_Y_MM + 25, None, (10.5, 8.0, 1.0))
        arch = smin(canal + 6, 40 - (y - SPINE_Y_MM + 25).abs(), 3.0)
        process = smin(4.5 - x.abs(), smin(y - SPINE_Y_MM + 52, -(y - SPINE_Y_MM) - 28, 3.0), 3.0)
        level = (z + 14) % 34 - 17  # a disc every 34 mm
        bone = smax(smax(body, arch, 4.0), process, 3.0)
        return {
            "vertebra": torch.maximum(bone, canal),
            "canal": canal,
            "cord": 4.5 - torch.hypot(x, y - SPINE_Y_MM + 25),
            "disc": torch.minimum(body, level.abs() - 12.5),
        }

    def _diaphragm(self, x: Volume, y: Volume, z: Volume) -> Volume:
        """Two domes on vertical walls; behind, the lungs reach lower."""
        base = -12.0
        up = (z - 0.22 * y - base).clamp(min=0)
        right = ellipsoid(x - 57, y - 5, up, (84.0, 100.0, self.trunk.dome_mm - base))
        left = ellipsoid(x + 57, y - 5, up, (84.0, 100.0, self.trunk.dome_mm - 16 - base))
        return smax(right, left, 24.0)

    def _great_vessels(self, x: Volume, y: Volume, z: Volume) -> dict[str, Volume]:
        front = SPINE_Y_MM + 17
        aorta = 10.5 - torch.hypot(x + 12, y - front - 9 + 0.06 * z)
        cava_y = front + 10 + 0.12 * (z - 10).clamp(min=0)
        cava = 11.0 - torch.hypot(x - 21 + 0.05 * z, (y - cava_y) * 1.25)
        return {"aorta": aorta, "cava": cava, "celiac": _celiac(x, y, z, front + 18)}

    def _kidneys(self, x: Volume, y: Volume, z: Volume, belly: Volume) -> dict[str, Volume]:
        kidney, pelvis = [], []
        for side, height in ((1.0, self.trunk.kidney_mm), (-1.0, self.trunk.kidney_mm + 18)):
            across, along = side * x - 62 - 0.18 * (height - z), z - height
            depth = y + 42 - 0.12 * along
            kidney.append(ellipsoid(across, depth, along, (30.0, 28.0, 57.0)))
            pelvis.append(ellipsoid(across + 17, depth - 3, along, (19.0, 9.0, 28.0)))
        both = smin(torch.maximum(*kidney), belly - 2, 5.0)
        return {"kidney": both, "sinus": torch.maximum(*pelvis)}

    def _liver(self, x: Volume, y: Volume, z: Volume, depths: dict[str, Volume]) -> Volume:
        """Below the diaphragm, above an under surface that rises to the left: a right lobe, and a wedge across."""
        t = self.trunk
        right = _half_space(x - 28, y + 5, z + 26 + t.hilum_mm, (0.62, 0.16, 0.77))
        left = _half_space(x + t.left_mm, y - 30, z - 2 + t.hilum_mm, (0.72, 0.5, 0.45))
        under = smax(smin(right, x + 14, 10.0), left, 10.0)
        under = smin(under, z + 86, 25.0)
        fissure = 3.0 - torch.hypot((x - 4 + 0.15 * (y - 60)) * 1.1, (z + 25 + t.hilum_mm).clamp(min=0) * 0.3)
        around = torch.maximum(depths["kidney"] + 3, depths["gallbladder"] + 1)
        around = torch.maximum(around, torch.maximum(depths["cava"], depths["aorta"] + 5))
        around = torch.maximum(around, torch.minimum(fissure, y - 35))
        return smin(smin(under, depths["belly"] - 1.0, 8.0), -around, 5.0)

    def _spleen(self, x: Volume, y: Volume, z: Volume, depths: dict[str, Volume]) -> Volume:
        s = self.trunk.spleen
        whole = ellipsoid(x + 92, y + 30 + 0.35 * (z - 22), z - 22, (38.0 * s, 48.0 * s, 52.0 * s))
        hollow = ellipsoid(x + 44, y + 2, z - 5, (36.0, 42.0, 60.0))
        around = torch.maximum(hollow, depths["kidney"] + 2)
        return smin(smin(whole, -around, 6.0), depths["belly"] - 3, 5.0)


def smin(a: Volume, b: Volume, width: float) -> Volume:
    """The smaller of two depths, with edges rounded over ``width``: what both shapes have in common."""
    h = (0.5 + 0.5 * (b - a) / width).clamp(0, 1)
    return b + (a - b) * h - width * h * (1 - h)


def smax(a: Volume, b: Volume, width: float) -> Volume:
    """The larger of two depths, rounded: both shapes together."""
    return -smin(-a, -b, width)


def ellipsoid(x: Volume, y: Volume, z: Volume | None, half_mm: Triple) -> Volume:
    """Depth in an ellipsoid round the origin, exact at its surface; without z an elliptic cylinder."""
    axes = [(x, half_mm[0]), (y, half_mm[1])] + ([] if z is None else [(z, half_mm[2])])
    first = sum((line / half).square() for line, half in axes)
    second = sum((line / half**2).square() for line, half in axes)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    inside = first.sqrt()
    tiny = 1e-3
    return (1 - inside) * (inside + tiny) / (second.sqrt() + tiny / min(half for _, half in axes))


def _superellipse(x: Volume, y: Volume, a: float, b: float, power: float = 2.2) -> Volume:
    """Depth in an ellipse whose corners are fuller, along rays from its middle."""
    inside = ((x / a).abs() ** power + (y / b).abs() ** power) ** (1 / power)
    return (1 - inside) / inside.clamp(min=0.2) * torch.hypot(x, y)


def _half_space(x: Volume, y: Volume, z: Volume, normal: Triple) -> Volume:
    length = float(np.linalg.norm(normal))
    return (normal[0] * x + normal[1] * y + normal[2] * z) / length


def _celiac(x: Volume, y: Volume, z: Volume, y_mm: float) -> Volume:
    """A trunk from the aorta that divides into a branch to the liver and one to the spleen."""
    stem = torch.minimum(4.0 - torch.hypot(x + 11, z - 2), 12 - (y - y_mm).abs())
    branch_y = y_mm + 8 + 0.25 * (x + 11) - 0.004 * (x + 11).square()
    branch_z = 2 + 4 * torch.sin((x + 11) / 11)
    branch = torch.minimum(2.8 - torch.hypot(y - branch_y, z - branch_z), 60 - (x + 11).abs())
    return torch.maximum(stem, branch)
