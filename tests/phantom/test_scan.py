"""Sequences: timing, contrast, and what the scanner adds, each against its closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmap.core.signal import bias_coefficients, complex_noise, inversion_recovery, null_inversion_time
from medmap.core.tissues import tissue
from medmap.phantom.brain import BRAIN, draw_agent
from medmap.phantom.scan import (
    PROPERTIES,
    SEQUENCES,
    Scan,
    Timing,
    _in_plane,
    _slices,
    acquire,
    acquisition,
    draw_relaxation,
    draw_scan,
    signals,
)
from medmap.phantom.space import along_axes

SHAPE = (24, 26, 28)
NONE = torch.zeros(2, *SHAPE)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _scan(seed: int = 0, name: str = "t2w") -> Scan:
    return draw_scan(SEQUENCES[name](3.0, _rng(seed)), tuple(BRAIN.tissues), _rng(seed))


CLEAN = replace(
    _scan(),
    slice_mm=1.0,
    gap=0.0,
    in_plane_mm=0.5,
    ringing=1.0,
    shift_mm=(0.0, 0.0, 0.0),
    blur_mm=0.0,
    bias=0.0,
    ghost=0.0,
    gain=1.0,
    uncovered_mm=0.0,
)
"""A scan that adds nothing."""


def _acquired(scan: Scan, signal: torch.Tensor, noise: torch.Tensor | None = None, sigma: float = 0.0) -> torch.Tensor:
    noise = torch.zeros(2, *signal.shape) if noise is None else noise
    return acquire(scan, signal, 1.0, noise, sigma, bias_coefficients(_rng(0)))


def _blob(seed: int = 0) -> torch.Tensor:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    blur = np.exp(-((np.arange(28)[:, None] - np.arange(28)) ** 2) / 18)
    blurs = [torch.tensor(blur[:n, :n], dtype=torch.float32) for n in SHAPE]
    return along_axes(noise, blurs).abs() + 0.5


# ---- timing and contrast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("field_t", [1.5, 3.0])
def test_timings_are_possible(name: str, field_t: float) -> None:
    for seed in range(20):
        timing = SEQUENCES[name](field_t, _rng(seed))
        assert timing.phase == ("late" if name == "t1c" else "")
        assert timing.b_s_mm2 == (1000.0 if name == "dwi" else 0.0)
        if timing.kind != "adc":
            assert 0 < timing.te_s < timing.tr_s
            assert timing.ti_s < timing.tr_s
        assert (timing.flip_rad > 0) == (timing.kind == "spoiled_gradient_echo")
        assert (timing.ti_s > 0) == (timing.kind == "inversion_recovery")


def _relaxation(seed: int, field_t: float = 3.0) -> dict[str, dict[str, float]]:
    generator = _rng(seed)
    return {name: draw_relaxation(row, field_t, {}, generator) for name, row in BRAIN.tissues.items()}


def _signals(name: str, seed: int, field_t: float = 3.0) -> dict[str, float]:
    scan = draw_scan(SEQUENCES[name](field_t, _rng(seed)), tuple(BRAIN.tissues), _rng(seed))
    return signals(scan, field_t, _relaxation(seed, field_t), draw_agent(_rng(seed)), 0.0)


@pytest.mark.parametrize("name", SEQUENCES)
def test_signals_are_positive_and_finite(name: str) -> None:
    for seed in range(20):
        for field_t in (1.5, 3.0):
            values = np.array(list(_signals(name, seed, field_t).values()))
            assert np.isfinite(values).all()
            assert (values >= 0).all()


def test_flair_nulls_fluid_and_shows_oedema_and_t2_shows_fluid() -> None:
    flair, t2 = ([_signals(name, seed) for seed in range(30)] for name in ("t2f", "t2w"))
    assert np.median([s["csf"] / s["white"] for s in flair]) < 0.25
    assert np.median([s["oedema"] / s["white"] for s in flair]) > 1.2
    assert np.median([s["csf"] / s["white"] for s in t2]) > 2
    null = null_inversion_time(4.0, 9.0)
    assert inversion_recovery(1.0, 4.0, 2.0, 9.0, 0.1, null).abs().item() < 1e-9


def test_contrast_agent_brightens_the_rim_and_the_vessels_alone() -> None:
    for seed in range(20):
        timing = Timing("spin_echo", 0.6, 0.01)
        scan = replace(CLEAN, timing=timing)
        native = signals(scan, 3.0, _relaxation(seed), draw_agent(_rng(seed)), 0.0)
        enhanced = replace(scan, timing=replace(timing, phase="late"))
        after = signals(enhanced, 3.0, _relaxation(seed), draw_agent(_rng(seed)), 0.0)
        for name in ("enhancing", "blood"):
            assert after[name] > 1.15 * native[name]
        for name in ("white", "grey", "csf", "cavity"):
            assert after[name] == native[name]
        assert after["enhancing"] > after["solid"] * 0.9


def test_adc_is_in_thousandths_of_mm2_per_s_and_dwi_is_weighted_by_it() -> None:
    relaxation = _relaxation(4)
    adc = signals(_scan(4, "adc"), 3.0, relaxation, {}, 0.0)
    assert adc == pytest.approx({name: row["adc_mm2_s"] * 1e3 for name, row in relaxation.items()})
    assert 0.5 < adc["white"] < 1.1 < 2.4 < adc["csf"] < 4
    scan = _scan(4, "dwi")
    weighted = signals(scan, 3.0, relaxation, {}, 0.0)
    plain = signals(replace(scan, timing=replace(scan.timing, b_s_mm2=0.0)), 3.0, relaxation, {}, 0.0)
    for name, row in relaxation.items():
        assert weighted[name] == pytest.approx(plain[name] * np.exp(-1000 * row["adc_mm2_s"]))


def test_the_randomised_mode_is_a_share_of_the_scans() -> None:
    scans = [_scan(seed) for seed in range(400)]
    relaxation, agent = _relaxation(0), draw_agent(_rng(0))
    physical = [signals(scan, 3.0, relaxation, agent, 0.0) for scan in scans]

    def share(weight: float) -> float:
        found = [signals(scan, 3.0, relaxation, agent, weight) for scan in scans]
        return float(np.mean([one != other for one, other in zip(found, physical, strict=True)]))

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert share(0.3) == pytest.approx(0.3, abs=0.07)


def test_random_contrast_lies_around_the_physical_one_or_anywhere() -> None:
    scan = replace(CLEAN, randomness=0.0, random_signal=dict.fromkeys(BRAIN.tissues, 0.5))
    physical = signals(scan, 3.0, _relaxation(0), {}, 0.0)
    near = signals(replace(scan, around=0.2), 3.0, _relaxation(0), {}, 1.0)
    assert near == pytest.approx({name: value * np.exp(0.1) for name, value in physical.items()})
    assert signals(replace(scan, around=0.0), 3.0, _relaxation(0), {}, 1.0) == dict(scan.random_signal)
    kinds = [_scan(seed).around for seed in range(200)]
    assert 0.35 < np.mean([around == 0 for around in kinds]) < 0.65


def test_relaxation_varies_round_the_table_and_t2star_is_never_slower_than_t2() -> None:
    drawn = [draw_relaxation("white", 1.5, {}, _rng(seed)) for seed in range(400)]
    for key in PROPERTIES[:3]:
        values = np.array([row[key] for row in drawn])
        spread = getattr(tissue("white", 1.5), key)
        assert (values > 0).all()
        assert np.median(values) == pytest.approx(spread.mean, rel=0.03)
        assert values.std() == pytest.approx(0.7 * spread.sd, rel=0.25)
    assert all(row["t2star_s"] <= row["t2_s"] for row in drawn)
    assert draw_relaxation("white", 1.5, {"t1_s": 1.0}, _rng(0))["t1_s"] > drawn[0]["t1_s"]


# ---- resolution, slices, noise -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 2.0, 4.0]))
def test_a_constant_stays_constant_through_any_scan(seed: int, spacing_mm: float) -> None:
    for matrices in acquisition(_scan(seed), SHAPE, spacing_mm):
        for matrix, n in zip(matrices, SHAPE, strict=True):
            assert matrix.shape == (n, n)
            np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)


def test_a_scan_that_adds_nothing_returns_the_signal() -> None:
    signal = _blob()
    torch.testing.assert_close(_acquired(CLEAN, signal), signal, atol=1e-4, rtol=0)


def test_a_slice_is_the_average_of_the_voxels_it_cuts() -> None:
    line = _rng(0).standard_normal(24)
    back, averaged = _slices(24, 1.0, 4.0, 0.0)
    np.testing.assert_allclose(averaged @ line, line.reshape(6, 4).mean(axis=1))
    np.testing.assert_allclose(back.sum(axis=1), 1)
    centres = np.arange(6) * 4 + 1.5
    np.testing.assert_allclose(back @ averaged @ line, np.interp(np.arange(24), centres, averaged @ line))
    _, apart = _slices(24, 1.0, 4.0, 0.5)  # 6 mm apart: two voxels between slices are in none
    assert apart.shape == (4, 24)
    np.testing.assert_allclose((apart > 0).sum(axis=0), np.tile([0, 1, 1, 1, 1, 0], 4))
    _, cut = _slices(10, 1.0, 2.5, 0.0)  # borders through the middle of voxels
    np.testing.assert_allclose(cut[0, :4], [0.4, 0.4, 0.2, 0])


def test_a_slice_has_the_noise_of_the_voxel_in_its_middle() -> None:
    """So that scans of thick and of thin slices share what noise they have in common."""
    thick = replace(CLEAN, slice_mm=5.0, slice_axis=1)
    _, noise = acquisition(thick, (24, 25, 28), 1.0)
    np.testing.assert_allclose(noise[1][2::5, 2::5], np.eye(5), atol=1e-12)
    assert np.count_nonzero(noise[1].sum(axis=0)) == 5
    np.testing.assert_allclose(noise[0], np.eye(24), atol=1e-12)


def test_thick_slices_lie_across_their_axis() -> None:
    signal = _blob()
    for axis in range(3):
        thick = _acquired(replace(CLEAN, slice_mm=5.0, slice_axis=axis), signal)
        blurred = [float(thick.diff(dim=d).std() / signal.diff(dim=d).std()) for d in range(3)]
        assert np.argmin(blurred) == axis


@pytest.mark.parametrize("ringing", [0.0, 0.5, 1.0])
def test_where_everything_was_acquired_nothing_changes(ringing: float) -> None:
    np.testing.assert_allclose(_in_plane(24, 2.0, 1.2, ringing, 0.0), np.eye(24), atol=1e-12)


@pytest.mark.parametrize("voxels", [1, -3])
@pytest.mark.parametrize("n", [23, 24])
def test_a_shift_by_whole_voxels_is_a_roll(voxels: int, n: int) -> None:
    matrix = _in_plane(n, 2.0, 0.5, 1.0, 2.0 * voxels)
    line = _rng(1).standard_normal(n)
    if n % 2 == 0:  # at the Nyquist frequency the sign of a shift cannot be told from its magnitude; whole steps are
        np.testing.assert_allclose(np.abs(matrix.sum(axis=1)), 1, atol=1e-12)
    np.testing.assert_allclose(matrix @ line, np.roll(line, voxels), atol=1e-9)


def test_a_cut_off_in_k_space_rings_by_nine_percent_and_a_window_hardly() -> None:
    step = np.zeros(512)
    step[128:384] = 1.0
    rings = _in_plane(512, 1.0, 4.0, 1.0, 0.0) @ step
    assert rings.max() - 1 == pytest.approx(0.0895, abs=0.01)  # Wilbraham–Gibbs: Si(π)/π − 1/2 of the jump
    assert -rings.min() == pytest.approx(0.0895, abs=0.01)
    soft = _in_plane(512, 1.0, 4.0, 0.0, 0.0) @ step
    assert soft.max() - 1 < 0.01
    flat = rings[220:290]
    assert np.abs(flat - 1).max() < 0.03


def test_the_misregistration_moves_the_image() -> None:
    signal = _blob()
    moved = _acquired(replace(CLEAN, shift_mm=(2.0, 0.0, -1.0)), signal)
    torch.testing.assert_close(moved, signal.roll((2, -1), dims=(0, 2)), atol=1e-4, rtol=0)


def test_a_ghost_is_a_faint_copy() -> None:
    signal = _blob()
    ghost = replace(CLEAN, ghost=0.05, ghost_shift=0.5, ghost_axis=1)
    expected = signal + 0.05 * signal.roll(13, dims=1)
    torch.testing.assert_close(_acquired(ghost, signal), expected, atol=1e-4, rtol=0)


def _spread(scan: Scan) -> float:
    """Root of the mean over voxels of the variance that the interpolation leaves of noise of variance 1."""
    _, matrices = acquisition(scan, SHAPE, 1.0)
    return float(np.sqrt(np.prod([(matrix**2).sum(axis=1).mean() for matrix in matrices])))


@pytest.mark.parametrize("change", [{}, {"blur_mm": 0.9}, {"slice_mm": 4.0, "gap": 0.1, "blur_mm": 0.6}])
@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_noise_has_the_variance_asked_for(change: dict[str, float], sigma: float) -> None:
    scan = replace(CLEAN, **change)
    signal = torch.full(SHAPE, 20 * sigma)  # far above the noise, where its spread is that of one channel
    residual = []
    for seed in range(4):
        own = [torch.Generator().manual_seed(seed)]
        noise = complex_noise(SHAPE, 0.0, torch.Generator().manual_seed(99), own)[0]
        residual.append(_acquired(scan, signal, noise, sigma) - signal)
    found = torch.stack(residual)
    assert found.std().item() == pytest.approx(sigma * _spread(scan), rel=0.05)
    assert found.mean().item() == pytest.approx(0, abs=0.1 * sigma)
    if change:
        assert _spread(scan) < 0.75


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_complex_noise_of_two_scans_correlates_as_asked(rho: float) -> None:
    scan = replace(CLEAN, blur_mm=0.7)
    own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = complex_noise(SHAPE, rho, torch.Generator().manual_seed(3), own)
    blurs = [torch.tensor(matrix, dtype=torch.float32) for matrix in acquisition(scan, SHAPE, 1.0)[1]]
    one, other = along_axes(noise, blurs).flatten(1)
    independent = noise[0].numel() * _spread(scan) ** 2
    error = (1 - rho**2) / np.sqrt(independent)
    assert np.corrcoef(one, other)[0, 1] == pytest.approx(rho, abs=4 * error + 1e-3)
    bright = [_acquired(scan, torch.full(SHAPE, 9.0), n, 0.1).flatten() for n in noise]
    assert np.corrcoef(bright[0], bright[1])[0, 1] == pytest.approx(rho, abs=6 * error + 1e-2)


def test_the_coil_multiplies() -> None:
    flat = _acquired(replace(CLEAN, bias=0.1), torch.ones(SHAPE))
    assert flat.min() > 0
    assert flat.log().std(correction=0).item() == pytest.approx(0.1, rel=0.01)


def test_the_coil_cancels_in_a_ratio_of_images() -> None:
    adc = replace(CLEAN, bias=0.1, timing=_scan(name="adc").timing)
    assert _acquired(adc, torch.ones(SHAPE)).std() < 1e-4


def test_a_scan_is_the_same_for_the_same_stream_and_all_its_numbers_are_possible() -> None:
    assert _scan(3) == _scan(3) != _scan(4)
    for seed in range(200):
        scan = _scan(seed)
        assert scan.slice_axis in (0, 1, 2)
        assert scan.slice_mm >= 1
        assert 0 <= scan.gap < 1
        assert 0 <= scan.ringing <= 1
        assert max(map(abs, scan.shift_mm)) <= 1
        assert min(scan.noise, scan.gain, scan.in_plane_mm, scan.blur_mm) > 0
        assert 0 <= scan.ghost < 0.1
        assert set(scan.random_signal) == set(BRAIN.tissues)
