from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmap.core.spread import Moments, chance_gap, modality_gap, spread


def moments_of(rows: NDArray[np.float64]) -> Moments:
    """Of [n C] rows, by the definition."""
    centred = rows - rows.mean(0)
    return Moments(len(rows), rows.mean(0), centred.T @ centred)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30))
def test_moments_of_two_parts_are_those_of_all_rows(seed: int, first: int, second: int) -> None:
    rows = np.random.default_rng(seed).normal(3, 2, size=(first + second, 4))
    joined, whole = moments_of(rows[:first]).joined(moments_of(rows[first:])), moments_of(rows)
    assert joined.n == whole.n
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-10)
    np.testing.assert_allclose(joined.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-50, 50))
def test_spread_is_numpys_and_knows_no_gap(seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(50, 5)) * rng.uniform(0.1, 3, 5)
    found = spread([moments_of(rows)])
    share = np.linalg.eigvalsh(np.cov(rows.T))
    share = share / share.sum()
    assert found["std"] == pytest.approx(rows.std(axis=0).mean())
    assert found["std_min"] == pytest.approx(rows.std(axis=0).min())
    assert found["rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert 1 <= found["rank"] <= 5
    apart = spread([moments_of(scale * rows), moments_of(scale * rows + shift)])  # another sequence, elsewhere
    assert apart["std"] == pytest.approx(scale * found["std"])
    assert apart["rank"] == pytest.approx(found["rank"])


def test_what_does_not_vary_has_no_spread_and_rank_1() -> None:
    assert spread([moments_of(np.full((6, 3), 7.0))]) == {"std": 0.0, "std_min": 0.0, "rank": 1.0}
    dead = np.array([[1.0, 0.0], [-1.0, 0.0]])  # one channel is the same everywhere
    assert spread([moments_of(dead)]) == pytest.approx({"std": 0.5, "std_min": 0.0, "rank": 1.0})


@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(0.1, 10))
def test_gap_is_a_share_that_knows_no_origin_scale_or_rotation(seed: int, shift: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values, names = rng.normal(size=(12, 3)), np.repeat(["a", "b", "c"], 4)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    gap = modality_gap(values, names)
    assert 0 <= gap <= 1
    assert modality_gap(scale * values @ rotation + shift, names) == pytest.approx(gap)


def test_gap_of_separate_points_is_one_of_equal_groups_zero_and_of_a_collapse_undefined() -> None:
    assert modality_gap(np.array([[0.0], [0.0], [1.0], [1.0]]), ["a", "a", "b", "b"]) == 1
    assert modality_gap(np.array([[0.0], [1.0], [0.0], [1.0]]), ["a", "a", "b", "b"]) == 0
    assert np.isnan(modality_gap(np.ones((4, 2)), ["a", "a", "b", "b"]))


def test_chance_level_is_what_meaningless_labels_give() -> None:
    rng = np.random.default_rng(0)
    gaps = [modality_gap(rng.normal(size=(40, 6)), np.repeat(list("abcd"), 10)) for _ in range(200)]
    assert np.mean(gaps) == pytest.approx(chance_gap(list("abcd") * 10), abs=0.005)


def test_of_one_patient_chance_alone_gives_the_whole_gap() -> None:
    assert chance_gap(["a", "b", "c"]) == 1
    assert chance_gap(["a"]) == 0
