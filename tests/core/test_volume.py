"""Volumes keep their place in space: turned, resampled, normalised."""

from __future__ import annotations

from itertools import product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from medmap.core.box import Boxed, bounding_box
from medmap.core.case import Grid
from medmap.core.volume import from_ras, grid_with_spacing, ras_grid, resample, resample_labels, to_ras, zscore
from medmap.errors import InputError

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
CODES = st.permutations(["RL", "AP", "SI"]).flatmap(lambda axes: st.tuples(*(st.sampled_from(axis) for axis in axes)))


@st.composite
def grids(draw):
    """Any stored orientation, anisotropic, tilted by up to a few degrees, anywhere in space."""
    shape = draw(SHAPES)
    spacing = [draw(st.sampled_from([0.5, 0.9375, 1.0, 2.0, 3.3])) for _ in range(3)]
    tilt = draw(st.sampled_from([0.0, 0.1]))
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    ras = np.eye(4)
    ras[:3, :3] = turn @ np.diag(spacing)
    ras[:3, 3] = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    affine = ras @ np.linalg.inv(inv_ornt_aff(axcodes2ornt(draw(CODES)), shape))
    return Grid(shape, affine)


def volume_on(grid: Grid) -> np.ndarray:
    return np.arange(1, np.prod(grid.shape) + 1, dtype=np.float32).reshape(grid.shape)


@settings(max_examples=60, deadline=None)
@given(grids())
def test_turning_keeps_every_voxel_at_its_place(grid):
    array = volume_on(grid)
    turned, affine = to_ras(array, grid.affine)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    for index in np.ndindex(*turned.shape):
        native = np.linalg.solve(grid.affine, affine @ [*index, 1])[:3]
        assert turned[index] == array[tuple(np.rint(native).astype(int))]
    assert ras_grid(grid).shape == turned.shape
    assert_array_equal(ras_grid(grid).affine, affine)


@settings(max_examples=60, deadline=None)
@given(grids())
def test_turning_back_is_the_exact_inverse_for_volumes_and_stacks(grid):
    array = volume_on(grid)
    stack = np.stack([array, -array])
    assert_array_equal(from_ras(to_ras(array, grid.affine)[0], grid), array)
    assert_array_equal(from_ras(to_ras(stack, grid.affine)[0], grid), stack)


def test_turning_agrees_with_nibabel():
    image = nib.Nifti1Image(np.random.default_rng(0).random((3, 4, 5)), np.diag([-2.0, 3.0, -1.0, 1.0]))
    expected = nib.as_closest_canonical(image)
    turned, affine = to_ras(image.get_fdata(), image.affine)
    assert_array_equal(turned, expected.get_fdata())
    assert_array_equal(affine, expected.affine)


@settings(max_examples=60, deadline=None)
@given(grids(), st.sampled_from([0.7, 1.0, 2.0, 5.0]))
def test_a_new_spacing_keeps_centre_axes_and_cover(grid, spacing_mm):
    new = grid_with_spacing(grid, spacing_mm)
    centre = [g.affine @ [*((np.array(g.shape) - 1) / 2), 1] for g in (grid, new)]
    assert_allclose(centre[0], centre[1], atol=1e-9)
    assert_allclose(new.spacing_mm, spacing_mm, rtol=1e-4)
    assert_allclose(new.affine[:3, :3] / spacing_mm, grid.affine[:3, :3] / grid.spacing_mm, atol=1e-4)
    extent = np.array(grid.shape) * grid.spacing_mm
    covered = np.array(new.shape) * spacing_mm
    assert (covered > extent - 0.011 * spacing_mm).all()
    assert (covered < extent + spacing_mm).all()


def test_a_spacing_that_is_there_already_changes_nothing():
    almost = Grid((240, 240, 155), np.diag([0.9999999, 1.0000001, 1.0, 1.0]))
    assert grid_with_spacing(almost, 1.0) is almost
    array = np.random.default_rng(0).random((3, 4, 5))
    grid = Grid((3, 4, 5), np.eye(4))
    for order in (0, 1):
        assert_array_equal(resample(array, grid, Grid((3, 4, 5), np.eye(4) + 1e-5), order), array)


@pytest.mark.parametrize("spacing_mm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_spacing_must_be_positive(spacing_mm):
    with pytest.raises(InputError, match="expected a positive number of millimetres"):
        grid_with_spacing(Grid((2, 2, 2), np.eye(4)), spacing_mm)


def test_halving_the_resolution_is_the_block_mean_also_in_the_last_slice():
    array = np.random.default_rng(0).random((6, 4, 8)).astype(np.float32)
    source = Grid(array.shape, np.eye(4))
    target = grid_with_spacing(source, 2.0)
    blocks = array.reshape(3, 2, 2, 2, 4, 2).mean(axis=(1, 3, 5))
    assert target.shape == blocks.shape
    assert_allclose(resample(array, source, target, order=1), blocks, rtol=1e-6)
    # the first block's centre lies between voxels 0 and 1: an affine that were only scaled would be half a voxel off
    assert_allclose(target.affine[:3, 3], [0.5, 0.5, 0.5])


@pytest.mark.parametrize("spacing_mm", [0.7, 2.0, 2.6])
def test_axis_by_axis_is_the_same_as_scipy_all_at_once(spacing_mm):
    """Witness: `scipy.ndimage.affine_transform` at the points inside each target voxel, averaged."""
    array = np.random.default_rng(2).random((7, 8, 9)).astype(np.float32)
    source = Grid(array.shape, np.eye(4))
    target = grid_with_spacing(source, spacing_mm)
    count = int(np.ceil(spacing_mm))
    offsets = (np.arange(count) + 0.5) / count - 0.5
    expected = np.mean(
        [
            ndimage.affine_transform(
                array,
                target.affine[:3, :3],
                target.affine[:3, 3] + spacing_mm * np.array(point),
                target.shape,
                order=1,
                mode="nearest",
            )
            for point in product(offsets, repeat=3)
        ],
        axis=0,
    )
    inside = tuple(slice(1, -1) for _ in range(3))
    assert_allclose(resample(array, source, target, order=1)[inside], expected[inside], atol=1e-6)


def test_an_oblique_target_is_sampled_where_it_lies():
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    source = Grid((20, 20, 4), np.eye(4))
    target = Grid((5, 5, 2), np.array([[1, 0, 0, 8.0], [0, 1, 0, 6.0], [0, 0, 1, 1], [0, 0, 0, 1]]) @ turn)
    for axis in range(3):
        moved = resample(_position_mm(source, axis), source, target, order=1)
        assert_allclose(moved, _position_mm(target, axis), atol=1e-4)


@pytest.mark.parametrize("spacing_mm", [0.5, 0.8, 2.0])
def test_a_linear_ramp_stays_at_its_place_in_space(spacing_mm):
    """f(x) = x in mm: trilinear interpolation reproduces it exactly, so any shift of half a voxel would show."""
    source = Grid((12, 10, 8), np.array([[1.0, 0, 0, -5], [0, 1.2, 0, 7], [0, 0, 1.5, 3], [0, 0, 0, 1]]))
    target = grid_with_spacing(source, spacing_mm)
    for axis in range(3):
        inner = tuple(slice(int(3 / spacing_mm), -int(3 / spacing_mm)) for _ in range(3))
        moved = resample(_position_mm(source, axis), source, target, order=1)
        assert_allclose(moved[inner], _position_mm(target, axis)[inner], atol=1e-4)


def _position_mm(grid: Grid, axis: int) -> np.ndarray:
    indices = np.indices(grid.shape).reshape(3, -1)
    return (grid.affine[:3, :3] @ indices + grid.affine[:3, 3:])[axis].reshape(grid.shape).astype(np.float32)


def test_a_turned_target_grid_is_the_turned_volume():
    array = np.random.default_rng(1).random((4, 5, 6)).astype(np.float32)
    source = Grid(array.shape, np.diag([-1.0, -1.0, 1.0, 1.0]))
    turned, affine = to_ras(array, source.affine)
    for order in (0, 1):
        assert_allclose(resample(array, source, Grid(turned.shape, affine), order), turned, atol=1e-6)


def test_the_border_holds_for_half_a_voxel_and_beyond_the_field_of_view_is_nothing():
    source = Grid((2, 1, 1), np.eye(4))
    target = Grid((6, 1, 1), np.array([[0.5, 0, 0, -0.75], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    array = np.array([3.0, 5.0], np.float32).reshape(2, 1, 1)
    assert resample(array, source, target, 1).ravel().tolist() == [0, 3, 3.5, 4.5, 5, 0]
    assert resample(array, source, target, 0).ravel().tolist() == [0, 3, 3, 5, 5, 0]


def test_nearest_invents_no_value_and_keeps_the_type():
    labels = np.random.default_rng(0).choice([0, 1, 2, 4], (7, 7, 7)).astype(np.uint8)
    source = Grid(labels.shape, np.eye(4))
    for move in (lambda target: resample(labels, source, target, 0), lambda t: resample_labels(labels, source, t)):
        moved = move(grid_with_spacing(source, 1.7))
        assert moved.dtype == np.uint8
        assert set(np.unique(moved)) <= {0, 1, 2, 4}


def test_labels_go_to_the_majority_and_equals_to_the_lower_code():
    labels = np.array([4, 4, 4, 0, 1, 1, 4, 4], np.uint8).reshape(2, 2, 2)
    assert resample_labels(labels, Grid((2, 2, 2), np.eye(4)), Grid((1, 1, 1), _doubled())).item() == 4
    labels[0, 0] = 1  # four of 1, three of 4
    assert resample_labels(labels, Grid((2, 2, 2), np.eye(4)), Grid((1, 1, 1), _doubled())).item() == 1
    labels[...] = [[[1, 1], [1, 1]], [[4, 4], [4, 4]]]
    assert resample_labels(labels, Grid((2, 2, 2), np.eye(4)), Grid((1, 1, 1), _doubled())).item() == 1


def _doubled() -> np.ndarray:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = 0.5
    return affine


def test_zscore_normalises_the_brain_and_leaves_the_background_at_zero():
    rng = np.random.default_rng(0)
    image = np.where(rng.random((8, 8, 8)) < 0.5, rng.normal(900, 40, (8, 8, 8)), 0).astype(np.float32)
    z = zscore(image, image != 0)
    assert z.dtype == np.float32
    assert_allclose([z[image != 0].mean(), z[image != 0].std()], [0, 1], atol=1e-5)
    # a background of −mean/std is what comes of normalising the whole volume
    assert (z[image == 0] == 0).all()


@pytest.mark.parametrize("value", [0.1, 7.0, -3e4, 1e-30])
def test_zscore_of_a_constant_brain_is_zero(value):
    image = np.zeros((5, 5, 5), np.float32)
    image[1:4] = value
    assert not zscore(image, image != 0).any()
    assert not zscore(image, np.zeros(image.shape, bool)).any()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1e4), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_zscore_knows_no_unit(scale, shift, seed):
    image = np.random.default_rng(seed).normal(0, 1, (4, 4, 4))
    mask = np.ones(image.shape, bool)
    assert_allclose(zscore(scale * image + shift, mask), zscore(image, mask), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 999), st.floats(0, 1))
def test_a_boxed_volume_unfolds_to_what_it_was(shape, seed, density):
    rng = np.random.default_rng(seed)
    volume = np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)
    boxed = Boxed.tight(volume)
    whole = bounding_box(np.ones(shape))
    assert_array_equal(boxed.window(whole), volume)
    if volume.any():
        # both end planes are in the box: a last slice is easily lost
        for axis in range(3):
            assert boxed.values.take(0, axis).any()
            assert boxed.values.take(-1, axis).any()
