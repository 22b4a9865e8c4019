"""The closed-form divergence of diagonal Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from medmap.core.gaussian import LEAST_VARIANCE, Gaussian, kl, mixed, moments

means = st.floats(-10, 10)
log_vars = st.floats(-4, 4)


def gaussian(mean: float, log_var: float) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(log_var, dtype=torch.float64))


@pytest.mark.parametrize(
    ("q", "p", "nats"),
    [
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((1.0, 0.0), (0.0, 0.0), 0.5),
        ((0.0, math.log(4)), (0.0, 0.0), 0.5 * (4 - 1 - math.log(4))),
        ((0.0, 0.0), (0.0, math.log(4)), 0.5 * (math.log(4) + 1 / 4 - 1)),
        ((3.0, 0.0), (0.0, math.log(9)), 0.5 * (math.log(9) + 1 / 9 + 1 - 1)),
    ],
)
def test_hand_worked_values(q: tuple[float, float], p: tuple[float, float], nats: float) -> None:
    assert float(kl(gaussian(*q), gaussian(*p))) == pytest.approx(nats, abs=1e-12)


@given(means, log_vars, means, log_vars)
def test_as_torch_distributions_has_it(mq: float, lq: float, mp: float, lp: float) -> None:
    q, p = gaussian(mq, lq), gaussian(mp, lp)
    other = kl_divergence(Normal(q.mean, (q.log_var / 2).exp()), Normal(p.mean, (p.log_var / 2).exp()))
    assert float(kl(q, p)) == pytest.approx(float(other), rel=1e-9, abs=1e-9)


@given(means, log_vars, means, log_vars)
def test_never_negative_and_zero_for_equal_ones(mq: float, lq: float, mp: float, lp: float) -> None:
    q, p = gaussian(mq, lq), gaussian(mp, lp)
    # Rounding of terms up to e^4 · 20² leaves at most 1e-11 below zero.
    assert float(kl(q, p)) >= -1e-11
    assert float(kl(q, q)) == pytest.approx(0, abs=1e-12)


@given(means, log_vars, means, log_vars, means)
def test_a_common_shift_changes_nothing(mq: float, lq: float, mp: float, lp: float, shift: float) -> None:
    moved = kl(gaussian(mq + shift, lq), gaussian(mp + shift, lp))
    assert float(moved) == pytest.approx(float(kl(gaussian(mq, lq), gaussian(mp, lp))), rel=1e-9, abs=1e-9)


def test_for_unit_variances_it_is_half_the_squared_error() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert kl(Gaussian.unit(a), Gaussian.unit(b)).mean() == pytest.approx(0.5 * F.mse_loss(a, b).item(), rel=1e-6)


def test_shapes_broadcast() -> None:
    many, one = Gaussian.unit(torch.randn(2, 4, 3)), Gaussian.unit(torch.randn(2, 1, 3))
    assert kl(many, one).shape == (2, 4, 3)


def test_a_mixture_of_large_means_keeps_its_small_variance() -> None:
    """In float32 the mean of squares minus the squared mean would be 0 or a multiple of 1/16."""
    parts = Gaussian(torch.tensor([1000.0, 1000.01]), torch.tensor([-9.0, -9.0]))
    found = mixed(parts, torch.tensor([0.5, 0.5]), dim=0)
    assert float(found.log_var.exp()) == pytest.approx(math.exp(-9) + 0.005**2, rel=0.02)


@given(st.lists(st.tuples(means, log_vars), min_size=1, max_size=5))
@settings(deadline=None)
def test_moments_of_gaussian_values_are_those_of_their_equal_mixture(parts: list[tuple[float, float]]) -> None:
    mean, log_var = (torch.tensor(column, dtype=torch.float64) for column in zip(*parts, strict=True))
    found = moments(mean, (0,), log_var)
    share = torch.full_like(mean, 1 / len(parts))
    torch.testing.assert_close(torch.stack(found).squeeze(1), torch.stack(mixed(Gaussian(mean, log_var), share, dim=0)))


def test_values_that_do_not_vary_have_the_least_variance_and_no_gradient() -> None:
    values = torch.full((3, 5), 7.0, requires_grad=True)
    found = moments(values, (1,))
    torch.testing.assert_close(found.log_var.exp(), torch.full((3, 1), LEAST_VARIANCE))
    found.log_var.sum().backward()
    assert values.grad is not None
    assert not values.grad.any()
