"""Laws of the tumour: nested, inside, as large as asked; statistics in broad bands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from medmap.core.labels import SCHEMES
from medmap.phantom.anatomy import Anatomy, build_anatomy, centred_grid, draw_head
from medmap.phantom.tumour import draw_tumour, grow_tumour

GRID = centred_grid((40, 48, 40), 4.0)
VOXEL_ML = 4.0**3 / 1000
SCHEME = SCHEMES["brats2023"]


def _anatomy(seed: int) -> Anatomy:
    generator = np.random.default_rng(seed)
    return build_anatomy(draw_head(generator), GRID, generator)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return _anatomy(0)


@pytest.mark.parametrize("seed", range(8))
def test_a_tumour_is_nested_inside_the_cerebrum_and_out_of_the_ventricles(anatomy: Anatomy, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = grow_tumour(draw_tumour(generator), anatomy, GRID, generator)
    classes = SCHEME.encode(labels)
    whole, core, enhancing = (SCHEME.region_mask(classes, region) for region in ("WT", "TC", "ET"))
    assert (core <= whole).all()
    assert (enhancing <= core).all()
    assert anatomy.brain[whole].all()
    assert (anatomy.depth_mm[whole] > 0).all()
    assert (anatomy.ventricle_mm[whole] > 0).all()


def test_volumes_are_the_drawn_ones(anatomy: Anatomy) -> None:
    generator = np.random.default_rng(3)
    tumour = replace(draw_tumour(generator), wt_ml=80.0, tc_ml=40.0, et_ml=15.0, foci=1)
    labels = grow_tumour(tumour, anatomy, GRID, generator)
    # islands below 0.1 ml are removed
    assert (labels > 0).sum() * VOXEL_ML == pytest.approx(80, rel=0.05)
    assert np.isin(labels, (1, 3)).sum() * VOXEL_ML == pytest.approx(40, rel=0.05)
    assert (labels == 3).sum() * VOXEL_ML == pytest.approx(15, rel=0.05)


def test_without_enhancement_the_core_is_all_non_enhancing(anatomy: Anatomy) -> None:
    generator = np.random.default_rng(3)
    labels = grow_tumour(replace(draw_tumour(generator), et_ml=0.0), anatomy, GRID, generator)
    assert set(np.unique(labels)) == {0, 1, 2}


def test_the_rim_encloses_the_necrosis(anatomy: Anatomy) -> None:
    generator = np.random.default_rng(4)
    tumour = replace(draw_tumour(generator), wt_ml=150.0, tc_ml=90.0, et_ml=50.0, foci=1, rim_rough_mm=0.5)
    labels = grow_tumour(tumour, anatomy, GRID, generator)
    depth = ndimage.distance_transform_edt(np.isin(labels, (1, 3)))
    assert depth[labels == 3].mean() < depth[labels == 1].mean()


def test_two_foci_make_two_components_far_apart() -> None:
    parts = []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        tumour = replace(draw_tumour(generator), wt_ml=15.0, foci=2, rough=0.12)
        labels = grow_tumour(tumour, _anatomy(seed), GRID, generator)
        parts.append(ndimage.label(labels > 0, np.ones((3, 3, 3)))[1])
    assert max(parts) >= 2


def test_drawn_sizes_lie_in_broad_bands_round_real_ones() -> None:
    tumours = [draw_tumour(np.random.default_rng(seed)) for seed in range(400)]
    whole = np.array([t.wt_ml for t in tumours])
    core = np.array([t.tc_ml for t in tumours])
    enhancing = np.array([t.et_ml for t in tumours])
    assert (enhancing < core).all()
    assert (core < whole).all()
    # percentiles of BraTS 2020's reference segmentations, within 40 %
    np.testing.assert_allclose(np.percentile(whole, [5, 50, 95]), [21, 90, 200], rtol=0.4)
    np.testing.assert_allclose(np.percentile(core, [25, 50, 75]), [14, 33, 60], rtol=0.4)
    np.testing.assert_allclose(np.percentile(enhancing, [50, 75, 95]), [14.8, 29.7, 58.2], rtol=0.4)
    assert 0.04 < np.mean(enhancing == 0) < 0.11
    assert 0.06 < np.mean([t.foci == 2 for t in tumours]) < 0.2
