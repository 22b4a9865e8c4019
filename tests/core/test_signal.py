"""Signal equations against closed forms and special values; noise and bias against their statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmap.core.signal import (
    TISSUES,
    bias_field,
    enhanced_t1,
    inversion_recovery,
    null_inversion_time,
    rician,
    spin_echo,
    spoiled_gradient_echo,
)
from medmap.errors import InputError

SECONDS = st.floats(0.05, 5.0)


def test_spin_echo_without_decay_is_saturation_recovery() -> None:
    # TR = T1 ln 2 recovers one half
    assert spin_echo(0.8, 1.2, 0.1, 1.2 * np.log(2), 0.0) == pytest.approx(0.4)


def test_spin_echo_halves_after_t2_ln_2() -> None:
    full = spin_echo(1.0, 1.0, 0.1, 3.0, 0.0)
    assert spin_echo(1.0, 1.0, 0.1, 3.0, 0.1 * np.log(2)) == pytest.approx(full / 2)


def test_spoiled_gradient_echo_at_zero_flip_is_nothing() -> None:
    assert spoiled_gradient_echo(1.0, 1.0, 0.05, 0.02, 0.0, 0.0) == 0


def test_spoiled_gradient_echo_at_a_right_angle_is_a_spin_echo() -> None:
    assert spoiled_gradient_echo(0.7, 0.9, 0.08, 0.5, 0.01, np.pi / 2) == pytest.approx(
        spin_echo(0.7, 0.9, 0.08, 0.5, 0.01)
    )


@given(t1_s=SECONDS, tr_s=st.floats(0.005, 0.5))
def test_spoiled_gradient_echo_at_the_ernst_angle_has_its_closed_form(t1_s: float, tr_s: float) -> None:
    e1 = np.exp(-tr_s / t1_s)
    ernst = np.arccos(e1)
    best = spoiled_gradient_echo(1.0, t1_s, 0.05, tr_s, 0.0, ernst)
    assert best == pytest.approx(np.sqrt((1 - e1) / (1 + e1)))
    for flip_rad in (0.9 * ernst, 1.1 * ernst):
        assert spoiled_gradient_echo(1.0, t1_s, 0.05, tr_s, 0.0, flip_rad) < best


@given(t1_s=SECONDS, tr_s=st.floats(0.5, 12.0))
def test_inversion_recovery_vanishes_at_the_null_point(t1_s: float, tr_s: float) -> None:
    ti_s = null_inversion_time(t1_s, tr_s)
    assert 0 < ti_s < tr_s
    assert abs(inversion_recovery(1.0, t1_s, 0.1, tr_s, 0.0, ti_s)) < 1e-12


def test_inversion_recovery_is_signed_and_begins_at_minus_one() -> None:
    assert inversion_recovery(1.0, 1.0, 0.1, 1e3, 0.0, 0.0) == pytest.approx(-1)
    assert inversion_recovery(1.0, 1.0, 0.1, 1e3, 0.0, 1e2) == pytest.approx(1)


@given(t1_s=SECONDS, concentration=st.floats(0, 2), relaxivity=st.floats(1, 10))
def test_relaxation_rates_of_contrast_agent_add(t1_s: float, concentration: float, relaxivity: float) -> None:
    after = enhanced_t1(t1_s, concentration, relaxivity)
    assert 1 / after - 1 / t1_s == pytest.approx(relaxivity * concentration)
    assert enhanced_t1(t1_s, 0.0, relaxivity) == pytest.approx(t1_s)


def test_equations_broadcast() -> None:
    t1_s = np.array([0.8, 1.3])
    ti_s = np.array([[0.1], [0.2], [0.3]])
    table = inversion_recovery(1.0, t1_s, 0.1, 9.0, 0.1, ti_s)
    assert table.shape == (3, 2)
    assert table[2, 1] == inversion_recovery(1.0, 1.3, 0.1, 9.0, 0.1, 0.3)


def test_flair_of_the_tissue_table_darkens_fluid_and_brightens_oedema() -> None:
    ti_s = null_inversion_time(TISSUES["csf"].t1_s, 9.0)
    bright = {
        name: abs(inversion_recovery(tissue.pd, tissue.t1_s, tissue.t2_s, 9.0, 0.12, ti_s))
        for name, tissue in TISSUES.items()
    }
    assert bright["csf"] < 0.01 < bright["white"] < bright["grey"] < bright["oedema"]


def test_noise_far_above_its_level_has_the_spread_asked_for() -> None:
    noisy = rician(np.full((40, 40, 40), 100.0), 3.0, np.random.default_rng(0))
    # 64 000 voxels: the standard error of the spread is 0.3 %
    assert noisy.std() == pytest.approx(3.0, rel=0.02)
    assert noisy.mean() == pytest.approx(np.sqrt(100**2 + 3**2), rel=1e-3)


def test_noise_alone_is_rayleigh() -> None:
    noise = rician(np.zeros(200_000), 2.0, np.random.default_rng(1))
    assert noise.mean() == pytest.approx(2.0 * np.sqrt(np.pi / 2), rel=0.01)
    assert noise.std() == pytest.approx(2.0 * np.sqrt(2 - np.pi / 2), rel=0.01)


def test_noise_keeps_single_precision_and_takes_the_magnitude() -> None:
    quiet = rician(np.array([-1.5, 2.0], np.float32), 0.0, np.random.default_rng(0))
    assert quiet.dtype == np.float32
    assert quiet.tolist() == [1.5, 2.0]


@pytest.mark.parametrize("sigma", [-0.1, float("nan")])
def test_impossible_noise_is_refused(sigma: float) -> None:
    with pytest.raises(InputError, match="noise: found σ"):
        rician(np.zeros(3), sigma, np.random.default_rng(0))


@given(strength=st.floats(0.01, 1.0), seed=st.integers(0, 2**32))
def test_bias_field_is_positive_smooth_and_as_strong_as_asked(strength: float, seed: int) -> None:
    field = bias_field((12, 10, 8), strength, np.random.default_rng(seed))
    log = np.log(field.astype(np.float64))
    assert field.min() > 0
    assert log.std() == pytest.approx(strength, rel=1e-4)
    assert log.mean() == pytest.approx(0, abs=1e-5)
    # a cubic's fourth differences vanish
    assert np.abs(np.diff(log, 4, axis=0)).max() < 1e-4


def test_no_bias_is_exactly_one() -> None:
    assert (bias_field((4, 4, 4), 0.0, np.random.default_rng(0)) == 1).all()


def test_impossible_bias_is_refused() -> None:
    with pytest.raises(InputError, match="strength -1"):
        bias_field((4, 4, 4), -1.0, np.random.default_rng(0))
    with pytest.raises(InputError, match="at least 2 along each axis"):
        bias_field((4, 1, 4), 0.1, np.random.default_rng(0))
