"""What the shapes of a trunk are filled with: tissues, laid over each other voxel by voxel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medmap.phantom.abdomen import Trunk, Volume
from medmap.phantom.space import Lattice, ramp, smooth_field

MARROW = {"fat": 0.5, "muscle": 0.35, "hepatic_vein": 0.03}
SKIN = {"muscle": 0.6}
LUNG = {"muscle": 0.08, "hepatic_vein": 0.06}
BONE = {"muscle": 0.1}
"""Mixtures; what they lack to 1 gives no signal: air, and bone."""


class Fields:
    """The random fields that several steps share."""

    def __init__(self, lattice: Lattice, generator: np.random.Generator) -> None:
        self.broad = smooth_field(lattice, 22.0, [generator])[0, 0]
        self.loop = smooth_field(lattice, 14.0, [generator])[0, 0]
        self.rough = smooth_field(lattice, 12.0, [generator])[0, 0]
        self.grain, self.twig = smooth_field(lattice, 6.0, [generator], channels=2)[0]


class Paint:
    """Tissues laid over each other voxel by voxel; what is not covered is air."""

    def __init__(self, lattice: Lattice) -> None:
        self.width_mm = max(lattice.spacing_mm, 1.5)
        self.shares: dict[str, Tensor] = {}
        self._empty = torch.zeros(lattice.shape, device=lattice.start_mm.device)

    def ramp(self, depth_mm: Volume, width_mm: float = 0.0) -> Volume:
        """Share of a voxel inside a surface at that depth."""
        return ramp(depth_mm, max(width_mm, self.width_mm))

    def over(self, share: Volume, made_of: Mapping[str, float | Volume]) -> None:
        """Cover a share of each voxel by a mixture; what it lacks to 1 is air."""
        left = 1 - share
        for old in self.shares.values():
            old.mul_(left)
        for name, part in made_of.items():
            added = share * part
            self.shares[name] = self.shares[name].add_(added) if name in self.shares else added

    def inside(self, depth_mm: Volume, made_of: Mapping[str, float | Volume]) -> None:
        """Cover the inside of a surface."""
        self.over(self.ramp(depth_mm), made_of)

    def fractions(self, tissues: Iterable[str]) -> Float[Tensor, "T X Y Z"]:
        """Shares of the tissues, in that order."""
        return torch.stack([self.shares.get(name, self._empty) for name in tissues])


def paint_trunk(paint: Paint, trunk: Trunk, depths: Mapping[str, Volume], fields: Fields) -> None:
    """Skin, fat, muscles, ribs, spine, lungs; and bowel in what fat is left."""
    x, y, z, wall = depths["x"], depths["y"], depths["z"], depths["wall"]
    paint.inside(depths["body"], SKIN)
    paint.inside(depths["body"] - 2.0, {"fat": 1.0})
    streak = paint.ramp(fields.grain - 1.6, 0.6) * 0.5
    paint.inside(wall, {"muscle": 1 - streak, "fat": streak})
    middle = wall - 0.5 * trunk.wall_mm
    along = (z + 0.55 * y + 3.0) % 26.0 - 13.0  # ribs run downwards to the front
    rib = 5.2 - torch.hypot(middle * 1.3, along * 0.8)
    rib = torch.minimum(rib, torch.minimum(62 - y, z + 88 - 0.5 * y.abs()))
    rib = torch.minimum(rib, x.abs() - 40)
    paint.inside(rib, BONE)
    paint.inside(rib - 1.5, MARROW)
    paint.inside(depths["cavity"], {"fat": 0.95, "muscle": 0.05})
    _bowel(paint, trunk, depths, fields)
    chest = torch.minimum(depths["cavity"] - 1, -depths["dome"])
    paint.inside(chest, LUNG)
    branch = paint.ramp(1.6 - torch.hypot(fields.loop, fields.broad) * 14.0) * paint.ramp(chest - 6)
    paint.over(0.7 * branch, {"hepatic_vein": 1.0})
    paint.inside(torch.minimum(depths["cavity"], 1.6 - (depths["dome"] - 0.5).abs()), {"muscle": 1.0})
    paint.inside(depths["heart"], {"fat": 1.0})
    paint.inside(depths["heart"] - 5, {"muscle": 0.9, "artery": 0.1})
    paint.inside(depths["heart"] - 13, {"artery": 0.5, "hepatic_vein": 0.5})
    for depth, made_of in (
        (depths["back"], {"muscle": 0.9, "fat": 0.1}),
        (depths["vertebra"], BONE),
        (depths["vertebra"] - 1.5, MARROW),
        (depths["disc"] - 1.5, {"muscle": 0.8, "fluid": 0.2}),
        (depths["canal"], {"fluid": 1.0}),
        (depths["cord"], {"cord": 1.0}),
    ):
        paint.inside(depth, made_of)


def _bowel(paint: Paint, trunk: Trunk, depths: Mapping[str, Volume], fields: Fields) -> None:
    """Loops in the lower and front part of the belly."""
    room = torch.minimum(depths["belly"] - 4, depths["y"] + 2 - 0.15 * depths["z"].clamp(max=0))
    room = torch.minimum(room, 20 - depths["z"] + 0.4 * (-depths["x"]).clamp(min=0))
    loop = torch.minimum(13 * (fields.loop.abs() - 0.1), 10 * (fields.broad + trunk.loops))
    loop = torch.minimum(loop, room)
    paint.inside(loop, {"wall": 1.0})
    gas = paint.ramp(8 * (fields.broad - 1.4 + 0.012 * depths["y"]), 4.0)
    mixed = 0.35 + 0.3 * fields.rough.clamp(-1, 1)
    paint.inside(loop - 3.0, {"fluid": (1 - gas) * mixed * 0.8, "muscle": (1 - gas) * (1 - mixed)})


def paint_organs(paint: Paint, trunk: Trunk, depths: Mapping[str, Volume], fields: Fields) -> None:
    """Stomach, kidneys, spleen, gallbladder and the great vessels."""
    paint.inside(depths["stomach"], {"wall": 1.0})
    gas = paint.ramp(depths["y"] - 62 + 60 * trunk.gas)
    food = 0.25 * fields.rough.clamp(0, 1)
    paint.inside(depths["stomach"] - 4.5, {"fluid": (1 - gas) * (1 - food), "muscle": (1 - gas) * food})
    paint.inside(depths["kidney"], {"kidney": 1.0})
    pyramid = paint.ramp(torch.minimum(depths["kidney"] - 6.5, 6 * (fields.rough + 0.5)), 3.0)
    paint.over(pyramid, {"medulla": 1.0})
    paint.inside(torch.minimum(depths["sinus"], depths["kidney"]), {"fat": 0.75, "hepatic_vein": 0.15, "fluid": 0.1})
    bands = 0.25 + 0.5 * paint.ramp(7 * fields.twig + 5 * fields.grain, 4.0)
    paint.inside(depths["spleen"], {"spleen": bands, "pulp": 1 - bands})
    paint.inside(depths["gallbladder"], {"wall": 1.0})
    paint.inside(depths["gallbladder"] - 1.5, {"fluid": 1.0})
    paint.inside(depths["cava"], {"hepatic_vein": 1.0})
    paint.inside(depths["aorta"], {"artery": 1.0})
    paint.inside(depths["celiac"], {"artery": 1.0})
