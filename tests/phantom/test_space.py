"""Lattices, random fields and linear maps along axes, against closed forms and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmap.phantom.space import (
    Lattice,
    along_axes,
    gaussian_matrix,
    onto,
    per_patient,
    sample,
    smooth_field,
)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _random(lattice: Lattice, seed: int = 0, channels: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((len(lattice.start_mm), channels, *lattice.shape), generator=generator)


@pytest.mark.parametrize(("shape", "spacing_mm"), [((40, 48, 40), 4.0), ((5, 6, 7), 1.5)])
def test_a_centred_lattice_has_its_middle_at_the_origin(shape: tuple[int, int, int], spacing_mm: float) -> None:
    lattice = Lattice.centred(shape, spacing_mm)
    points = lattice.points()
    assert points.shape == (1, 3, *shape)
    assert points.mean(dim=(2, 3, 4)).abs().max() < 1e-4
    for axis in range(3):
        assert torch.allclose(points.diff(dim=axis + 2)[:, axis], torch.tensor(spacing_mm))
        assert points.diff(dim=axis + 2)[:, (axis + 1) % 3].abs().max() == 0


def test_each_patient_may_have_a_lattice_of_his_own() -> None:
    starts = torch.tensor([[0.0, 0.0, 0.0], [10.0, -20.0, 30.0]])
    points = Lattice(starts, 2.0, (3, 4, 5)).points()
    torch.testing.assert_close(points[1] - points[0], starts[1][:, None, None, None].expand(3, 3, 4, 5))
    torch.testing.assert_close(points[1, :, -1, -1, -1], torch.tensor([14.0, -14.0, 38.0]))


@pytest.mark.parametrize("scale_mm", [6.0, 25.0])
def test_a_field_has_variance_about_one_and_is_smooth(scale_mm: float) -> None:
    field = smooth_field(Lattice.centred((20, 24, 20), 8.0), scale_mm, [_rng(seed) for seed in range(6)])
    assert field.var().item() == pytest.approx(1, rel=0.2)
    assert field.mean().item() == pytest.approx(0, abs=0.15)
    line = smooth_field(Lattice.centred((50, 5, 5), 1.0), scale_mm, [_rng(0)])
    assert line.diff(dim=2).abs().max() < 3.5 / scale_mm


def test_a_field_belongs_to_space_not_to_the_lattice() -> None:
    fine = smooth_field(Lattice.centred((41, 41, 41), 1.0), 12.0, [_rng(5)])
    coarse = smooth_field(Lattice.centred((21, 21, 21), 2.0), 12.0, [_rng(5)])
    torch.testing.assert_close(fine[..., ::2, ::2, ::2], coarse, atol=1e-4, rtol=0)
    corner = Lattice(torch.tensor([[-20.0, -20.0, -20.0]]), 1.0, (7, 8, 9))
    torch.testing.assert_close(smooth_field(corner, 12.0, [_rng(5)]), fine[..., :7, :8, :9], atol=1e-4, rtol=0)


def test_a_field_does_not_depend_on_who_else_is_in_the_batch() -> None:
    lattice = Lattice.centred((6, 7, 8), 5.0)
    both = smooth_field(lattice, 12.0, [_rng(1), _rng(2)], channels=2)
    for row, seed in enumerate((1, 2)):
        torch.testing.assert_close(both[row : row + 1], smooth_field(lattice, 12.0, [_rng(seed)], channels=2))
    assert both.shape == (2, 2, 6, 7, 8)


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.floats(-4, 4)] * 3), st.tuples(*[st.floats(-3, 3)] * 4))
def test_sampling_reproduces_linear_functions(where: tuple[float, ...], slopes: tuple[float, ...]) -> None:
    lattice = Lattice.centred((5, 6, 7), 2.0)
    *slope, height = slopes
    values = height + sum(s * lattice.points()[:, axis] for axis, s in enumerate(slope))
    found = sample(values[:, None], lattice, torch.tensor(where).reshape(1, 3, 1, 1, 1))
    assert found.item() == pytest.approx(height + float(np.dot(slope, where)), abs=1e-4)


def test_sampling_is_what_scipy_does_and_beyond_the_border_the_border_goes_on() -> None:
    lattice = Lattice.centred((5, 6, 7), 2.0)
    values = _random(lattice)
    points = 8 * torch.randn((1, 3, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    index = ((points - lattice.start_mm[:, :, None, None, None]) / 2.0)[0].numpy()
    expected = [ndimage.map_coordinates(channel, index, order=1, mode="nearest") for channel in values[0].numpy()]
    np.testing.assert_allclose(sample(values, lattice, points)[0], expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.7, 5.0), st.tuples(*[st.floats(-15, 10)] * 6))
def test_onto_is_sampling_along_the_axes(seed: int, spacing_mm: float, starts: tuple[float, ...]) -> None:
    lattice = Lattice.centred((5, 6, 7), 2.0)
    other = Lattice(torch.tensor(starts).reshape(2, 3), spacing_mm, (3, 6, 4))  # may reach beyond the border
    values = _random(lattice, seed)
    torch.testing.assert_close(onto(values, lattice, other), sample(values, lattice, other.points()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_maps_along_axes_are_one_sum(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn((*batch, 4, 5, 6), generator=generator)
    a, b, c = (torch.randn((n, m), generator=generator) for n, m in ((2, 4), (5, 5), (3, 6)))
    expected = torch.einsum("xi,yj,zk,...ijk->...xyz", a, b, c, volumes)
    torch.testing.assert_close(along_axes(volumes, [a, b, c]), expected)


def test_each_patient_may_have_maps_of_his_own() -> None:
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn((2, 3, 4, 5, 6), generator=generator)
    a, b, c = (torch.randn((2, 1, n, m), generator=generator) for n, m in ((2, 4), (5, 5), (3, 6)))
    expected = torch.einsum("pxi,pyj,pzk,pcijk->pcxyz", a[:, 0], b[:, 0], c[:, 0], volumes)
    torch.testing.assert_close(along_axes(volumes, [a, b, c]), expected)


def test_a_gaussian_matrix_is_a_gaussian_blur() -> None:
    line = np.random.default_rng(0).standard_normal(60)
    blurred = gaussian_matrix(60, 1.5).numpy() @ line
    np.testing.assert_allclose(blurred[10:-10], ndimage.gaussian_filter1d(line, 1.5, truncate=6)[10:-10], atol=1e-5)
    torch.testing.assert_close(gaussian_matrix(60, 1.5).sum(dim=1), torch.ones(60))
    torch.testing.assert_close(gaussian_matrix(5, 0.0), torch.eye(5))


def test_numbers_of_patients_stand_along_the_batch() -> None:
    like = torch.zeros(1)
    assert per_patient([1.0, 2.0], like).shape == (2, 1, 1, 1, 1)
    each = per_patient([(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)], like)
    assert each.shape == (2, 3, 1, 1, 1)
    assert each[1, :, 0, 0, 0].tolist() == [4.0, 5.0, 6.0]
