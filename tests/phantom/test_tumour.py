"""Tumours: drawn like those of the reference, grown where cells can be, outlined with the volumes that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from medmap.phantom.anatomy import Anatomy, draw_head
from medmap.phantom.patient import stream
from medmap.phantom.space import Lattice
from medmap.phantom.tumour import (
    COPULA,
    EDGE_DENSITY,
    GROWTH_MM,
    OUTLINE_MM,
    SHARE_WITHOUT_ET,
    Outlines,
    Tumour,
    draw_tumour,
    grow,
    mass_of,
    outline,
    place,
)

REFERENCE_ML = {
    "WT": (20.78, 50.15, 89.74, 144.37, 200.4),
    "TC": (3.35, 13.72, 33.41, 59.6, 111.01),
    "ET": (0.0, 4.48, 14.76, 29.73, 58.21),
    "NCR": (0.32, 3.64, 10.54, 25.17, 90.41),
    "ED": (9.42, 24.86, 49.57, 79.5, 133.5),
}
"""Percentiles 5, 25, 50, 75, 95 of 368 reference segmentations of BraTS 2020."""

PLAIN = replace(
    draw_tumour(np.random.default_rng(0)),
    wt_ml=60.0,
    tc_ml=30.0,
    et_ml=12.0,
    cavity_ml=0.0,
    foci=1,
    patchy=0.0,
    rim_rough=0.05,
    infiltration_mm=4.0,
    grey_ratio=8.0,
)
VOXEL_ML = OUTLINE_MM**3 / 1000


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _anatomy(*seeds: int) -> Anatomy:
    return Anatomy([draw_head(stream(s, "head")) for s in seeds], [stream(s, "anatomy") for s in seeds])


class Made:
    """A head of simple shape, at the origin; ``tissue`` tells the shares at given points."""

    def __init__(self, tissue: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
        self.tissue = tissue

    def at(self, lattice: Lattice, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        points = lattice.points()
        return {"points": points, "depth": 60 - points.norm(dim=1, keepdim=True)}

    def tissues(self, maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        none = torch.zeros_like(maps["depth"])
        return dict.fromkeys(("white", "cortex", "deep", "csf"), none) | self.tissue(maps["points"])

    def atlas_mm(self, lattice: Lattice) -> torch.Tensor:
        return lattice.points()


def _grown(tissue: Callable[[torch.Tensor], dict[str, torch.Tensor]], *tumours: Tumour) -> tuple[torch.Tensor, Any]:
    head: Any = Made(tissue)
    grown = grow(tumours, head, torch.zeros(len(tumours), 3, 3), [_rng(5) for _ in tumours])
    return grown.density, grown.lattice.points()


def _all_white(points: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"white": torch.ones_like(points[:, :1])}


# ---- what is drawn -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> list[Tumour]:
    return [draw_tumour(_rng(seed)) for seed in range(2000)]


def _volumes(tumours: Sequence[Tumour]) -> dict[str, np.ndarray]:
    whole, core, rim = (np.array([getattr(t, name) for t in tumours]) for name in ("wt_ml", "tc_ml", "et_ml"))
    return {"WT": whole, "TC": core, "ET": rim, "NCR": core - rim, "ED": whole - core}


@pytest.mark.parametrize("region", REFERENCE_ML)
def test_volumes_are_those_of_the_reference(drawn: list[Tumour], region: str) -> None:
    found = np.percentile(_volumes(drawn)[region], (5, 25, 50, 75, 95))
    np.testing.assert_allclose(found, REFERENCE_ML[region], rtol=0.25, atol=0.15)


def test_as_many_as_in_the_reference_do_not_enhance(drawn: list[Tumour]) -> None:
    assert 0.04 < np.mean(_volumes(drawn)["ET"] == 0) < 0.11


def test_drawn_volumes_nest(drawn: list[Tumour]) -> None:
    operated = [draw_tumour(_rng(seed), operated=True) for seed in range(300)]
    for tumour in drawn + operated:
        assert 0 <= tumour.et_ml + tumour.cavity_ml <= tumour.tc_ml + 1e-9
        assert 0 < tumour.tc_ml < tumour.wt_ml
    assert all(t.cavity_ml == 0 for t in drawn)
    assert all(0.3 <= t.cavity_ml / t.tc_ml <= 0.8 for t in operated)


def test_growth_has_the_numbers_of_the_literature(drawn: list[Tumour]) -> None:
    for tumour in drawn:
        assert 0.0012 <= tumour.rho_per_day <= 0.024
        assert 2.5 <= tumour.infiltration_mm <= 9.0
        assert 4 <= tumour.grey_ratio <= 12
        assert tumour.diffusivity_mm2_day == pytest.approx(tumour.rho_per_day * tumour.infiltration_mm**2)
    assert 0.006 < np.median([t.diffusivity_mm2_day for t in drawn]) < 0.65
    assert 0.06 < np.mean([t.foci > 1 for t in drawn]) < 0.2
    assert {t.foci for t in drawn} == {1, 2, 3}


def test_the_same_stream_draws_the_same_tumour() -> None:
    assert draw_tumour(_rng(3)) == draw_tumour(_rng(3)) != draw_tumour(_rng(4))
    assert np.linalg.eigvalsh(COPULA).min() > 0
    assert 0 < SHARE_WITHOUT_ET < 1


def test_the_mass_is_a_share_of_what_was_drawn() -> None:
    mass = mass_of([replace(PLAIN, displaced=0.5)], torch.ones(1, 3, 3))
    assert mass.added_ml.item() == pytest.approx(0.5 * (30 + 0.3 * 30))
    assert mass.centre_mm.tolist() == [[1.0, 1.0, 1.0]]


# ---- where it grows ----------------------------------------------------------------------------------------------


def test_tumours_start_in_deep_white_matter_of_the_cerebrum() -> None:
    seeds = (0, 1, 2, 3)
    anatomy = _anatomy(*seeds)
    tumours = [replace(PLAIN, foci=number) for number in (1, 2, 3, 3)]
    foci = place(tumours, anatomy, [_rng(seed) for seed in seeds])
    for row, tumour in enumerate(tumours):
        away = (foci[row] - foci[row, 0]).norm(dim=1)
        assert (away[: tumour.foci] > 22).sum() == tumour.foci - 1
        assert away[: tumour.foci].max() < 50
        assert away[tumour.foci :].sum() == 0
    for number in range(3):
        maps = anatomy.at(Lattice(foci[:, number], 4.0, (1, 1, 1)))
        assert maps["white"].min() > 0.59
        assert maps["depth"].min() > 8.9
        assert maps["wall"].min() > 3.9


def test_density_is_a_share_and_there_is_none_in_fluid_or_outside_the_brain() -> None:
    seeds = (0, 1, 2)
    anatomy = _anatomy(*seeds)
    tumours = [draw_tumour(stream(seed, "tumour")) for seed in seeds]
    generators = [_rng(seed) for seed in seeds]
    foci = place(tumours, anatomy, generators)
    density, age, lattice = grow(tumours, anatomy, foci, generators)
    maps = anatomy.at(lattice)
    assert density.min() >= 0
    assert 0.5 < density.max() <= 1 + 1e-4
    assert (age.amax(dim=(1, 2, 3, 4)) - 1).abs().max() < 1e-6  # relative to each tumour's oldest point
    assert age[density == 0].max() < 1e-9
    fluid = anatomy.tissues(maps)["csf"] >= 0.5
    assert density[fluid | (maps["depth"] <= 0)].max() == 0
    assert (density > EDGE_DENSITY).flatten(1).any(dim=1).all()


def test_a_wall_of_fluid_is_not_crossed() -> None:
    def parted(points: torch.Tensor) -> dict[str, torch.Tensor]:
        fluid = ((points[:, :1] - 12).abs() < 4).float()
        return {"white": 1 - fluid, "csf": fluid}

    density, points = _grown(parted, replace(PLAIN, wt_ml=90.0))
    beyond = points[:, :1] > 12
    assert density[beyond].max() == 0
    assert density[points[:, :1] < -12].max() > EDGE_DENSITY


def test_the_front_is_faster_in_white_than_in_grey_matter() -> None:
    def halves(points: torch.Tensor) -> dict[str, torch.Tensor]:
        white = (points[:, :1] > 0).float()
        return {"white": white, "cortex": 1 - white}

    ratios = []
    for tissue in (halves, _all_white):  # with the same random pace
        density, points = _grown(tissue, PLAIN)
        right, left = ((density[side] > EDGE_DENSITY).sum() for side in (points[:, :1] > 0, points[:, :1] < 0))
        ratios.append((right / left).item())
    assert ratios[0] > 1.7 * ratios[1]


def test_growth_stops_at_the_volume_whoever_else_grows_on() -> None:
    small, large = replace(PLAIN, wt_ml=20.0), replace(PLAIN, wt_ml=120.0)
    density, _ = _grown(_all_white, small, large)
    ml = (density > EDGE_DENSITY).flatten(1).sum(dim=1) * GROWTH_MM**3 / 1000
    for found, tumour in zip(ml.tolist(), (small, large), strict=True):
        assert tumour.wt_ml <= found < 1.7 * tumour.wt_ml
    alone, _ = _grown(_all_white, small)
    torch.testing.assert_close(density[:1], alone, atol=1e-6, rtol=0)


def test_a_wider_front_reaches_farther_beyond_the_dense_core() -> None:
    ratios = []
    for infiltration_mm in (2.5, 8.0):
        density, _ = _grown(_all_white, replace(PLAIN, infiltration_mm=infiltration_mm))
        ratios.append(((density > 0.8).sum() / (density > EDGE_DENSITY).sum()).item())
    assert ratios[0] > 1.5 * ratios[1]


# ---- compartments ------------------------------------------------------------------------------------------------


def _outlined(*tumours: Tumour, seeds: Sequence[int] = (0, 1)) -> tuple[Outlines, Anatomy]:
    seeds = seeds[: len(tumours)]
    anatomy, generators = _anatomy(*seeds), [_rng(seed) for seed in seeds]
    foci = place(tumours, anatomy, generators)
    anatomy = anatomy.pushed_by(mass_of(tumours, foci))
    return outline(tumours, anatomy, grow(tumours, anatomy, foci, generators), generators), anatomy


def _regions(outlines: Outlines) -> list[torch.Tensor]:
    whole, core, rim, cavity = (outlines.depth_mm > 0).unbind(1)
    return [whole, whole & core, whole & core & rim & ~cavity, whole & core & cavity]


def test_compartments_have_the_drawn_volumes() -> None:
    operated = replace(PLAIN, wt_ml=90.0, tc_ml=50.0, et_ml=8.0, cavity_ml=30.0, patchy=0.8)
    outlines, anatomy = _outlined(PLAIN, operated)
    for name, region in zip(("wt_ml", "tc_ml", "et_ml", "cavity_ml"), _regions(outlines), strict=True):
        found = (region.flatten(1).sum(dim=1) * VOXEL_ML).tolist()
        assert found == pytest.approx([getattr(PLAIN, name), getattr(operated, name)], rel=0.01), name
    maps = anatomy.at(outlines.lattice)
    assert maps["depth"][:, 0][_regions(outlines)[0]].min() > 0.5
    assert maps["wall"][:, 0][_regions(outlines)[0]].min() > 0


def test_a_tumour_larger_than_its_lattice_ends_with_it() -> None:
    outlines, _ = _outlined(replace(PLAIN, wt_ml=270.0, tc_ml=100.0, infiltration_mm=9.0))
    start, n = outlines.lattice.start_mm, outlines.lattice.shape[0]
    wide = Lattice(start - 12.0, OUTLINE_MM, (n + 12, n + 12, n + 12))
    beyond = torch.ones(wide.shape, dtype=torch.bool)
    beyond[6:-6, 6:-6, 6:-6] = False
    assert (outlines.at(wide)["wt"][:, 0, beyond] < -20).all()  # not even a soft edge goes on


@pytest.mark.parametrize("spacing_mm", [1.3, 3.0])
def test_volumes_stay_on_any_other_lattice(spacing_mm: float) -> None:
    thin = replace(PLAIN, et_ml=5.0)  # a rim thinner than the points' distance
    outlines, _ = _outlined(thin)
    n = int(OUTLINE_MM * (outlines.lattice.shape[0] - 1) / spacing_mm)
    other = Lattice(outlines.lattice.start_mm + 0.7, spacing_mm, (n, n, n))
    depth = outlines.at(other)
    nested = torch.ones_like(depth["wt"], dtype=torch.bool)
    for name in ("wt", "tc", "et"):
        nested = nested & (depth[name] > 0)
        found = nested.sum().item() * spacing_mm**3 / 1000
        assert found == pytest.approx(getattr(thin, f"{name}_ml"), rel=0.12), name


def test_where_there_is_no_room_the_tumour_fills_what_there_is() -> None:
    outlines, anatomy = _outlined(replace(PLAIN, wt_ml=4000.0))
    maps = anatomy.at(outlines.lattice)
    room = (maps["depth"] > 0.5) & (maps["wall"] > 0)
    inner = (..., slice(1, -1), slice(1, -1), slice(1, -1))  # a tumour does not touch the end of its lattice
    assert torch.equal(_regions(outlines)[0][inner], room[:, 0][inner])


def test_without_enhancement_the_core_is_all_of_one_kind() -> None:
    outlines, _ = _outlined(replace(PLAIN, et_ml=0.0))
    _, core, rim, cavity = _regions(outlines)
    assert core.any()
    assert not rim.any()
    assert not cavity.any()


def test_a_rim_encloses_the_necrosis_and_patches_do_not() -> None:
    kinds = [replace(PLAIN, wt_ml=110.0, tc_ml=80.0, et_ml=35.0, patchy=patchy) for patchy in (0.0, 1.0)]
    outlines, _ = _outlined(*kinds, seeds=(0, 0))
    _, core, rim, _ = (region.numpy() for region in _regions(outlines))
    outer = []
    for row in range(2):
        depth = ndimage.distance_transform_edt(core[row])
        outer.append(depth[rim[row]].mean() / depth[core[row] & ~rim[row]].mean())
    assert outer[0] < 0.6
    assert outer[1] > 0.7


def test_several_foci_make_several_tumours() -> None:
    parts = []
    for seed in range(3):
        tumour = replace(PLAIN, wt_ml=25.0, tc_ml=8.0, et_ml=3.0, foci=3, rough=0.1, infiltration_mm=2.5)
        outlines, _ = _outlined(tumour, seeds=(seed,))
        _, count = ndimage.label(_regions(outlines)[0][0].numpy(), np.ones((3, 3, 3)))
        parts.append(count)
    assert max(parts) >= 2


def test_a_tumour_that_did_not_grow_has_its_volumes_and_does_not_follow_tissue() -> None:
    round_one = replace(PLAIN, grown=False, foci=1, rough=0.0)
    cortex = []
    for tumour in (round_one, replace(round_one, grown=True)):
        outlines, anatomy = _outlined(tumour)
        whole = _regions(outlines)[0]
        assert whole.sum().item() * VOXEL_ML == pytest.approx(tumour.wt_ml, rel=0.01)
        maps = anatomy.at(outlines.lattice)
        cortex.append(anatomy.tissues(maps)["cortex"][:, 0][whole].mean().item())
        assert maps["wall"][:, 0][whole].min() > 0
    assert cortex[0] > 1.5 * cortex[1]
