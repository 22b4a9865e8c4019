"""Heads differ smoothly and without folds, and give way to what grows in them without losing volume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medmap.phantom.anatomy import Anatomy, Head, Mass, _integrated, _rotation, draw_head
from medmap.phantom.atlas import CENTRE_MM
from medmap.phantom.patient import stream
from medmap.phantom.simulate import PLAIN, grid_of
from medmap.phantom.space import Lattice, smooth_field

COARSE = grid_of(replace(PLAIN, spacing_mm=4.0))
VOXEL_ML = 4.0**3 / 1000
STILL = Head((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
"""A head that is the atlas."""


def _anatomy(*heads: Head) -> Anatomy:
    return Anatomy(heads, [np.random.default_rng(row) for row in range(len(heads))])


def _drawn(seed: int) -> Anatomy:
    return Anatomy([draw_head(stream(seed, "head"))], [stream(seed, "anatomy")])


def _determinant(points_mm: torch.Tensor, spacing_mm: float) -> torch.Tensor:
    """Of the Jacobian of a map that is given by where it takes the points of a lattice."""
    columns = [torch.gradient(points_mm, spacing=spacing_mm, dim=axis)[0] for axis in (2, 3, 4)]
    return torch.linalg.det(torch.stack(columns, dim=-1).movedim(1, -2))


@pytest.fixture(scope="module")
def drawn() -> list[Anatomy]:
    return [_drawn(seed) for seed in range(12)]


# ---- the map into the atlas --------------------------------------------------------------------------------------


def test_a_head_without_peculiarities_is_the_atlas() -> None:
    found = _anatomy(STILL).atlas_mm(COARSE)
    torch.testing.assert_close(found, COARSE.points() + torch.tensor(CENTRE_MM)[:, None, None, None], atol=1e-3, rtol=0)


def test_size_and_turn_are_in_the_map() -> None:
    small = _anatomy(replace(STILL, size=(0.8, 0.9, 1.0))).atlas_mm(COARSE)[0]
    points = COARSE.points()[0]
    centre = torch.tensor(CENTRE_MM)[:, None, None, None]
    scale = torch.tensor([0.8, 0.9, 1.0])[:, None, None, None]
    torch.testing.assert_close(small, points / scale + centre, atol=1e-3, rtol=0)
    quarter = _rotation([(0.0, 0.0, np.pi / 2)], points)[0]
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    turn = _rotation([(0.1, -0.2, 0.3)], points)[0]
    torch.testing.assert_close(turn @ turn.T, torch.eye(3))
    about_x, about_y = _rotation([(0.1, 0.0, 0.0)], points)[0], _rotation([(0.0, -0.2, 0.0)], points)[0]
    about_z = _rotation([(0.0, 0.0, 0.3)], points)[0]
    torch.testing.assert_close(turn, about_z @ about_y @ about_x)


@pytest.mark.parametrize("seed", range(3))
def test_integrating_a_smooth_flow_folds_nothing(seed: int) -> None:
    lattice = Lattice.centred((30, 30, 30), 4.0)
    velocity = 8.0 * smooth_field(lattice, 25.0, [np.random.default_rng(seed)], channels=3)
    there = lattice.points() + velocity
    assert _determinant(there, 4.0).min() < 0  # the same field folds space where it is taken as it is
    flown = lattice.points() + _integrated(velocity, lattice)
    assert _determinant(flown, 4.0)[..., 3:-3, 3:-3, 3:-3].min() > 0


def test_no_head_has_a_fold(drawn: list[Anatomy]) -> None:
    for anatomy in drawn:
        inside = anatomy.at(anatomy.lattice)["depth"][:, 0] > 0
        assert _determinant(anatomy.atlas_mm(anatomy.lattice), 4.0)[inside].min() > 0


def test_ventricles_do_not_fold_however_wide_they_grow() -> None:
    wide = _anatomy(replace(STILL, ventricle_mm=6.0))
    inside = wide.at(wide.lattice)["depth"][:, 0] > 0
    determinant = _determinant(wide.atlas_mm(wide.lattice), 4.0)[inside]
    # the very middle of a ventricle is widened without end, up to what a lattice of 4 mm can tell
    assert determinant.min() > -0.05
    assert (determinant <= 0).float().mean() < 1e-3


def test_a_head_does_not_depend_on_who_else_is_in_the_batch() -> None:
    heads = [draw_head(stream(seed, "head")) for seed in (3, 4)]
    both = Anatomy(heads, [stream(seed, "anatomy") for seed in (3, 4)])
    for row, seed in enumerate((3, 4)):
        alone = _drawn(seed)
        torch.testing.assert_close(
            both.atlas_mm(COARSE)[row], alone.atlas_mm(COARSE)[0], atol=1e-3, rtol=0, msg=f"seed {seed}"
        )


# ---- tissues -----------------------------------------------------------------------------------------------------


def test_fractions_sum_to_one_everywhere(drawn: list[Anatomy]) -> None:
    for anatomy in drawn[:4]:
        maps = anatomy.at(COARSE)
        shares = torch.cat(list(anatomy.tissues(maps).values()), dim=1)
        assert shares.min() >= -1e-6
        total = shares.sum(dim=1, keepdim=True)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)


def test_heads_have_the_volumes_of_heads_and_fit_the_field_of_view(drawn: list[Anatomy]) -> None:
    volumes = []
    for seed, anatomy in enumerate(drawn):
        maps = anatomy.at(COARSE)
        brain = anatomy.brain(maps, COARSE, [stream(seed, "strip")])[0, 0]
        inner = torch.zeros_like(brain)
        inner[1:-1, 1:-1, 1:-1] = True
        assert (brain & ~inner).sum().item() * VOXEL_ML < 12  # of a low brain stem, and what stripping left round it
        tissues = anatomy.tissues(maps)
        volumes.append([(tissues[name][0, 0] * brain).sum().item() * VOXEL_ML for name in tissues])
        assert 5 < (maps["wall"][0, 0] < 0).sum().item() * VOXEL_ML < 120
        assert 1000 < brain.sum().item() * VOXEL_ML < 1900
    white, cortex, deep, csf = np.mean(volumes, axis=0)
    assert 450 < white < 850
    assert 350 < cortex < 800
    assert 10 < deep < 90
    assert 80 < csf < 450


def _volumes(head: Head) -> dict[str, float]:
    anatomy = _anatomy(head)
    maps = anatomy.at(COARSE)
    inside = maps["depth"] > 0
    return {name: (share * inside).sum().item() * VOXEL_ML for name, share in anatomy.tissues(maps).items()}


def test_each_peculiarity_does_what_it_is_named_for() -> None:
    still = _volumes(STILL)
    aged, fibrous = _volumes(replace(STILL, atrophy=1.5)), _volumes(replace(STILL, myelin=0.4))
    assert aged["csf"] > 1.1 * still["csf"]
    assert aged["cortex"] < still["cortex"]
    assert fibrous["white"] == pytest.approx(still["white"] + 0.4 * still["cortex"], rel=1e-3)
    assert fibrous["csf"] == pytest.approx(still["csf"], rel=1e-3)

    def purity(head: Head) -> float:
        anatomy = _anatomy(head)
        maps = anatomy.at(COARSE)
        shares = torch.cat(list(anatomy.tissues(maps).values()), dim=1)
        return shares.square().sum(dim=1)[maps["depth"][:, 0] > 0].mean().item()

    assert purity(replace(STILL, crispness=2.5)) > purity(STILL) + 0.05


@pytest.mark.parametrize("ventricle_mm", [-1.0, 3.0])
def test_ventricles_walls_lie_as_much_farther_out_as_asked(ventricle_mm: float) -> None:
    fine = Lattice.centred((50, 60, 40), 2.0)
    before = _anatomy(STILL).at(fine)["wall"]
    after = _anatomy(replace(STILL, ventricle_mm=ventricle_mm)).at(fine)["wall"]
    near = (before > 1) & (before < 6)
    assert (before - after)[near].median().item() == pytest.approx(ventricle_mm, rel=0.25)
    far = before > 20
    assert (before - after)[far].abs().median() < 0.35 * abs(ventricle_mm)


# ---- mass effect -------------------------------------------------------------------------------------------------


def _pushed(anatomy: Anatomy, centre_mm: tuple[float, float, float], added_ml: float) -> Anatomy:
    return anatomy.pushed_by(Mass(torch.tensor([centre_mm]), torch.tensor([added_ml])))


def test_nothing_new_moves_nothing(drawn: list[Anatomy]) -> None:
    anatomy = drawn[0]
    after = _pushed(anatomy, (20.0, 5.0, 10.0), 0.0)
    torch.testing.assert_close(after.atlas_mm(COARSE), anatomy.atlas_mm(COARSE), atol=2e-3, rtol=0)


@pytest.mark.parametrize("added_ml", [10.0, 40.0])
def test_tissue_is_incompressible(added_ml: float) -> None:
    """The tissue that was in a ball is now in the ball's volume and what was added."""
    after = _pushed(_anatomy(STILL), (0.0, 0.0, 12.0), added_ml)
    fine = Lattice.centred((40, 40, 40), 2.0)
    centre = torch.tensor(CENTRE_MM) + torch.tensor([0.0, 0.0, 12.0])
    was_mm = (after.atlas_mm(fine) - centre[:, None, None, None]).norm(dim=1)
    for radius_mm in (14.0, 18.0):
        ball_ml = 4 / 3 * np.pi * radius_mm**3 / 1000
        found_ml = (was_mm < radius_mm).sum().item() * 8 / 1000
        assert found_ml == pytest.approx(ball_ml + added_ml, rel=0.05)  # the map is kept every 4 mm


def test_the_skull_does_not_yield(drawn: list[Anatomy]) -> None:
    anatomy = drawn[1]
    after = _pushed(anatomy, (35.0, 10.0, 20.0), 60.0)
    moved = (after._atlas_mm - anatomy._atlas_mm).norm(dim=1)
    depth = anatomy.at(anatomy.lattice)["depth"][:, 0]
    assert moved[depth <= 0].max() == 0
    assert moved[depth > 15].max() > 10


def test_a_growing_mass_folds_nothing(drawn: list[Anatomy]) -> None:
    folds = []
    for seed, anatomy in enumerate(drawn):
        generator = np.random.default_rng(seed)
        depth = anatomy.at(anatomy.lattice)["depth"][:, 0]
        deep = anatomy.lattice.points()[0][:, depth[0] > 12]
        centre = deep[:, generator.integers(deep.shape[1])]
        after = anatomy.pushed_by(Mass(centre[None], torch.tensor([float(generator.uniform(1, 80))])))
        determinant = _determinant(after._atlas_mm, 4.0)[depth > 0]
        folds.append((determinant <= 0).float().mean().item())
    assert max(folds) < 1e-3


def test_a_drawn_head_is_the_same_for_the_same_stream_and_within_bounds() -> None:
    assert draw_head(stream(0, "head")) == draw_head(stream(0, "head"))
    heads = [draw_head(stream(seed, "head")) for seed in range(200)]
    assert len(set(heads)) == 200
    sizes = np.array([head.size for head in heads])
    assert (sizes >= 0.84).all()
    assert (sizes <= 1.02).all()
    assert np.abs([head.turn_rad for head in heads]).max() <= 0.12
    assert all(0 <= head.atrophy <= 2 and -1.5 <= head.ventricle_mm <= 6 for head in heads)


def test_some_maps_are_the_same_as_among_all() -> None:
    anatomy = _anatomy(STILL)
    every, some = anatomy.at(COARSE), anatomy.at(COARSE, ("wall", "depth"))
    assert all(torch.equal(some[name], every[name]) for name in some)
