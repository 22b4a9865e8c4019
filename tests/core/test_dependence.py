"""Total correlation from tens of subjects: what is found where the truth is known."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import digamma

from medmap.core.dependence import estimate_total_correlation
from medmap.core.joint import total_correlation
from medmap.errors import InputError

pytest.importorskip("sklearn", reason="numbers on latents need the extra study")

Samples = dict[str, NDArray[np.float64]]
NAMES = ("t1n", "t1c", "t2w", "t2f")


def drawn(
    rng: np.random.Generator, subjects: int, shared: float, rank: int = 4, size: int = 4
) -> tuple[Samples, float]:
    """Four modalities of which ``rank`` elements have correlation ``shared``, each in a basis of its own; and TC."""
    common, samples = rng.normal(size=(subjects, rank)), {}
    for name in NAMES:
        own = rng.normal(size=(subjects, size))
        own[:, :rank] = np.sqrt(shared) * common + np.sqrt(1 - shared) * own[:, :rank]
        samples[name] = own @ (rng.normal(size=(size, size)) + 2 * np.eye(size))
    one = (1 - shared) * np.eye(4) + shared
    return samples, rank * total_correlation(one, [1, 1, 1, 1])


def excess(subjects: int, blocks: int, size: int) -> float:
    """What the plain estimate is too large by, on average: from E log det of Wishart matrices (Bartlett)."""
    free = subjects - 1

    def log_det(d: int) -> float:
        return float(digamma((free - np.arange(d)) / 2).sum() + d * np.log(2 / free))

    return 0.5 * (blocks * log_det(size) - log_det(blocks * size))


@pytest.mark.parametrize(("shared", "rank"), [(0.0, 4), (0.5, 1), (0.8, 1), (0.5, 4), (0.8, 2)])
def test_the_truth_is_found_where_the_plain_estimate_is_off_by_two_nats(shared: float, rank: int) -> None:
    rng, found, plain = np.random.default_rng(7), [], []
    for _ in range(12):
        samples, truth = drawn(rng, 32, shared, rank)
        estimate = estimate_total_correlation(samples, draws=20)
        found.append(estimate.nats - truth)
        plain.append(estimate.plain - truth)
        assert estimate.low < truth < estimate.high
    assert np.mean(plain) == pytest.approx(2.1, abs=0.5)
    # one estimate varies by 0.3 … 0.6 nats; the mean of 12 by 0.17 at most
    assert np.mean(found) == pytest.approx(0, abs=3 * 0.17)
    assert np.std(found) < 0.9


def test_the_null_is_what_the_wishart_distribution_says() -> None:
    samples, _ = drawn(np.random.default_rng(0), 32, 0.8)
    estimate = estimate_total_correlation(samples, draws=200)
    assert estimate.null_mean == pytest.approx(excess(32, 4, 4), abs=4 * estimate.null_sd / np.sqrt(200))
    assert excess(40, 4, 4) == pytest.approx(1.5, abs=0.05)  # as the docstring has it


def test_independent_modalities_have_about_none() -> None:
    rng = np.random.default_rng(1)
    for subjects in (24, 60):
        samples, _ = drawn(rng, subjects, 0.0)
        estimate = estimate_total_correlation(samples)
        assert abs(estimate.nats) < 3 * estimate.null_sd
        assert estimate.low < 0 < estimate.high
        assert estimate.p > 0.01
        assert abs(estimate.shrunk) < 0.05


def test_shrinkage_sees_dependence_and_too_little_of_it() -> None:
    samples, truth = drawn(np.random.default_rng(2), 32, 0.8)
    estimate = estimate_total_correlation(samples)
    assert 1 < estimate.shrunk < 0.7 * truth
    assert estimate.p == pytest.approx(1 / 101)


def test_with_fewer_subjects_than_dimensions_shrinkage_alone_remains() -> None:
    samples, _ = drawn(np.random.default_rng(3), 12, 0.9)
    estimate = estimate_total_correlation(samples)
    assert all(np.isnan(x) for x in (estimate.plain, estimate.nats, estimate.low, estimate.high, estimate.p))
    assert estimate.shrunk > 0.5
    fewer = estimate_total_correlation(samples, components=2)
    assert np.isfinite(fewer.nats)
    assert fewer.components == (2, 2, 2, 2)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_each_modality_may_have_its_own_basis_origin_and_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    samples, _ = drawn(rng, 30, 0.5)
    turned = {name: scale * x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] + 5 for name, x in samples.items()}
    one, other = (estimate_total_correlation(x, draws=5).nats for x in (samples, turned))
    assert other == pytest.approx(one, abs=1e-6)


def test_what_has_collapsed_depends_on_nothing() -> None:
    samples, _ = drawn(np.random.default_rng(4), 30, 0.9)
    flat = {name: np.full((30, 4), 3.0, np.float32) for name in NAMES}
    assert estimate_total_correlation(flat, draws=5).nats == 0
    assert estimate_total_correlation(flat, draws=5).components == (0, 0, 0, 0)
    some = estimate_total_correlation(samples | {"t1n": flat["t1n"]}, draws=5)
    assert some.components == (0, 4, 4, 4)
    assert some.nats > 3


def test_the_same_twice_is_without_bound() -> None:
    samples, _ = drawn(np.random.default_rng(5), 30, 0.0)
    estimate = estimate_total_correlation({"t1n": samples["t1n"], "t1c": 2 * samples["t1n"]}, draws=5)
    assert estimate.nats == np.inf
    assert np.isnan(estimate.low)
    assert estimate.p == pytest.approx(1 / 6)
    assert 1 < estimate.shrunk < np.inf


def test_two_scans_of_a_patient_do_not_make_it_surer() -> None:
    samples, _ = drawn(np.random.default_rng(6), 30, 0.6)
    twice = {name: np.repeat(x, 2, axis=0) for name, x in samples.items()}
    patients = np.repeat(np.arange(30), 2).tolist()
    careless = estimate_total_correlation(twice, draws=5)
    careful = estimate_total_correlation(twice, draws=5, patients=patients)
    assert careful.high - careful.low > 1.3 * (careless.high - careless.low)


def test_a_seed_is_a_result() -> None:
    samples, _ = drawn(np.random.default_rng(8), 30, 0.4)
    assert estimate_total_correlation(samples, draws=5) == estimate_total_correlation(samples, draws=5)
    assert estimate_total_correlation(samples, draws=5) != estimate_total_correlation(samples, draws=5, seed=1)


@pytest.mark.parametrize(
    ("samples", "options", "words"),
    [
        ({}, {}, "samples: found none, expected subjects × channels"),
        ({"t1n": np.zeros((5, 2)), "t1c": np.zeros((4, 2))}, {}, r"found t1n \(5, 2\), t1c \(4, 2\)"),
        ({"t1n": np.zeros((2, 2))}, {}, "3 subjects or more"),
        ({"t1n": np.full((5, 2), np.nan)}, {}, "NaN or infinite"),
        ({"t1n": np.zeros((5, 2))}, {"patients": ["a"]}, "found 1 names for 5 subjects"),
        ({"t1n": np.zeros((5, 2))}, {"components": 0}, "expected 1 or more"),
        ({"t1n": np.zeros((5, 2))}, {"draws": 1}, "2 or more"),
    ],
)
def test_what_is_no_sample_is_refused(samples: Samples, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        estimate_total_correlation(samples, **options)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'medmap\[study\]'"):
        estimate_total_correlation({"t1n": np.zeros((5, 2))})
