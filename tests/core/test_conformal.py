"""Prediction with an interval over patients: closed forms, coverage by simulation, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmap.core.conformal import (
    LEAST_SPREAD,
    PRIOR_PATIENTS,
    Rows,
    conformal,
    fit,
    left_out,
    others_mean,
    quantile,
    scores,
    tried,
)

KINDS = ("t1c", "t2f", "t1c+t2f")


def made_up(seed: int, patients: int = 20, per_kind: int = 1) -> Rows:
    """y = 0.2 + 0.7 x + 0.05 k + noise of the patient + noise of the row, with twice the noise for the last kind."""
    generator = np.random.default_rng(seed)
    names, kinds, features, truth = [], [], [], []
    for patient in range(patients):
        own = generator.normal(0, 0.05)
        for number, kind in enumerate(KINDS * per_kind):
            x = generator.uniform(0.3, 1.0)
            noise = own + generator.normal(0, 0.03 * (2 if kind == KINDS[-1] else 1))
            names.append(f"p{patient}")
            kinds.append(kind)
            features.append([x, np.nan if kind == "t1c" else x])
            truth.append(0.2 + 0.7 * x + 0.05 * (number % len(KINDS)) + noise)
    return Rows(np.array(names), np.array(kinds), np.array(features), np.array(truth))


# ---- the fit


def test_without_features_a_kind_is_shrunken_towards_all() -> None:
    """a is the mean of both kinds, d the mean of n residuals ± 0.2 and m zeros."""
    n = 6
    rows = Rows(
        np.array([f"p{i}" for i in range(n)] * 2),
        np.repeat(["low", "high"], n),
        np.full((2 * n, 1), np.nan),
        np.repeat([0.4, 0.8], n),
    )
    found = fit(rows)
    expected = 0.2 * n / (n + PRIOR_PATIENTS)
    assert found.intercept == pytest.approx(0.6)
    assert found.deviations == {"low": pytest.approx(-expected), "high": pytest.approx(expected)}
    assert found.slopes == (0.0,)
    assert found.spread(["low"])[0] == pytest.approx(0.2 - expected)


def test_two_scans_of_a_patient_count_as_one() -> None:
    rows = made_up(0)
    twice = np.concatenate([np.arange(len(rows.truth)), np.flatnonzero(rows.patients == "p3")])
    doubled = Rows(*(column[twice] for column in rows))
    centred = rows._replace(features=rows.features * np.nan)  # with features, their centre would move
    assert fit(doubled._replace(features=doubled.features * np.nan)).deviations == pytest.approx(
        fit(centred).deviations
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), falling=st.booleans())
def test_a_higher_feature_never_predicts_less(seed: int, falling: bool) -> None:
    rows = made_up(seed, patients=6)
    if falling:  # data that speak against the feature
        rows = rows._replace(truth=1 - rows.truth)
    found = fit(rows)
    assert min(found.slopes) >= 0
    more = found.predict(rows.features + 0.1, rows.kinds) - found.predict(rows.features, rows.kinds)
    assert more.min() >= -1e-12
    assert (more.max() > 0.01) is not falling


def test_what_a_fit_meets_exactly_still_has_a_spread() -> None:
    rows = Rows(np.array(list("abc")), np.array(["k"] * 3), np.zeros((3, 1)), np.full(3, 0.5))
    assert fit(rows).spread(["k"])[0] == LEAST_SPREAD


def test_two_features_that_say_the_same_are_no_trouble() -> None:
    rows = made_up(1)
    both = rows._replace(features=np.repeat(rows.features[:, :1], 2, axis=1))
    one = fit(rows._replace(features=rows.features[:, :1]))
    assert sum(fit(both).slopes) == pytest.approx(one.slopes[0], abs=1e-4)


# ---- the quantile


def test_the_quantile_is_that_of_one_patient_more() -> None:
    values = np.arange(1.0, 17.0)
    names = [f"p{i}" for i in range(16)]
    assert quantile(values, names, 0.8) == 14  # 14/17 is the first ≥ 0.8
    assert quantile(values, names, 0.94) == 16
    assert quantile(values, names, 0.95) == np.inf


def test_a_patient_with_many_rows_has_no_more_to_say() -> None:
    values = np.array([1.0, 2.0, 3.0, *[9.0] * 50])
    assert quantile(values, ["a", "b", "c", *["d"] * 50], 0.6) == 3  # 3/5
    assert quantile(values, ["a", "b", "c", *["d"] * 50], 0.61) == 9


# ---- leaving patients out


@pytest.mark.parametrize("patients", [7, 20, 33])
def test_every_patient_is_left_out_once_and_is_never_on_both_sides(
    patients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, fitted = made_up(0, patients, per_kind=2), []
    monkeypatch.setattr("medmap.core.conformal.fit", lambda rest, kinds: fitted.append(set(rest.patients)))
    outside = [out for out, _ in left_out(rows)]
    assert np.array_equal(np.sum(outside, axis=0), np.ones(len(rows.truth)))
    for out, inside in zip(outside, fitted, strict=True):
        assert inside.isdisjoint(rows.patients[out])
        assert inside | set(rows.patients[out]) == set(rows.patients)


def test_what_is_said_of_a_patient_does_not_depend_on_what_the_patient_had() -> None:
    rows = made_up(2)
    own = rows.patients == "p5"
    before, after = tried(rows, 0.8), tried(rows._replace(truth=np.where(own, 0.0, rows.truth)), 0.8)
    assert np.array_equal(before.predicted[own], after.predicted[own])
    assert np.array_equal(before.reach[own], after.reach[own])
    assert not np.array_equal(before.predicted[~own], after.predicted[~own])


def test_the_mean_of_the_others_leaves_the_patient_out() -> None:
    rows = Rows(np.array(["a", "a", "b", "c"]), np.array(["k", "k", "k", "l"]), np.zeros((4, 1)), np.arange(4.0))
    assert others_mean(rows)[:3].tolist() == [2.0, 2.0, 0.5]
    assert np.isnan(others_mean(rows)[3])


@pytest.mark.parametrize(("level", "patients"), [(0.8, 12), (0.8, 25), (0.9, 16)])
def test_intervals_hold_for_new_patients(level: float, patients: int) -> None:
    """As often as promised, over draws of the patients and of one new row."""
    held = []
    for seed in range(150):
        rows, new = made_up(seed, patients), made_up(10_000 + seed, 4)
        fitted, reach = conformal(rows, level)
        misses = np.abs(new.truth - fitted.predict(new.features, new.kinds))
        held.append(np.mean(misses <= reach * fitted.spread(new.kinds)))
    assert level - 0.03 <= np.mean(held) <= level + 0.09  # the quantile of few patients is a step of 1/(K + 1) too high


def test_the_coverage_that_is_measured_is_the_coverage_there_is() -> None:
    measured = []
    for seed in range(20):
        rows = made_up(seed, 16)
        found = tried(rows, 0.8)
        measured.append(np.mean(np.abs(rows.truth - found.predicted) <= found.reach))
    assert 0.77 <= np.mean(measured) <= 0.89


def test_scores_are_residuals_in_spreads() -> None:
    rows = made_up(3)
    out = rows.patients == "p0"
    without = fit(rows.where(~out))
    expected = np.abs(rows.truth[out] - without.predict(rows.features[out], rows.kinds[out]))
    assert scores(rows)[out] == pytest.approx(expected / without.spread(rows.kinds[out]))
