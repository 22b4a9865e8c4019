"""Signal equations against closed forms and special values; noise and bias against their statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch import Tensor

from medmap.core.signal import (
    BIAS_DEGREES,
    bias_coefficients,
    bias_field,
    complex_noise,
    diffusion,
    enhanced_t1,
    enhanced_t2,
    inversion_recovery,
    null_inversion_time,
    rician,
    spin_echo,
    spoiled_gradient_echo,
)
from medmap.errors import InputError

SECONDS = st.floats(0.05, 5.0)
Equation = Callable[..., Tensor]

# every equation with arguments that a tissue and a protocol could have
EQUATIONS: list[tuple[Equation, tuple[float, ...]]] = [
    (spin_echo, (0.8, 1.2, 0.09, 0.6, 0.012)),
    (spoiled_gradient_echo, (0.7, 1.1, 0.05, 0.02, 0.004, 0.35)),
    (inversion_recovery, (0.9, 1.6, 0.1, 9.0, 0.12, 2.5)),
    (null_inversion_time, (4.3, 9.0)),
    (diffusion, (0.5, 1000.0, 0.7e-3)),
    (enhanced_t1, (1.5, 0.2, 4.0)),
    (enhanced_t2, (0.1, 0.2, 5.7)),
]
NAMES = [equation.__name__ for equation, _ in EQUATIONS]


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


# --- Signal equations: special values ---


def test_spin_echo_without_decay_is_saturation_recovery() -> None:
    # TE → 0, and TR = T1 ln 2 recovers one half
    assert spin_echo(0.8, 1.2, 0.1, 1.2 * math.log(2), 0.0).item() == pytest.approx(0.4)


def test_spin_echo_halves_after_t2_ln_2() -> None:
    full = spin_echo(1.0, 1.0, 0.1, 3.0, 0.0).item()
    assert spin_echo(1.0, 1.0, 0.1, 3.0, 0.1 * math.log(2)).item() == pytest.approx(full / 2)


def test_unlimited_repetition_time_and_no_echo_time_show_the_proton_density() -> None:
    for tr_s in (1e6, math.inf):
        assert spin_echo(0.7, 1.0, 0.1, tr_s, 0.0).item() == 0.7
        assert inversion_recovery(0.7, 1.0, 0.1, tr_s, 0.0, 0.0).item() == pytest.approx(-0.7)
        assert inversion_recovery(0.7, 1.0, 0.1, tr_s, 0.0, 100.0).item() == pytest.approx(0.7)
        assert spoiled_gradient_echo(0.7, 1.0, 0.05, tr_s, 0.0, 0.5).item() == pytest.approx(0.7 * math.sin(0.5))
        assert null_inversion_time(1.3, tr_s).item() == pytest.approx(1.3 * math.log(2))


def test_spoiled_gradient_echo_at_zero_flip_is_nothing() -> None:
    assert spoiled_gradient_echo(1.0, 1.0, 0.05, 0.02, 0.0, 0.0).item() == 0


def test_spoiled_gradient_echo_of_a_small_flip_is_proportional_to_it() -> None:
    # α → 0: S → PD · α, whatever T1
    assert spoiled_gradient_echo(0.8, 1.0, 0.05, 0.5, 0.0, 1e-5).item() == pytest.approx(0.8e-5, rel=1e-6)


def test_spoiled_gradient_echo_at_a_right_angle_is_a_spin_echo() -> None:
    gradient_echo = spoiled_gradient_echo(0.7, 0.9, 0.08, 0.5, 0.01, math.pi / 2)
    assert gradient_echo.item() == pytest.approx(spin_echo(0.7, 0.9, 0.08, 0.5, 0.01).item())


@given(t1_s=SECONDS, tr_s=st.floats(0.005, 0.5))
def test_spoiled_gradient_echo_at_the_ernst_angle_has_its_closed_form(t1_s: float, tr_s: float) -> None:
    e1 = math.exp(-tr_s / t1_s)
    ernst = math.acos(e1)
    below, best, above = (
        spoiled_gradient_echo(1.0, t1_s, 0.05, tr_s, 0.0, factor * ernst).item() for factor in (0.9, 1.0, 1.1)
    )
    assert best == pytest.approx(math.sqrt((1 - e1) / (1 + e1)))
    assert max(below, above) < best


@given(t1_s=SECONDS, tr_s=st.floats(0.5, 12.0))
def test_inversion_recovery_vanishes_at_the_null_point(t1_s: float, tr_s: float) -> None:
    ti_s = null_inversion_time(t1_s, tr_s)
    assert 0 < ti_s.item() < tr_s
    assert abs(inversion_recovery(1.0, t1_s, 0.1, tr_s, 0.0, ti_s).item()) < 1e-12
    assert inversion_recovery(1.0, t1_s, 0.1, tr_s, 0.0, 0.99 * ti_s).item() < 0
    assert inversion_recovery(1.0, t1_s, 0.1, tr_s, 0.0, 1.01 * ti_s).item() > 0


def test_diffusion_weighting() -> None:
    assert diffusion(0.5, 0.0, 2e-3).item() == 0.5
    assert diffusion(0.5, 1000.0, 0.0).item() == 0.5
    # b · ADC = ln 2 halves
    assert diffusion(0.5, 1000.0, math.log(2) / 1000).item() == pytest.approx(0.25)


@pytest.mark.parametrize("enhanced", [enhanced_t1, enhanced_t2])
@given(time_s=SECONDS, concentration=st.floats(0, 10), relaxivity=st.floats(1, 10))
def test_rates_of_contrast_agent_add(
    enhanced: Equation, time_s: float, concentration: float, relaxivity: float
) -> None:
    after = enhanced(time_s, concentration, relaxivity).item()
    assert 1 / after - 1 / time_s == pytest.approx(relaxivity * concentration)
    assert after <= time_s
    assert enhanced(time_s, 0.0, relaxivity).item() == time_s


# --- Signal equations: laws ---


@given(
    pd=st.floats(0.01, 1),
    t1_s=SECONDS,
    decay_s=st.floats(0.005, 3.0),
    tr_s=st.floats(0.002, 12.0),
    te_s=st.floats(0, 0.2),
    flip_rad=st.floats(0.01, math.pi / 2),
)
def test_signals_are_positive_and_at_most_the_proton_density(
    pd: float, t1_s: float, decay_s: float, tr_s: float, te_s: float, flip_rad: float
) -> None:
    assert 0 < spin_echo(pd, t1_s, decay_s, tr_s, te_s).item() <= pd
    assert 0 < spoiled_gradient_echo(pd, t1_s, decay_s, tr_s, te_s, flip_rad).item() <= pd
    assert -pd <= inversion_recovery(pd, t1_s, decay_s, tr_s, te_s, tr_s / 2).item() <= pd


@pytest.mark.parametrize(("equation", "arguments"), EQUATIONS, ids=NAMES)
def test_numbers_and_tensors_give_the_same(equation: Equation, arguments: tuple[float, ...]) -> None:
    expected = equation(*arguments)
    assert expected.dtype == torch.float64
    assert expected.shape == ()
    tensors = [torch.tensor([value], dtype=torch.float64) for value in arguments]
    assert equation(*tensors).item() == expected.item()
    for position, tensor in enumerate(tensors):
        mixed = [tensor if i == position else value for i, value in enumerate(arguments)]
        assert equation(*mixed).item() == expected.item()


@pytest.mark.parametrize(("equation", "arguments"), EQUATIONS, ids=NAMES)
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["scalar", "grid"])
def test_tensors_keep_their_precision_and_device(
    equation: Equation, arguments: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    for device in ("cpu", "meta"):
        first = torch.full(shape, arguments[0], dtype=torch.float32, device=device)
        result = equation(first, *arguments[1:])
        assert (result.dtype, result.shape, result.device.type) == (torch.float32, shape, device)


@pytest.mark.parametrize(("equation", "arguments"), EQUATIONS, ids=NAMES)
def test_single_precision_is_precise(equation: Equation, arguments: tuple[float, ...]) -> None:
    single = equation(*(torch.tensor(value, dtype=torch.float32) for value in arguments))
    assert single.item() == pytest.approx(equation(*arguments).item(), rel=2e-6)


def test_single_precision_survives_short_repetition_and_a_small_angle() -> None:
    arguments = (1.0, 4.0, 0.05, 0.002, 0.0, 0.01)
    single = spoiled_gradient_echo(*(torch.tensor(value, dtype=torch.float32) for value in arguments))
    assert single.item() == pytest.approx(spoiled_gradient_echo(*arguments).item(), rel=1e-6)


@pytest.mark.parametrize(("equation", "arguments"), EQUATIONS, ids=NAMES)
def test_equations_broadcast(equation: Equation, arguments: tuple[float, ...]) -> None:
    first, second, *rest = arguments
    column = torch.tensor([[first], [0.9 * first], [0.8 * first]], dtype=torch.float64)
    row = torch.tensor([second, 1.1 * second], dtype=torch.float64)
    table = equation(column, row, *rest)
    assert table.shape == (3, 2)
    assert table[2, 1].item() == equation(0.8 * first, 1.1 * second, *rest).item()


@pytest.mark.parametrize(("equation", "arguments"), EQUATIONS, ids=NAMES)
def test_gradients_flow_to_every_argument(equation: Equation, arguments: tuple[float, ...]) -> None:
    tensors = tuple(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in arguments)
    assert torch.autograd.gradcheck(equation, tensors, eps=1e-7)


def test_the_slope_of_decay_is_its_rate() -> None:
    te_s = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    signal = spin_echo(1.0, 1.0, 0.08, 2.0, te_s)
    signal.backward()
    assert te_s.grad is not None
    assert te_s.grad.item() == pytest.approx(-signal.item() / 0.08)


# --- Noise ---


def test_noise_is_standard_normal_in_every_channel_and_independent_between_them() -> None:
    noise = complex_noise((48, 48, 48), 0.4, *_split(4))
    assert noise.shape == (3, 2, 48, 48, 48)
    assert noise.dtype == torch.float32
    # 110 592 voxels: the standard error is 0.003 of a mean, 0.002 of a standard deviation, 0.003 of a correlation
    for channel in noise.flatten(0, 1):
        assert channel.mean().item() == pytest.approx(0, abs=0.012)
        assert channel.std().item() == pytest.approx(1, abs=0.009)
        assert _correlation(channel[1:], channel[:-1]) == pytest.approx(0, abs=0.012)
    for real in noise[:, 0]:
        for imaginary in noise[:, 1]:
            assert _correlation(real, imaginary) == pytest.approx(0, abs=0.012)


def _split(count: int, first: int = 0) -> tuple[torch.Generator, list[torch.Generator]]:
    shared, *own = _generators(*range(first, first + count))
    return shared, own


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.6, 0.95])
def test_noise_correlates_between_modalities_as_asked(rho: float) -> None:
    noise = complex_noise((48, 48, 48), rho, *_split(4, first=10))
    measured = torch.corrcoef(noise.flatten(1).double())
    # 221 184 pairs: the standard error is (1 − ρ²) / √n
    tolerance = 4 * (1 - rho**2) / math.sqrt(noise[0].numel())
    pairs = measured[torch.triu_indices(3, 3, offset=1).unbind()]
    assert pairs.tolist() == pytest.approx([rho] * 3, abs=tolerance)


def test_wholly_correlated_noise_is_the_same_for_all() -> None:
    noise = complex_noise((4, 5, 6), 1.0, *_split(3))
    assert torch.equal(noise[0], noise[1])


def test_noise_of_a_modality_does_not_depend_on_the_others() -> None:
    shape = (4, 5, 6)
    shared, a, b, c = _generators(0, 1, 2, 3)
    three = complex_noise(shape, 0.5, shared, [a, b, c])
    shared, a, c = _generators(0, 1, 3)
    two = complex_noise(shape, 0.5, shared, [c, a])
    assert torch.equal(two, three[[2, 0]])


@pytest.mark.parametrize("rho", [-0.01, 1.01, math.nan])
def test_impossible_correlation_is_refused(rho: float) -> None:
    with pytest.raises(InputError, match=r"noise: found ρ = .*; expected a correlation between modalities of 0 to 1"):
        complex_noise((2, 2, 2), rho, *_split(2))


def test_noise_for_no_modality_is_refused() -> None:
    with pytest.raises(InputError, match="found no generator; expected one for each modality"):
        complex_noise((2, 2, 2), 0.5, *_split(1))


def test_magnitude_of_a_strong_signal_has_the_spread_asked_for() -> None:
    noisy = rician(torch.full((48, 48, 48), 100.0), complex_noise((48, 48, 48), 0.0, *_split(2))[0], 3.0)
    assert noisy.std().item() == pytest.approx(3.0, rel=0.01)
    # E ≈ S + σ² / 2S
    assert noisy.mean().item() == pytest.approx(100 + 9 / 200, abs=0.04)


def test_magnitude_of_noise_alone_is_rayleigh() -> None:
    noisy = rician(torch.zeros(48, 48, 48), complex_noise((48, 48, 48), 0.0, *_split(2))[0], 2.0)
    assert noisy.mean().item() == pytest.approx(2.0 * math.sqrt(math.pi / 2), rel=0.01)
    assert noisy.std().item() == pytest.approx(2.0 * math.sqrt(2 - math.pi / 2), rel=0.01)
    assert noisy.min().item() > 0


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_magnitudes_correlate_less_than_their_noises_at_low_signal(rho: float) -> None:
    shape = (64, 64, 64)
    noise = complex_noise(shape, rho, *_split(3, first=20))
    measured = [_correlation(*rician(torch.full((2, *shape), signal), noise, 1.0)) for signal in (0.0, 1.0, 2.0, 20.0)]
    # E|n||n'| of two Rayleigh magnitudes is (π/2) ₂F₁(−½, −½; 1; ρ²)
    rayleigh = (special.hyp2f1(-0.5, -0.5, 1, rho**2) - 1) * (math.pi / 2) / (2 - math.pi / 2)
    assert rayleigh < rho - 0.15
    assert measured[0] == pytest.approx(rayleigh, abs=0.008)
    assert measured[-1] == pytest.approx(rho, abs=0.008)
    assert measured == sorted(measured)


def test_magnitude_takes_a_level_per_modality_and_keeps_single_precision() -> None:
    signal = torch.tensor([-1.5, 2.0]).reshape(2, 1, 1, 1)
    noise = torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1).expand(2, 2, 1, 1, 1)
    magnitude = rician(signal, noise, torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
    assert magnitude.dtype == torch.float32
    assert magnitude.flatten().tolist() == pytest.approx([1.5, math.hypot(2 + 3, 4)])


def test_magnitudes_are_batched() -> None:
    noise = torch.stack([complex_noise((3, 4, 5), 0.5, *_split(3, first=seed)) for seed in (30, 40)])
    signal = torch.linspace(0, 1, 60).reshape(3, 4, 5)
    magnitude = rician(signal, noise, 0.1)
    assert magnitude.shape == (2, 2, 3, 4, 5)
    assert torch.equal(magnitude[1, 0], rician(signal, noise[1, 0], 0.1))


def test_the_gradient_of_a_magnitude_is_the_cosine_of_its_phase() -> None:
    signal = torch.full((1, 1, 1), -2.0, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([1.0, 0.5], dtype=torch.float64).reshape(2, 1, 1, 1)
    rician(signal, noise, 0.6).sum().backward()
    assert signal.grad is not None
    assert signal.grad.item() == pytest.approx(-1.4 / math.hypot(-1.4, 0.3))


@pytest.mark.parametrize("sigma", [-0.1, math.nan, torch.tensor([0.1, -0.1]).reshape(2, 1, 1, 1)])
def test_impossible_noise_is_refused(sigma: float | Tensor) -> None:
    with pytest.raises(InputError, match=r"noise: found σ = .*"):
        rician(torch.zeros(2, 1, 1, 1), torch.zeros(2, 2, 1, 1, 1), sigma)


# --- Bias field ---


def _coefficients(*seeds: int) -> Tensor:
    return torch.stack([bias_coefficients(np.random.default_rng(seed)) for seed in seeds])


@given(strength=st.floats(0.01, 1.0), seed=st.integers(0, 2**32))
def test_bias_field_is_positive_smooth_and_as_strong_as_asked(strength: float, seed: int) -> None:
    field = bias_field((12, 10, 8), strength, bias_coefficients(np.random.default_rng(seed)))
    log = field.double().log()
    assert field.min().item() > 0
    assert log.std(correction=0).item() == pytest.approx(strength, rel=1e-4)
    assert log.mean().item() == pytest.approx(0, abs=1e-5)
    for axis in range(3):  # a cubic's fourth differences vanish
        assert log.diff(4, dim=axis).abs().max().item() < 1e-4


def test_bias_field_is_the_polynomial_of_its_formula() -> None:
    shape, strength = (5, 4, 6), 0.3
    coefficients = bias_coefficients(np.random.default_rng(3))
    weights = np.zeros((4, 4, 4))
    for degree, value in zip(BIAS_DEGREES, coefficients.tolist(), strict=True):
        weights[degree] = value
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    polynomial = np.polynomial.legendre.legval3d(*grid, weights)
    expected = np.exp(strength * (polynomial - polynomial.mean()) / polynomial.std())
    np.testing.assert_allclose(bias_field(shape, strength, coefficients).numpy(), expected, rtol=1e-5)


def test_bias_coefficients_fall_off_with_the_square_of_the_degree() -> None:
    drawn = _coefficients(*range(2000))
    expected = torch.tensor([1 / sum(degree) ** 2 for degree in BIAS_DEGREES], dtype=torch.float64)
    assert len(BIAS_DEGREES) == 19
    # 2000 draws: the standard error of a standard deviation is 1.6 %
    torch.testing.assert_close(drawn.std(dim=0), expected, rtol=0.08, atol=0)


def test_bias_fields_are_batched_each_with_its_strength() -> None:
    coefficients = _coefficients(0, 1, 2, 3).reshape(2, 2, 19)
    strengths = torch.tensor([[0.1, 0.2], [0.3, 0.0]])
    fields = bias_field((6, 7, 8), strengths, coefficients)
    assert fields.shape == (2, 2, 6, 7, 8)
    assert fields.dtype == torch.float32
    torch.testing.assert_close(fields[1, 0], bias_field((6, 7, 8), 0.3, coefficients[1, 0]))
    assert (fields[1, 1] == 1).all()


def test_no_bias_is_exactly_one() -> None:
    assert (bias_field((4, 4, 4), 0.0, bias_coefficients(np.random.default_rng(0))) == 1).all()


def test_impossible_bias_is_refused() -> None:
    coefficients = bias_coefficients(np.random.default_rng(0))
    with pytest.raises(InputError, match=r"bias field: found strength -1\.0; expected at least 0"):
        bias_field((4, 4, 4), -1.0, coefficients)
    with pytest.raises(InputError, match="found strength nan"):
        bias_field((4, 4, 4), math.nan, coefficients)
    with pytest.raises(InputError, match=r"found a grid of \(4, 1, 4\) voxels; expected at least 2 along each axis"):
        bias_field((4, 1, 4), 0.1, coefficients)
    with pytest.raises(InputError, match="found coefficients that are all 0"):
        bias_field((4, 4, 4), 0.1, torch.zeros(19, dtype=torch.float64))
