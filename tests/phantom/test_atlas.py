"""The template: shares, distances, symmetry, and one head at every voxel size."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from medmap.phantom.atlas import CENTRE_MM, FARTHEST_MM, MAPS, Atlas, load_atlas


def _map(atlas: Atlas, name: str) -> torch.Tensor:
    return atlas.maps[0, MAPS.index(name)]


def test_the_asset_is_small_and_carries_its_notice() -> None:
    package = resources.files("medmap.phantom")
    with resources.as_file(package / "atlas.npz") as path:
        assert path.stat().st_size < 1e6
    assert "ICBM 152" in (package / "NOTICE").read_text(encoding="utf-8")


def test_it_is_read_once_and_kept() -> None:
    assert load_atlas(4.0) is load_atlas(3.7)
    assert load_atlas(9.0) is load_atlas(4.0)
    assert load_atlas(0.5) is load_atlas(1.0)


def test_shares_are_shares() -> None:
    atlas = load_atlas(2.0)
    shares = torch.stack([_map(atlas, name) for name in ("white", "cortex", "deep", "ventricle")])
    assert shares.min() >= 0
    total = shares.sum(dim=0)
    assert total.max() < 1.05  # the template's own maps overlap by that much in a few hundred voxels
    assert (total > 1.001).float().mean() < 1e-3
    outside = _map(atlas, "depth") < -4
    assert shares[:, outside].max() == 0


def test_left_is_the_mirror_image_of_right() -> None:
    atlas = load_atlas(1.0)
    assert torch.equal(atlas.maps, atlas.maps.flip(2))
    assert atlas.lattice.lines()[0].mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("voxel", [2, 3, 4])
def test_every_voxel_size_shows_the_same_head_at_the_same_place(voxel: int) -> None:
    fine, coarse = load_atlas(1.0), load_atlas(voxel)
    assert coarse.lattice.spacing_mm == voxel
    for name in ("white", "cortex", "deep", "ventricle"):
        one, other = _map(fine, name), _map(coarse, name)
        assert other.sum().item() * voxel**3 == pytest.approx(one.sum().item(), rel=0.01)
        for axis in range(3):
            middles = []
            for atlas, share in ((fine, one), (coarse, other)):
                line = atlas.lattice.lines()[axis][0]
                along = share.sum(dim=[a for a in range(3) if a != axis])
                middles.append(((line * along).sum() / along.sum()).item())
            assert middles[0] == pytest.approx(middles[1], abs=0.05)


def test_volumes_are_those_of_a_brain() -> None:
    atlas = load_atlas(2.0)
    ml = {name: _map(atlas, name).sum().item() * 8 / 1000 for name in ("white", "cortex", "deep", "ventricle")}
    assert 1500 < (_map(atlas, "depth") > 0).sum().item() * 8 / 1000 < 2200
    assert 500 < ml["white"] < 900
    assert 700 < ml["cortex"] < 1200
    assert 15 < ml["deep"] < 120
    assert 8 < ml["ventricle"] < 60


def test_distances_are_in_mm_and_have_the_right_sign() -> None:
    atlas = load_atlas(2.0)
    depth, wall, ventricle = (_map(atlas, name) for name in ("depth", "wall", "ventricle"))
    for distance in (depth, wall):
        assert distance.abs().max() <= FARTHEST_MM + 1e-3
        slope = torch.stack(torch.gradient(distance, spacing=2.0)).norm(dim=0)
        assert slope[distance.abs() < 15].median().item() == pytest.approx(1, abs=0.1)
    assert wall[ventricle > 0.9].max() < 0.5
    assert wall[ventricle < 0.1].min() > -0.5
    assert depth[ventricle > 0.5].min() > 0
    centre = [round((c - s) / 2.0) for c, s in zip(CENTRE_MM, atlas.lattice.start_mm[0].tolist(), strict=True)]
    assert depth[*centre] > 20


def test_outward_leads_away_from_the_ventricles_and_fades() -> None:
    atlas = load_atlas(2.0)
    outward, wall = atlas.outward[0], _map(atlas, "wall")
    length = outward.norm(dim=0)
    assert length.max() <= 1 + 1e-3
    assert length[(wall - 1).abs() < 1].median() > 0.9
    assert length[wall > 20].max() < 0.25
    slope = torch.stack(torch.gradient(wall, spacing=2.0))
    near = (wall > 1) & (wall < 10)
    assert (outward * slope).sum(dim=0)[near].median() > 0.6
