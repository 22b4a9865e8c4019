"""Gaussians with full covariance: both sides of the identities that docs/theory.md is about."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.stats import norm
from torch.distributions import MultivariateNormal, kl_divergence

from medmap.core.gaussian import Gaussian, kl, mixed
from medmap.core.joint import (
    FullGaussian,
    full_kl,
    jensen_shannon,
    mixture_kl,
    moment_matched,
    split_kl,
    total_correlation,
)
from medmap.errors import InputError

seeds = st.integers(0, 10_000)


def random_gaussian(rng: np.random.Generator, size: int) -> FullGaussian:
    factor = rng.normal(size=(size, size))
    return FullGaussian(rng.normal(size=size), factor @ factor.T / size + 0.2 * np.eye(size))


def scalar(mean: float, variance: float = 1.0) -> FullGaussian:
    return FullGaussian(np.array([mean]), np.array([[variance]]))


# ---- divergence -------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call of torch.distributions takes its time
@given(seeds, st.integers(1, 6))
def test_as_torch_distributions_has_it(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    q, p = random_gaussian(rng, size), random_gaussian(rng, size)
    q_torch, p_torch = (MultivariateNormal(*map(torch.from_numpy, x)) for x in (q, p))
    assert full_kl(q, p) == pytest.approx(float(kl_divergence(q_torch, p_torch)), rel=1e-9, abs=1e-10)


@given(seeds, st.integers(1, 6))
def test_without_correlation_it_is_the_sum_over_elements(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    means, log_vars = rng.normal(size=(2, size)), rng.normal(size=(2, size))
    q, p = (FullGaussian(m, np.diag(np.exp(v))) for m, v in zip(means, log_vars, strict=True))
    by_element = kl(*(Gaussian(torch.tensor(m), torch.tensor(v)) for m, v in zip(means, log_vars, strict=True)))
    assert full_kl(q, p) == pytest.approx(float(by_element.sum()), rel=1e-10, abs=1e-12)


@given(seeds)
def test_a_change_of_basis_changes_no_divergence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, p = random_gaussian(rng, 4), random_gaussian(rng, 4)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0] * np.array([0.5, 1.0, 2.0, 3.0])
    moved = [FullGaussian(turn @ x.mean + 1, turn @ x.covariance @ turn.T) for x in (q, p)]
    assert full_kl(*moved) == pytest.approx(full_kl(q, p), rel=1e-8, abs=1e-9)


# ---- total correlation ------------------------------------------------------------------------------------------


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_joint_divergence_is_total_correlation_plus_the_single_ones(seed: int, blocks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    q = random_gaussian(rng, sum(blocks))
    split = split_kl(q, blocks, [random_gaussian(rng, size) for size in blocks])
    assert split.joint == pytest.approx(split.dependence + sum(split.each), rel=1e-10, abs=1e-10)
    assert split.dependence >= -1e-12  # so the sum over sequences never exceeds the joint divergence


@given(seeds, st.integers(2, 5))
def test_the_same_with_one_anchor_for_all(seed: int, modalities: int) -> None:
    rng = np.random.default_rng(seed)
    q, p_mix = random_gaussian(rng, 3 * modalities), random_gaussian(rng, 3)
    split = split_kl(q, [3] * modalities, [p_mix] * modalities)
    assert split.joint == pytest.approx(split.dependence + sum(split.each), rel=1e-10, abs=1e-10)


@given(st.floats(-0.99, 0.99))
def test_two_scalars_by_hand(r: float) -> None:
    covariance = np.array([[4.0, 6.0 * r], [6.0 * r, 9.0]])
    assert total_correlation(covariance, [1, 1]) == pytest.approx(-0.5 * math.log(1 - r**2), abs=1e-12)


@given(seeds)
def test_it_is_the_sum_of_mutual_informations_along_a_chain(seed: int) -> None:
    covariance = random_gaussian(np.random.default_rng(seed), 6).covariance
    chained = total_correlation(covariance[:4, :4], [2, 2]) + total_correlation(covariance, [4, 2])
    assert total_correlation(covariance, [2, 2, 2]) == pytest.approx(chained, abs=1e-10)


@given(seeds)
def test_a_change_of_basis_within_blocks_changes_no_total_correlation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    covariance, turn = random_gaussian(rng, 5).covariance, np.eye(5)
    turn[:2, :2], turn[2:, 2:] = rng.normal(size=(2, 2)) + 3 * np.eye(2), rng.normal(size=(3, 3)) + 4 * np.eye(3)
    after = total_correlation(turn @ covariance @ turn.T, [2, 3])
    assert after == pytest.approx(total_correlation(covariance, [2, 3]), abs=1e-9)


def test_independent_blocks_have_none_whatever_is_within_them() -> None:
    covariance = np.zeros((5, 5))
    covariance[:2, :2] = [[1.0, 0.9], [0.9, 1.0]]
    covariance[2:, 2:] = np.eye(3) + 0.5
    assert total_correlation(covariance, [2, 3]) == pytest.approx(0, abs=1e-14)
    assert total_correlation(covariance, [1, 1, 3]) == pytest.approx(-0.5 * math.log(1 - 0.81))


def test_equal_marginals_say_nothing_about_pairing() -> None:
    """What KL = 0 between sequences leaves open: each marginal is the anchor, and the pairs may be anything."""
    anchor = FullGaussian(np.zeros(2), np.eye(2))
    for r in (0.0, 0.5, 0.99):
        covariance = np.block([[np.eye(2), r * np.eye(2)], [r * np.eye(2), np.eye(2)]])
        split = split_kl(FullGaussian(np.zeros(4), covariance), [2, 2], [anchor, anchor])
        assert split.each == pytest.approx((0, 0), abs=1e-12)
        assert split.joint == split.dependence == pytest.approx(-math.log(1 - r**2), abs=1e-12)


# ---- mixtures ---------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 4), st.integers(1, 4))
def test_the_best_gaussian_anchor_has_the_moments_of_the_mixture(seed: int, count: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    parts, q = [random_gaussian(rng, size) for _ in range(count)], random_gaussian(rng, size)
    w = rng.dirichlet(np.ones(count))
    best = moment_matched(parts, w)
    mean_kl = sum(share * full_kl(p, q) for share, p in zip(w, parts, strict=True))
    left_over = sum(share * full_kl(p, best) for share, p in zip(w, parts, strict=True))
    assert mean_kl == pytest.approx(left_over + full_kl(best, q), rel=1e-10, abs=1e-10)
    assert left_over <= mean_kl + 1e-12


def test_moments_of_the_mixture_are_those_that_anchors_use() -> None:
    rng = np.random.default_rng(0)
    means, log_vars, w = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), np.array([0.2, 0.3, 0.5])
    parts = [FullGaussian(m, np.diag(np.exp(v))) for m, v in zip(means, log_vars, strict=True)]
    full = moment_matched(parts, w)
    diagonal = mixed(Gaussian(torch.tensor(means), torch.tensor(log_vars)), torch.tensor(w)[:, None], dim=0)
    np.testing.assert_allclose(full.mean, diagonal.mean)
    np.testing.assert_allclose(np.diag(full.covariance), diagonal.log_var.exp())


@pytest.mark.parametrize("size", [1, 3, 8])
def test_mean_divergence_is_spread_of_the_parts_plus_divergence_of_the_mixture(size: int) -> None:
    rng = np.random.default_rng(size)
    parts, q, w = [random_gaussian(rng, size) for _ in range(3)], random_gaussian(rng, size), [0.5, 0.3, 0.2]
    closed = sum(share * full_kl(p, q) for share, p in zip(w, parts, strict=True))
    spread, rest = jensen_shannon(parts, w, seed=1), mixture_kl(parts, w, q, seed=2)
    error = math.hypot(spread.error, rest.error)
    assert error < 0.02 * closed
    assert abs(spread.value + rest.value - closed) < 4 * error


def entropy_of_mixture(parts: list[FullGaussian], w: list[float]) -> float:
    def density(x: float) -> float:
        sds = [math.sqrt(p.covariance[0, 0]) for p in parts]
        return float(sum(v * norm.pdf(x, p.mean[0], s) for v, p, s in zip(w, parts, sds, strict=True)))

    return quad(lambda x: -density(x) * math.log(density(x)), -20, 20, limit=200)[0]


def test_spread_on_a_line_is_what_integration_gives() -> None:
    parts, w = [scalar(0.0), scalar(2.0, 0.5), scalar(-1.0, 3.0)], [0.5, 0.3, 0.2]
    entropies = [0.5 * math.log(2 * math.pi * math.e * p.covariance[0, 0]) for p in parts]
    exact = entropy_of_mixture(parts, w) - sum(v * h for v, h in zip(w, entropies, strict=True))
    found = jensen_shannon(parts, w)
    assert abs(found.value - exact) < 4 * found.error
    assert found.error < 0.01


def test_spread_is_zero_for_one_distribution_and_the_entropy_of_the_weights_for_distant_ones() -> None:
    same, w = [scalar(1.0)] * 3, [0.5, 0.3, 0.2]
    assert jensen_shannon(same, w).value == pytest.approx(0, abs=1e-12)
    apart = jensen_shannon([scalar(0.0), scalar(1e3), scalar(-1e3)], w).value
    assert apart == pytest.approx(-sum(v * math.log(v) for v in w), abs=1e-9)


# ---- wrong input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covariance", "blocks", "words"),
    [
        (np.ones((2, 2)), [1, 1], "positive definite"),
        (np.diag([1.0, -1.0]), [1, 1], "smallest eigenvalue of -1, expected a positive definite"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), [1, 1], "not symmetric"),
        (np.full((2, 2), np.nan), [1, 1], "square matrix of finite numbers"),
        (np.ones((2, 3)), [1, 1], r"shape \(2, 3\), expected a square matrix"),
        (np.eye(3), [1, 1], r"blocks: found sizes \[1, 1\], expected sizes of 1 or more that sum to 3"),
        (np.eye(3), [3, 0], r"blocks: found sizes \[3, 0\]"),
        (np.eye(3), [], r"blocks: found sizes \[\]"),
    ],
)
def test_what_is_no_covariance_of_these_blocks_is_refused(
    covariance: NDArray[np.float64], blocks: list[int], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        total_correlation(covariance, blocks)


def test_what_does_not_fit_together_is_refused() -> None:
    one, two = scalar(0.0), FullGaussian(np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match="expected the same number D"):
        full_kl(one, two)
    with pytest.raises(InputError, match="anchors: found 1, expected one for each of the 2 blocks"):
        split_kl(two, [1, 1], [one])
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0]):
        with pytest.raises(InputError, match=r"weights: found .* expected 2 numbers of 0 or more that sum to 1"):
            jensen_shannon([one, one], weights)
