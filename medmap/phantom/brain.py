"""The tissues of a head with a glioma, mixed voxel by voxel, and the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI
from medmap.phantom.anatomy import Anatomy, Head, draw_head
from medmap.phantom.organ import Body, Organ, Streams
from medmap.phantom.scan import SEQUENCES
from medmap.phantom.space import Lattice, per_patient, ramp, smooth_field
from medmap.phantom.tumour import Tumour, draw_tumour, grow, mass_of, outline, place


@dataclass(frozen=True)
class Pathology:
    """What the tumour is made of.

    oedema:      share of oedema in a voxel labelled so, deep inside; it thins out outwards
    edge_mm:     width over which oedema ends
    solid:       share of solid tumour, not fluid, in the voxels labelled necrotic or non-enhancing
    uptake:      share of the labelled rim that takes up agent
    bleeding:    share of the core's non-enhancing part that is blood of some days ago
    halo_mm:     width of the unlabelled bright rim round the ventricles of older patients
    spots:       amount of small bright lesions elsewhere in white matter
    """

    oedema: float
    edge_mm: float
    solid: float
    uptake: float
    bleeding: float
    halo_mm: float
    spots: float


@dataclass(frozen=True)
class Brain:
    """A head with a glioma."""

    head: Head
    tumour: Tumour
    pathology: Pathology


def draw_brain(streams: Streams, operated: bool = False, grown: bool = True) -> Brain:
    """A random head with a random tumour. streams: head, tumour, pathology."""
    return Brain(
        draw_head(streams["head"]),
        draw_tumour(streams["tumour"], operated=operated, grown=grown),
        _draw_pathology(streams["pathology"]),
    )


def draw_agent(generator: np.random.Generator) -> dict[str, dict[str, float]]:
    """Concentration of contrast agent in each tissue some minutes after injection, mmol/l."""
    between = generator.uniform
    late = {
        "enhancing": float(np.exp(np.clip(generator.normal(np.log(0.18), 0.45), np.log(0.12), np.log(0.6)))),
        "blood": float(between(0.2, 0.8)),
        "oedema": float(between(0.0, 0.02)),
        "solid": float(between(0.0, 0.025)),
        "necrosis": float(between(0.0, 0.01)),
    }
    return {"late": late}


def build_brain(brains: Sequence[Brain], lattice: Lattice, streams: Sequence[Streams]) -> Body:
    """Tissues and labels on a lattice. streams: anatomy, growth, texture of each patient."""

    def of(part: str) -> list[np.random.Generator]:
        return [patient[part] for patient in streams]

    tumours = [b.tumour for b in brains]
    anatomy = Anatomy([b.head for b in brains], of("anatomy"), lattice.start_mm.device)
    foci = place(tumours, anatomy, of("growth"))
    anatomy = anatomy.pushed_by(mass_of(tumours, foci))
    outlines = outline(tumours, anatomy, grow(tumours, anatomy, foci, of("growth")), of("growth"))
    maps = anatomy.at(lattice)
    mask = anatomy.brain(maps, lattice, of("anatomy"))
    depth = outlines.at(lattice)
    healthy = anatomy.tissues(maps)
    fields = _Fields(lattice, of("texture"))
    healthy = _with_vessels(brains, healthy, maps, fields, lattice)
    mixed = _with_tumour([b.pathology for b in brains], healthy, maps, depth, fields, lattice)
    fractions = torch.cat([mixed[name] for name in BRAIN.tissues], dim=1) * mask
    return Body(fractions, _labels(depth, mask), mask[:, 0])


class _Fields:
    """The random fields that several steps share."""

    def __init__(self, lattice: Lattice, generators: Sequence[np.random.Generator]) -> None:
        self.rough = smooth_field(lattice, 9.0, generators)
        self.grain = smooth_field(lattice, 4.5, generators)
        self.fold, self.branch = torch.split(smooth_field(lattice, 7.0, generators, channels=2), 1, dim=1)


def _labels(depth: Mapping[str, Tensor], mask: Bool[Tensor, "B 1 X Y Z"]) -> UInt8[Tensor, "B X Y Z"]:
    codes = BRAIN.scheme.codes
    whole = (depth["wt"] > 0) & mask
    core = whole & (depth["tc"] > 0)
    labels = torch.zeros_like(mask, dtype=torch.uint8)
    labels[whole] = codes["ed"]
    labels[core] = codes["ncr"]
    labels[core & (depth["et"] > 0)] = codes["et"]
    labels[core & (depth["rc"] > 0)] = codes["rc"]
    return labels[:, 0]


def _with_vessels(
    brains: Sequence[Brain],
    healthy: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    fields: _Fields,
    lattice: Lattice,
) -> dict[str, Tensor]:
    """Cortical veins, curves that wind through the sulci; the great veins; plexus in the ventricles; and, where
    skull-stripping left some of it, what lies round the brain: patches of dura among bone and air."""
    width = max(1.0, lattice.spacing_mm)
    vein = ramp(1.1 - torch.hypot(fields.fold, fields.branch) * 7.0, width) * ramp(healthy["csf"] - 0.25, 0.3)
    vein = vein * ramp(maps["wall"] - 3, 2.0) * ramp(10 - maps["depth"], 4.0)
    wider = per_patient([b.head.sinus_mm for b in brains], vein)
    great = ramp(maps["sinus"] + wider + 0.7 * fields.rough, width)
    plexus = 0.6 * ramp(-maps["wall"] - 0.5, 1.5) * (1 + 0.4 * fields.grain).clamp(0, 1.3)
    great = great * torch.where(maps["wall"] < 1, plexus, 0.85)
    round_about = ramp(-maps["depth"] - 0.5, width) * (1 - great)
    dura = round_about * (0.4 + 0.4 * fields.rough + 0.3 * fields.grain).clamp(0, 0.8)
    bone = round_about * (0.3 - 0.4 * fields.rough + 0.3 * fields.branch).clamp(0, 1) * (1 - dura)
    blood = torch.stack([vein, great, dura]).amax(dim=0)
    left = 1 - blood - bone * (1 - blood)
    return {
        "white": healthy["white"] * left,
        "grey": healthy["cortex"] * left,
        "deep_grey": healthy["deep"] * left,
        "csf": healthy["csf"] * left,
        "blood": blood,
    }


def _with_tumour(
    pathologies: Sequence[Pathology],
    healthy: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    depth: Mapping[str, Float[Tensor, "B 1 X Y Z"]],
    fields: _Fields,
    lattice: Lattice,
) -> dict[str, Tensor]:
    def column(name: str) -> Tensor:
        return per_patient([getattr(p, name) for p in pathologies], depth["wt"])

    soft = max(2.5, lattice.spacing_mm)
    whole = ramp(depth["wt"], column("edge_mm") + lattice.spacing_mm)
    core = torch.minimum(ramp(depth["tc"], soft), ramp(depth["wt"], soft))
    hollow = ramp(depth["rc"], soft)
    rim = core * (1 - hollow) * ramp(depth["et"], soft)
    cavity = core * hollow
    dead = (core - rim - cavity).clamp(min=0)
    # wettest deep inside; what there is between voxels of oedema is the healthy tissue
    wet = column("oedema") * (0.75 + 0.25 * (depth["wt"] / 10).clamp(0, 1)) + 0.2 * fields.rough + 0.08 * fields.grain
    swollen = (whole - core).clamp(min=0) * wet.clamp(0.1, 1.0)
    halo = ramp(column("halo_mm") * (1 + 0.5 * fields.rough) - maps["wall"], 2.0).clamp(max=0.45)
    spots = 0.8 * ramp(fields.grain + 0.5 * fields.rough - 4.0 + column("spots"), 0.8) * ramp(maps["depth"] - 12, 4.0)
    leaky = torch.maximum(halo, spots) * healthy["white"] * (1 - torch.maximum(whole, core))
    solid = (column("solid") + 0.35 * fields.rough - 0.3 * (depth["tc"] / 15).clamp(0, 1)).clamp(0, 1)
    bled = ramp(fields.rough - 2.0 + 3.0 * column("bleeding"), 0.5) * (column("bleeding") > 0)
    taken_up = (column("uptake") + 0.25 * fields.grain).clamp(0.4, 1.0)
    oedema = swollen + leaky
    left = (1 - core - oedema).clamp(min=0)
    return {name: share * left for name, share in healthy.items()} | {
        "oedema": oedema,
        "solid": dead * solid * (1 - bled) + rim * (1 - taken_up),
        "enhancing": rim * taken_up,
        "necrosis": dead * (1 - solid) * (1 - bled),
        "haemorrhage": dead * bled,
        "cavity": cavity,
    }


def _draw_pathology(generator: np.random.Generator) -> Pathology:
    between, chance = generator.uniform, generator.random
    return Pathology(
        oedema=float(between(0.65, 1.0)),
        edge_mm=float(between(2.0, 8.0)),
        solid=float(between(0.1, 1.0)),
        uptake=float(between(0.7, 1.0)),
        bleeding=float(between(0.1, 0.5)) if chance() < 0.06 else 0.0,
        halo_mm=float(np.clip(generator.normal(0.3, 1.5), -2.0, 4.0)),
        spots=float(between(0.0, 1.5)) if chance() < 0.4 else 0.0,
    )


BRAIN = Organ(
    tissues={
        "white": "white",
        "grey": "grey",
        "deep_grey": "deep_grey",
        "csf": "csf",
        "blood": "blood",
        "oedema": "oedema",
        "solid": "solid",
        "enhancing": "solid",  # solid tumour that takes up contrast agent
        "necrosis": "necrosis",
        "haemorrhage": "haemorrhage",
        "cavity": "cavity",
    },
    sick=("oedema", "solid", "enhancing", "necrosis"),
    reference=("white", "grey"),
    scheme=SCHEMES["brats2024"],  # the codes of 2023, and 4 for a resection cavity
    sequences=SEQUENCES,
    usual=GLIOMA_MRI.names,
    extent_mm=(160.0, 192.0, 155.0),  # of BraTS: 155 slices
    drawn=("head", "tumour", "pathology"),
    draw=draw_brain,
    agent=draw_agent,
    built=("anatomy", "growth", "texture"),
    build=build_brain,
)
"""A head with a glioma."""
