"""A temperature a kind of answer: what it does to probabilities, whether it is found, and what is measured of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_up_scores import made_up_voxels

from medmap.core.conformal import PRIOR_PATIENTS
from medmap.core.temperature import (
    BINS,
    DOUBTFUL,
    TRIED,
    Temperatures,
    Voxels,
    calibration_error,
    drawn,
    each_left_out,
    fit_temperatures,
    losses,
    reading,
    tally,
    tempered,
)

WHOLE = {"all": (1, 2, 3)}


@given(arrays(np.float32, (4, 7), elements=st.floats(-30, 30, width=32)), st.floats(0.25, 8))
def test_what_was_likeliest_stays_so_and_probabilities_sum_to_one(logits: np.ndarray, temperature: float) -> None:
    p = np.exp(logits - logits.max(axis=0))
    p /= p.sum(axis=0)
    q = tempered(p, temperature)
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.sum(axis=0), 1, rtol=1e-5)
    likeliest = q[p.argmax(axis=0), np.arange(p.shape[1])]
    np.testing.assert_allclose(likeliest, q.max(axis=0), rtol=1e-5)  # two that were equal may be apart by rounding


def test_of_one_network_it_divides_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=0)  # noqa: E731
    np.testing.assert_allclose(tempered(softmax(logits), 1.7), softmax(logits / 1.7), rtol=1e-4)


def test_beyond_the_grid_where_no_class_has_any_it_stays_so() -> None:
    p = np.array([[0.9, 0.0], [0.1, 0.0]], np.float32)
    assert tempered(p, 2.0)[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("right", [0.5, 1.0, 1.6, 3.0])
def test_the_right_temperature_is_found(right: float) -> None:
    """Truth is drawn from the probabilities that the right temperature gives."""
    found = fit_temperatures(losses(made_up_voxels(right, patients=6, kinds=("t1c", "t2f"), voxels=5000)))
    assert found.common == pytest.approx(right, rel=0.05)
    assert found.of == {"t1c": pytest.approx(right, rel=0.07), "t2f": pytest.approx(right, rel=0.07)}


def test_a_kind_of_few_patients_is_drawn_to_all_the_others() -> None:
    usual = made_up_voxels(1.0, patients=12, kinds=("t2f",))
    alone = [voxels._replace(kind="t1c") for voxels in made_up_voxels(4.0, patients=1, kinds=("t1c",))]
    many = [voxels._replace(kind="t1c") for voxels in made_up_voxels(4.0, patients=12, kinds=("t1c",))]
    few, often = (fit_temperatures(losses([*usual, *more])).of["t1c"] for more in (alone, many))
    assert 1.0 < few < 2.2 < 2.5 < often < 4.1
    assert fit_temperatures(losses(usual), ["t2f", "t1n"]).of["t1n"] == pytest.approx(1.0, rel=0.05)


def test_two_scans_of_a_patient_count_as_one() -> None:
    ann, bob = made_up_voxels(1.0, patients=2, kinds=("t2f",))
    once, twice = losses([ann, bob]), losses([ann, bob, ann])
    np.testing.assert_allclose(once.values, twice.values)
    assert twice.patients.tolist() == [ann.patient, bob.patient]


def test_the_shrunken_loss_by_hand() -> None:
    found = losses(made_up_voxels(1.3, patients=3, kinds=("t1c", "t2f"), voxels=300))
    own = found.values[found.kinds == "t1c"].sum(axis=0) + PRIOR_PATIENTS * found.values.mean(axis=0)
    nearest = TRIED[own.argmin()]
    assert nearest / 2**0.125 < fit_temperatures(found).of["t1c"] < nearest * 2**0.125


def test_an_answer_that_is_never_wrong_is_made_as_sure_as_may_be() -> None:
    p = np.full((2, 40, 1, 1), 0.4, np.float32)
    p[1] = 0.6
    always = drawn("ann", "t2f", p, np.ones((40, 1, 1), np.uint8), 40)
    assert fit_temperatures(losses([always])).of["t2f"] == pytest.approx(TRIED[0])


def test_voxels_are_drawn_without_preference_and_the_same_each_time() -> None:
    p = np.random.default_rng(1).dirichlet(np.ones(4), (20, 20, 20)).astype(np.float32)
    p, truth = np.moveaxis(p, -1, 0), (np.arange(8000) % 4).astype(np.uint8).reshape(20, 20, 20)
    one, again = (drawn("ann", "t2f", p, truth, 2000) for _ in range(2))
    assert one.log_p.shape == (4, 2000)
    assert np.array_equal(one.log_p, again.log_p)
    assert np.bincount(one.truth).min() > 440
    assert drawn("ann", "t2f", p, truth, 9000).log_p.shape == (4, 8000)
    np.testing.assert_allclose(np.exp(one.log_p.astype(np.float32)).sum(axis=0), 1, atol=5e-3)


def test_a_patient_is_read_with_the_temperatures_of_the_others() -> None:
    some = made_up_voxels(1.0, patients=4, kinds=("t2f",))
    odd = [voxels._replace(patient="odd") for voxels in made_up_voxels(6.0, patients=1, kinds=("t2f",))]
    found = losses([*some, *odd])
    parts = list(each_left_out(found))
    assert sorted(name for out, _ in parts for name in out) == sorted(set(found.patients))
    ((_, without),) = [part for part in parts if "odd" in part[0]]
    assert without.common == pytest.approx(1.0, rel=0.05)
    assert without == fit_temperatures(losses(some))


def test_tempering_calibrates_whom_nobody_looked_at() -> None:
    answers = made_up_voxels(2.0, patients=12, kinds=("t2f",))
    found = losses(answers)
    read = reading(answers, found, WHOLE, each_left_out(found))
    assert len(read.losses) == 12
    assert all(after < before for before, after in read.losses.values())
    for tallies in (read.tallies, read.doubtful):
        before, after = (calibration_error(tallied) for tallied in tallies["all"])
        assert after < 0.02 < 0.04 < before
    assert read.tallies["all"][0][0].sum() == 12 * 2000


def test_with_a_temperature_of_one_nothing_changes() -> None:
    answers = made_up_voxels(1.4, patients=3, kinds=("t2f",))
    read = reading(answers, losses(answers), WHOLE, [({v.patient for v in answers}, Temperatures(1.0, {"t2f": 1.0}))])
    before, after = read.tallies["all"]
    np.testing.assert_allclose(before[1:], after[1:], rtol=0.01)
    assert all(before == pytest.approx(after) for before, after in read.losses.values())


def test_doubtful_voxels_are_those_that_the_network_gives_more_than_a_hundredth() -> None:
    log_p = np.log(np.array([[0.995, 0.9, 0.5], [0.005, 0.1, 0.5]])).astype(np.float16)
    answers = [Voxels(name, "t2f", log_p, np.array([0, 0, 1], np.uint8)) for name in ("ann", "bob")]
    assert DOUBTFUL == 0.01
    read = reading(answers, losses(answers), {"WT": (1,)}, [({"ann", "bob"}, Temperatures(2.0, {"t2f": 2.0}))])
    plain, cooled = read.doubtful["WT"]
    assert plain[0].sum() == cooled[0].sum() == 4
    assert read.tallies["WT"][0][0].sum() == 6
    assert cooled[1][2] == pytest.approx(2 * 0.25, abs=1e-3)  # √0.1 / (√0.1 + √0.9), in the third bin


def test_the_calibration_error_by_hand() -> None:
    p = np.array([0.05, 0.05, 0.95, 0.95, 1.0], np.float32)
    tallied = tally(p, np.array([False, True, True, True, True]))
    assert tallied.shape == (3, BINS)
    assert calibration_error(tallied) == pytest.approx((2 * 0.45 + 0.1) / 5, abs=1e-6)
    assert np.isnan(calibration_error(tally(p[:0], np.zeros(0, bool))))
