"""A prepared sequence depends on its own file alone, and everything finds its way back onto the file's grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from medmap.core.box import Box
from medmap.core.case import Case, Grid
from medmap.core.labels import SCHEMES
from medmap.data.layouts import read_case as read
from medmap.data.layouts import recognise
from medmap.data.preprocess import prepare_case, restore, restore_classes
from medmap.errors import InputError

GLIOMA = SCHEMES["brats2023"]
NAMES = ("t1n", "t1c", "t2w", "t2f")
LPS = np.array([[-1.0, 0, 0, 90], [0, -1.2, 0, 100], [0, 0, 2.0, -60], [0, 0, 0, 1]])


def made_up_case(seed: int = 0, names: tuple[str, ...] = NAMES, affine: np.ndarray = LPS) -> Case:
    """Each sequence with a brain of its own, some values in it negative."""
    images = {name: _brain_image([seed, NAMES.index(name)]) for name in names}
    labels = np.zeros((12, 14, 10), np.uint8)
    labels[4:7, 5:9, 3:6] = np.random.default_rng(seed).choice([0, 1, 2, 3], (3, 4, 3))
    return Case("made-up", images, affine, labels)


def _brain_image(seed: list[int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.zeros((12, 14, 10), np.float32)
    low, high = rng.integers(0, 4, 3), 3
    brain = tuple(slice(a, n - rng.integers(0, high)) for a, n in zip(low, image.shape, strict=True))
    image[brain] = rng.normal(100, 80, image[brain].shape)
    return image


def same(one, other) -> bool:
    return one.box == other.box and one.values.dtype == other.values.dtype and np.array_equal(one.values, other.values)


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sampled_from(NAMES),
    st.sampled_from([None, 2.0, 0.9]),
    st.integers(0, 99),
)
def test_a_sequence_is_prepared_the_same_whatever_the_others_are(others, name, spacing_mm, seed):
    case = made_up_case()
    alone = prepare_case(Case("a", {name: case.images[name]}, LPS), None, spacing_mm)
    altered = {other: _brain_image([seed, 77]) for other in NAMES if other in others and other != name}
    # in first and in last place, beside altered sequences and with labels
    for images in ({name: case.images[name], **altered}, {**altered, name: case.images[name]}):
        together = prepare_case(Case("b", images, LPS, case.labels), GLIOMA, spacing_mm)
        assert same(together.images[name], alone.images[name])
        assert together.grid.matches(alone.grid)
        assert_array_equal(together.grid.affine, alone.grid.affine)


def test_affines_that_differ_within_the_tolerance_prepare_the_same_voxels():
    case = made_up_case()
    nudged = LPS + np.random.default_rng(0).normal(0, 1e-7, (4, 4)) * (np.arange(4) < 3)[:, None]
    for spacing_mm in (None, 1.5):
        one = prepare_case(case, GLIOMA, spacing_mm)
        other = prepare_case(Case("b", case.images, nudged, case.labels), GLIOMA, spacing_mm)
        assert all(same(one.images[name], other.images[name]) for name in NAMES)


@pytest.mark.parametrize("spacing_mm", [None, 2.0])
def test_each_sequence_is_normalised_in_its_own_brain_and_zero_outside(spacing_mm):
    case = made_up_case()
    prepared = prepare_case(case, None, spacing_mm)
    for name, boxed in prepared.images.items():
        assert boxed.values.dtype == np.float16
        inside = boxed.values[boxed.values != 0].astype(np.float64)
        assert_allclose([inside.mean(), inside.std()], [0, 1], atol=2e-3)
        whole = boxed.window(Box((0, 0, 0), prepared.grid.shape))
        if spacing_mm is None:
            back = restore(whole, prepared)
            # negative voxels are brain: the mask is != 0, not > 0
            assert_array_equal(back != 0, case.images[name] != 0)
            assert (case.images[name] < 0).any()


def test_the_brains_box_is_kept_where_its_rim_equals_the_mean():
    image = np.zeros((6, 6, 6), np.float32)
    image[1:5, 1:5, 1:5] = 5.0  # the mean
    image[2, 2, 2], image[3, 3, 3] = 4.0, 6.0
    prepared = prepare_case(Case("a", {"t1n": image}, np.eye(4)), None)
    assert prepared.images["t1n"].box == Box((1, 1, 1), (5, 5, 5))


def test_the_brains_rim_does_not_darken_when_resampled():
    """A brain of values around 100 on a background of 0: mixing the two would pull the rim far below the brain."""
    image = np.zeros((9, 9, 9), np.float32)
    image[2:7, 2:7, 2:7] = 100 + np.indices((5, 5, 5)).sum(0) % 2
    prepared = prepare_case(Case("a", {"t1n": image}, np.eye(4)), None, 2.0)
    assert float(prepared.images["t1n"].values.min()) > -3


def test_an_image_that_is_zero_everywhere_is_refused_with_the_cure():
    case = Case("p7", {"t1n": np.ones((3, 3, 3), np.float32), "t2f": np.zeros((3, 3, 3), np.float32)}, np.eye(4))
    with pytest.raises(InputError, match=r"case p7: t2f is 0 everywhere.*Remove the file"):
        prepare_case(case, None)


def test_a_code_the_scheme_does_not_know_is_refused():
    case = made_up_case()
    labels = np.where(case.labels == 3, 4, case.labels)
    with pytest.raises(InputError, match=r"case made-up: labels: found label 4; scheme brats2023 knows"):
        prepare_case(Case(case.id, case.images, LPS, labels), GLIOMA)


def test_labels_without_a_scheme_are_left_out_and_no_tumour_is_an_empty_box():
    case = made_up_case()
    assert prepare_case(case, None).labels is None
    healthy = prepare_case(Case("h", case.images, LPS, np.zeros_like(case.labels)), GLIOMA)
    assert healthy.labels.box.shape == (0, 0, 0)
    assert not healthy.labels.window(Box((0, 0, 0), (3, 3, 3))).any()


@settings(max_examples=25, deadline=None)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3), st.integers(0, 99))
def test_pure_reorientation_returns_every_bit(axes, signs, seed):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[list(axes)] * np.array(signs)
    affine[:3, 3] = [3, -5, 7]
    case = made_up_case(seed, affine=affine)
    prepared = prepare_case(case, GLIOMA)
    classes = prepared.labels.window(Box((0, 0, 0), prepared.grid.shape))
    assert_array_equal(GLIOMA.decode(restore(classes, prepared, order=0)), case.labels)
    values = np.random.default_rng(seed).random((4, *prepared.grid.shape)).astype(np.float32)
    returned = restore(values, (prepared.grid, prepared.native))
    assert returned.shape == (4, *case.grid.shape)
    assert sorted(returned.ravel()) == sorted(values.ravel())
    assert_array_equal(restore_classes(values, prepared), returned.argmax(0))


def test_a_smooth_tumour_survives_the_way_to_another_spacing_and_back():
    x, y, z = np.indices((24, 24, 24)) - 11.5
    labels = np.where(x**2 + y**2 + z**2 < 64, 2, 0).astype(np.uint8)
    labels[x**2 + y**2 + z**2 < 16] = 3
    case = Case("ball", {"t2f": np.ones((24, 24, 24), np.float32)}, np.diag([-1.0, 1, 1, 1]), labels)
    for spacing_mm in (0.7, 1.5, 2.0):
        prepared = prepare_case(case, GLIOMA, spacing_mm)
        classes = prepared.labels.window(Box((0, 0, 0), prepared.grid.shape))
        by_codes = GLIOMA.decode(restore(classes, prepared, order=0))
        shares = np.stack([classes == index for index in range(4)]).astype(np.float32)
        by_shares = GLIOMA.decode(restore_classes(shares, prepared))
        for back in (by_codes, by_shares):
            assert back.shape == labels.shape
            for code in (2, 3):
                both, either = (
                    ((back == code) & (labels == code)).sum(),
                    ((back == code).sum() + (labels == code).sum()),
                )
                assert 2 * both / either > 0.85


@pytest.mark.parametrize("spacing_mm", [None, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("oblique", [False, True])
def test_classes_are_the_argmax_of_restored_probabilities(spacing_mm: float | None, oblique: bool) -> None:
    """Computed round the tumour, they are what they are everywhere; at a border of the grid, too, and where none is."""
    affine = LPS.copy()
    if oblique:
        affine[:3, :3] = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0] @ np.diag([1.0, 1.2, 2.0])
    prepared = prepare_case(made_up_case(affine=affine), GLIOMA, spacing_mm)
    shape, draw = prepared.grid.shape, np.random.default_rng(4)
    for low, high in ((0.3, 0.5), (0.0, 0.25), (0.8, 1.0), (0.5, 0.5)):
        inside = np.zeros(shape, np.float32)
        inside[tuple(slice(int(low * n), int(high * n)) for n in shape)] = 1
        values = draw.uniform(size=(4, *shape)).astype(np.float32) * np.stack([np.ones(shape), inside, inside, inside])
        values[0] += 1e-3 + 2 * (1 - inside)
        values = (values / values.sum(axis=0)).astype(np.float32)
        assert_array_equal(restore_classes(values, prepared), restore(values, prepared).argmax(axis=0))


def test_probabilities_beyond_the_prepared_grid_are_background():
    native, small = Grid((6, 6, 6), np.eye(4)), Grid((2, 2, 2), np.diag([1.5, 1.5, 1.5, 1]))
    tumour = np.stack([np.zeros(small.shape), np.ones(small.shape)]).astype(np.float32)
    classes = restore_classes(tumour, (small, native))
    assert classes[0, 0, 0] == 1
    assert classes[5, 5, 5] == 0


def test_the_resampled_brain_of_a_thin_slab_is_refused_where_nothing_is_left_of_it():
    image = np.zeros((20, 20, 20), np.float32)
    image[10, 10, 10] = 1
    with pytest.raises(InputError, match="is 0 everywhere at 5 mm"):
        prepare_case(Case("a", {"t1n": image}, np.eye(4)), None, 5.0)


@pytest.mark.parametrize("cases", ["ssa-2mm", "brats2021-2mm"])
def test_real_patients_return_onto_their_own_grid(real_data, cases):
    folder = recognise(real_data / cases)
    for files in folder.cases[:2]:
        case = read(files)
        prepared = prepare_case(case, folder.scheme)
        classes = prepared.labels.window(Box((0, 0, 0), prepared.grid.shape))
        assert_array_equal(folder.scheme.decode(restore(classes, prepared, order=0)), case.labels)
        for name, boxed in prepared.images.items():
            whole = restore(boxed.window(Box((0, 0, 0), prepared.grid.shape)), prepared).astype(np.float32)
            brain = case.images[name] != 0
            assert not whole[~brain].any()
            image = case.images[name][brain].astype(np.float64)
            # float16 keeps eleven bits
            assert_allclose(whole[brain], (image - image.mean()) / image.std(), rtol=1e-3, atol=1e-4)
