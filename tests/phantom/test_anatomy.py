"""Laws of the analytic head."""

from __future__ import annotations

import numpy as np
import pytest

from medmap.phantom.anatomy import axes_mm, build_anatomy, centred_grid, draw_head, smooth_field

COARSE = centred_grid((40, 48, 40), 4.0)


def test_a_grid_is_centred_on_the_brain() -> None:
    grid = centred_grid((40, 47, 41), 3.0)
    assert grid.spacing_mm == (3.0, 3.0, 3.0)
    for line in axes_mm(grid):
        assert line.mean() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("scale_mm", [6.0, 25.0])
def test_a_field_has_variance_about_one_and_is_smooth(scale_mm: float) -> None:
    fields = [smooth_field(COARSE, scale_mm, np.random.default_rng(seed)) for seed in range(6)]
    assert np.mean([f.var() for f in fields]) == pytest.approx(1, rel=0.25)
    rough = np.diff(smooth_field(centred_grid((50, 5, 5), 1.0), scale_mm, np.random.default_rng(0)), axis=0)
    assert np.abs(rough).max() < 3.5 / scale_mm


def test_a_field_belongs_to_space_not_to_the_grid() -> None:
    fine = smooth_field(centred_grid((41, 41, 41), 1.0), 12.0, np.random.default_rng(5))
    coarse = smooth_field(centred_grid((21, 21, 21), 2.0), 12.0, np.random.default_rng(5))
    np.testing.assert_allclose(fine[::2, ::2, ::2], coarse, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_fractions_fill_the_brain_and_nothing_else(seed: int) -> None:
    generator = np.random.default_rng(seed)
    anatomy = build_anatomy(draw_head(generator), COARSE, generator)
    shares = np.stack(list(anatomy.fractions.values()))
    assert shares.min() >= 0
    np.testing.assert_allclose(shares.sum(axis=0), anatomy.brain, atol=1e-5)


def test_heads_have_the_volumes_of_heads_and_fit_the_field_of_view() -> None:
    voxel_ml = 4.0**3 / 1000
    volumes = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        anatomy = build_anatomy(draw_head(generator), COARSE, generator)
        inner = np.zeros_like(anatomy.brain)
        inner[1:-1, 1:-1, 1:-1] = True
        assert not (anatomy.brain & ~inner).any()
        volumes.append([share.sum() * voxel_ml for share in anatomy.fractions.values()])
        assert 5 < (anatomy.ventricle_mm < 0).sum() * voxel_ml < 120
    white, grey, _, csf = np.mean(volumes, axis=0)
    assert 450 < white < 850
    assert 400 < grey < 800
    assert 80 < csf < 350
