"""A case is checked when it is made; the error names case, sequence, what was found and what to do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from medmap.core.case import Case, Grid
from medmap.errors import InputError


def volume(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_whole_case() -> None:
    affine = np.array([[0, -2.0, 0, 9], [1.0, 0, 0, -5], [0, 0, 3.0, 4], [0, 0, 0, 1]])
    case = Case("P1", {"t1c": volume(4, 5, 6)}, affine, np.zeros((4, 5, 6), np.uint8))
    assert case.grid.shape == (4, 5, 6)
    assert case.grid.spacing_mm == (1.0, 2.0, 3.0)
    with pytest.raises(dataclasses.FrozenInstanceError, match="id"):
        case.id = "P2"  # type: ignore[misc]


def test_no_image_at_all() -> None:
    with pytest.raises(InputError, match="case P1: no image at all"):
        Case("P1", {}, np.eye(4), np.zeros((2, 2, 2), np.uint8))


def test_four_dimensions() -> None:
    with pytest.raises(InputError, match=r"case P1: t2f has 4 dimensions \(2, 2, 2, 3\); a 3-D volume"):
        Case("P1", {"t1c": volume(2, 2, 2), "t2f": volume(2, 2, 2, 3)}, np.eye(4))


def test_unequal_grids_name_both_sides_and_the_cure() -> None:
    with pytest.raises(InputError, match=r"t2f is \(2, 2, 3\) voxels, t1c is \(2, 2, 2\).*--resample"):
        Case("P1", {"t1c": volume(2, 2, 2), "t2f": volume(2, 2, 3)}, np.eye(4))
    with pytest.raises(InputError, match=r"seg is \(3, 2, 2\) voxels, t1c is \(2, 2, 2\)"):
        Case("P1", {"t1c": volume(2, 2, 2)}, np.eye(4), volume(3, 2, 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted(bad: float) -> None:
    image = volume(2, 2, 2)
    image[0, 0] = bad
    with pytest.raises(InputError, match="case P1: t1c holds 2 voxels that are NaN or infinite"):
        Case("P1", {"t1c": image}, np.eye(4))


def test_an_affine_without_inverse() -> None:
    with pytest.raises(InputError, match="the affine has no inverse"):
        Case("P1", {"t1c": volume(2, 2, 2)}, np.diag([1.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize("where", [(0, 0), (1, 3)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_affine_that_is_not_finite(where: tuple[int, int], bad: float) -> None:
    affine = np.eye(4)
    affine[where] = bad
    with pytest.raises(InputError, match="4×4 matrix of finite numbers"):
        Case("P1", {"t1c": volume(2, 2, 2)}, affine)


def test_an_affine_of_another_shape() -> None:
    with pytest.raises(InputError, match="4×4 matrix"):
        Case("P1", {"t1c": volume(2, 2, 2)}, np.eye(3))


@pytest.mark.parametrize(("difference_mm", "same"), [(0.0, True), (0.9e-3, True), (1.1e-3, False)])
def test_grids_match_within_a_micrometre(difference_mm: float, same: bool) -> None:
    moved = np.eye(4)
    moved[1, 3] += difference_mm
    assert Grid((2, 2, 2), np.eye(4)).matches(Grid((2, 2, 2), moved)) is same
    assert not Grid((2, 2, 2), np.eye(4)).matches(Grid((2, 2, 3), np.eye(4)))
