"""Intervals, paired differences and Holm: closed forms, coverage by simulation, and laws."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind, ttest_rel

from medmap.core.stats import Difference, Interval, bootstrap_interval, holm, paired_difference
from medmap.errors import InputError

NAN = math.nan
scores = st.lists(st.floats(0, 1), min_size=2, max_size=12)
seldom = settings(max_examples=25, deadline=None)


# --- one arm


def test_the_interval_is_that_of_the_full_bootstrap_distribution() -> None:
    values = [0.1, 0.4, 0.5, 0.9]
    every_draw = [np.mean(draw) for draw in product(values, repeat=4)]
    found = bootstrap_interval(values, draws=40_000)
    assert found.mean == pytest.approx(0.475)
    assert (found.low, found.high) == pytest.approx(np.quantile(every_draw, [0.025, 0.975]), abs=0.01)


def test_95_percent_of_the_intervals_hold_the_true_mean() -> None:
    generator = np.random.default_rng(0)
    tables = generator.normal(0.8, 0.1, size=(300, 50))
    intervals = [bootstrap_interval(table, draws=400, seed=i) for i, table in enumerate(tables)]
    held = np.mean([interval.low <= 0.8 <= interval.high for interval in intervals])
    assert 0.91 <= held <= 0.98


def test_scans_of_one_patient_are_no_independent_evidence() -> None:
    generator = np.random.default_rng(1)
    patients = generator.normal(0.8, 0.1, size=30)
    names = np.repeat(np.arange(30), 4).tolist()
    alone, fourfold = bootstrap_interval(patients), bootstrap_interval(np.repeat(patients, 4), clusters=names)
    naive = bootstrap_interval(np.repeat(patients, 4))
    assert fourfold.n == 120
    assert (fourfold.low, fourfold.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.6 * (fourfold.high - fourfold.low)


def test_the_mean_is_over_scans_when_clusters_differ_in_size() -> None:
    found = bootstrap_interval([0.0, 0.0, 0.0, 1.0], clusters=["a", "a", "a", "b"])
    assert found == Interval(mean=0.25, low=0.0, high=1.0, n=4)


def test_undefined_numbers_are_left_out_and_counted() -> None:
    found = bootstrap_interval([0.2, NAN, 0.4, 0.6, NAN])
    assert (found.n, found.undefined) == (3, 2)
    defined = bootstrap_interval([0.2, 0.4, 0.6])
    assert (found.mean, found.low, found.high) == (defined.mean, defined.low, defined.high)
    nothing = bootstrap_interval([NAN, NAN])
    assert (nothing.n, nothing.undefined) == (0, 2)
    assert math.isnan(nothing.mean)


def test_one_patient_has_a_mean_but_no_interval() -> None:
    for found in (bootstrap_interval([0.7]), bootstrap_interval([0.6, 0.8], clusters=["a", "a"])):
        assert found.mean == pytest.approx(0.7)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert bootstrap_interval([]).n == 0


@seldom
@given(scores, st.integers(0, 99))
def test_bounds_enclose_the_middle_and_stay_among_the_values(values: list[float], seed: int) -> None:
    found = bootstrap_interval(values, seed=seed, draws=500)
    slack = 1e-12
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    wider = bootstrap_interval(values, seed=seed, draws=500, level=0.99)
    assert wider.low <= found.low + slack
    assert found.high <= wider.high + slack
    assert found == bootstrap_interval(values, seed=seed, draws=500)


# --- two arms


def runs(patients: int, seeds: int, *, shift: float = 0.0, spread: float = 0.02, seed: int = 0) -> np.ndarray:
    """Patients differ much (shared by all arms), runs differ by ``spread``."""
    of_patient = np.random.default_rng(99).normal(0.7, 0.2, size=(patients, 1))
    return of_patient + shift + np.random.default_rng(seed).normal(0, spread, size=(patients, seeds))


def test_pairing_finds_a_small_shift_under_large_differences_between_patients() -> None:
    found = paired_difference(runs(40, 3, shift=0.03, seed=1), runs(40, 3, seed=2))
    assert found.mean == pytest.approx(0.03, abs=0.01)
    assert 0 < found.low < found.mean < found.high
    assert found.p < 0.01
    assert found.evidence
    assert (found.patients, found.seeds, found.undefined) == (40, (3, 3), 0)


def test_of_patients_who_are_all_alike_it_is_welch_s_test_of_the_runs() -> None:
    first, second = np.array([0.0, 0.3, 0.6]), np.array([0.1, 0.2, 0.9, 1.5])
    found = paired_difference(np.tile(first, (20, 1)), np.tile(second, (20, 1)))
    expected = ttest_ind(first, second, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_of_runs_that_are_all_alike_it_is_student_s_test_of_the_pairs() -> None:
    first, second = runs(12, 1, seed=1), runs(12, 1, shift=0.01, seed=2)
    found = paired_difference(np.repeat(first, 3, axis=1), np.repeat(second, 3, axis=1))
    expected = ttest_rel(first[:, 0], second[:, 0])
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_a_difference_without_any_spread_is_certain() -> None:
    same = np.full((5, 3), 0.5)
    assert paired_difference(same + 0.25, same).p == 0
    assert paired_difference(same, same).p == 1


def test_a_method_does_not_differ_from_itself() -> None:
    found = paired_difference(runs(10, 3), runs(10, 3))
    assert found.mean == 0
    assert found.low <= 0 <= found.high
    assert found.p > 0.5


@pytest.mark.parametrize(("seeds_a", "seeds_b"), [(1, 1), (1, 3), (3, 1)])
def test_one_run_is_not_evidence_and_has_no_interval(seeds_a: int, seeds_b: int) -> None:
    found = paired_difference(runs(20, seeds_a, shift=0.5), runs(20, seeds_b))
    assert found.mean == pytest.approx(0.5, abs=0.05)
    assert [math.isnan(x) for x in (found.low, found.high, found.p)] == [True] * 3
    assert not found.evidence


@pytest.mark.parametrize(("seeds_a", "seeds_b", "evidence"), [(2, 3, False), (2, 2, False), (3, 3, True), (5, 3, True)])
def test_evidence_needs_three_runs_an_arm(seeds_a: int, seeds_b: int, evidence: bool) -> None:
    found = paired_difference(runs(20, seeds_a, seed=1), runs(20, seeds_b, seed=2))
    assert found.low < found.high
    assert 0 < found.p <= 1
    assert found.evidence is evidence


def test_a_patient_is_left_out_of_both_arms_or_of_none() -> None:
    a, b = runs(12, 3, seed=1), runs(12, 3, seed=2)
    a[3, 1] = b[7, 0] = NAN
    whole = np.delete(np.arange(12), [3, 7])
    found, expected = paired_difference(a, b), paired_difference(a[whole], b[whole])
    assert (found.patients, found.undefined) == (10, 2)
    assert (found.mean, found.low, found.high, found.p) == (expected.mean, expected.low, expected.high, expected.p)


def test_one_cluster_gives_no_interval() -> None:
    found = paired_difference(runs(3, 3), runs(3, 3), clusters=["a", "a", "a"])
    assert math.isnan(found.p)
    assert not found.evidence
    empty = paired_difference(np.full((2, 3), NAN), runs(2, 3))
    assert empty.patients == 0
    assert math.isnan(empty.mean)


def test_repeated_scans_do_not_narrow_a_difference() -> None:
    a, b = runs(15, 3, seed=1), runs(15, 3, seed=2)
    names = [name for name in range(15) for _ in range(3)]
    repeated = paired_difference(np.repeat(a, 3, axis=0), np.repeat(b, 3, axis=0), clusters=names)
    once = paired_difference(a, b)
    assert (repeated.low, repeated.high, repeated.p) == pytest.approx((once.low, once.high, once.p))
    assert repeated.patients == 45


@pytest.mark.parametrize(("moved", "between", "within"), [(0.05, 0.02, 0.03), (0.012, 0.01, 0.01), (0.05, 0.002, 0.02)])
def test_false_alarms_are_as_rare_as_p_says(moved: float, between: float, within: float) -> None:
    """Far out, too: Holm's correction reads p where it is small. Whole runs differ more than patients do, or less."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(1500):
        a, b = (generator.normal(0, between, 3) + generator.normal(0, within, (30, 3)) for _ in "ab")
        found.append(paired_difference(a + generator.normal(0, moved, (30, 1)), b).p)
    alarms = [int(np.count_nonzero(np.array(found) < p)) for p in (0.05, 0.005)]
    assert 1500 * 0.02 < alarms[0] < 1500 * 0.065
    assert alarms[1] < 1500 * 0.0125


@seldom
@given(st.integers(2, 8), st.integers(2, 4), st.integers(2, 4), st.integers(0, 999))
def test_mean_changes_its_sign_with_the_arms(patients: int, seeds_a: int, seeds_b: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.random((patients, seeds_a)), generator.random((patients, seeds_b))
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low <= there.high
    shifted = paired_difference(a + 1.0, b + 1.0)
    assert (shifted.mean, shifted.low, shifted.high) == pytest.approx((there.mean, there.low, there.high))


# --- many tests


def test_holm_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0


def test_holm_leaves_tests_that_were_not_made() -> None:
    assert holm([0.02, NAN, 0.03]) == pytest.approx([0.04, NAN, 0.04], nan_ok=True)


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_and_keeps_their_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert np.all(adjusted >= np.array(p))
    assert np.all(adjusted <= np.minimum(1.0, np.array(p) * len(p)) + 1e-15)
    assert np.all(np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order_of_the_tests(p: list[float], random: Any) -> None:
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[i] for i in order]) == pytest.approx(holm(p)[order])


# --- bad input


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(
        InputError, match="arm a has 4 patients, arm b has 5; a paired difference needs the same patients"
    ):
        paired_difference(runs(4, 3), runs(5, 3))
    with pytest.raises(InputError, match=r"a: found an array of shape \(4,\), expected patients × runs"):
        paired_difference(runs(4, 3)[:, 0], runs(4, 3))
    with pytest.raises(InputError, match=r"b: found an array of shape \(4, 0\)"):
        paired_difference(runs(4, 3), runs(4, 3)[:, :0])
    with pytest.raises(InputError, match="values: found 1 infinite numbers; give NaN"):
        bootstrap_interval([0.5, math.inf])
    with pytest.raises(InputError, match="clusters: found 2 names for 3 patients"):
        bootstrap_interval([0.5, 0.6, 0.7], clusters=["a", "b"])
    with pytest.raises(InputError, match="level: found 95"):
        bootstrap_interval([0.5, 0.6], level=95.0)
    with pytest.raises(InputError, match="expected numbers within 0 … 1"):
        holm([0.5, 1.5])


def test_results_are_plain_values() -> None:
    found = paired_difference(runs(4, 3, seed=1), runs(4, 3, seed=2))
    assert [type(x) for x in (found.mean, found.low, found.high, found.p, found.evidence)] == [float] * 4 + [bool]
    assert isinstance(found, Difference)
    assert type(bootstrap_interval([0.1, 0.2]).mean) is float
