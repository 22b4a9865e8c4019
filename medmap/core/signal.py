"""What an MR scanner measures: signal equations, contrast agent, noise, bias field. Seconds, radians, mmol/l, s/mm².

Every equation takes numbers or tensors that broadcast against each other and returns a tensor, on the device and in the
precision of the tensors it was given (double precision where all are numbers). Magnetisation is in units of the proton
density ``pd`` (1 = water). Gradients flow through everything. What a tissue is made of stands in `medmap.core.tissues`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from medmap.core.box import Index3
from medmap.errors import InputError

Real = float | Tensor

BIAS_DEGREES = tuple(degree for degree in product(range(4), repeat=3) if 1 <= sum(degree) <= 3)
"""Degrees in x, y, z of the 19 terms of a bias field, in the order of its coefficients."""


def spin_echo(pd: Real, t1_s: Real, t2_s: Real, tr_s: Real, te_s: Real) -> Tensor:
    """Spin echo, 90°–180°, echo time much shorter than the repetition time.

        S = PD · (1 − e^(−TR/T1)) · e^(−TE/T2)

    pd: proton density; t1_s, t2_s: relaxation times, s; tr_s, te_s: repetition and echo time, s.
    Source: Bernstein, King, Zhou, Handbook of MRI Pulse Sequences, 2004, ch. 14.

    >>> round(spin_echo(1.0, t1_s=1.0, t2_s=0.1, tr_s=0.5, te_s=0.01).item(), 3)
    0.356
    """
    pd, t1_s, t2_s, tr_s, te_s = _tensors(pd, t1_s, t2_s, tr_s, te_s)
    return pd * -torch.expm1(-tr_s / t1_s) * torch.exp(-te_s / t2_s)


def spoiled_gradient_echo(pd: Real, t1_s: Real, t2star_s: Real, tr_s: Real, te_s: Real, flip_rad: Real) -> Tensor:
    """Spoiled gradient echo (FLASH, SPGR) in its steady state.

        S = PD · sin α · (1 − E1) / (1 − cos α · E1) · e^(−TE/T2*),   E1 = e^(−TR/T1)

    t2star_s: T2*, s; flip_rad: flip angle α, rad; the rest as in `spin_echo`. Largest at the Ernst angle cos α = E1.
    Source: Ernst and Anderson 1966; Handbook of MRI Pulse Sequences, 2004, ch. 14.

    >>> round(spoiled_gradient_echo(1.0, t1_s=1.0, t2star_s=0.05, tr_s=0.02, te_s=0.0, flip_rad=0.35).item(), 3)
    0.086
    """
    pd, t1_s, t2star_s, tr_s, te_s, flip_rad = _tensors(pd, t1_s, t2star_s, tr_s, te_s, flip_rad)
    recovered = -torch.expm1(-tr_s / t1_s)
    # 1 − cos α · E1, written so that short TR and small angles keep their digits in single precision
    spoiled = recovered + 2 * torch.sin(flip_rad / 2).square() * torch.exp(-tr_s / t1_s)
    return pd * torch.sin(flip_rad) * recovered / spoiled * torch.exp(-te_s / t2star_s)


def inversion_recovery(pd: Real, t1_s: Real, t2_s: Real, tr_s: Real, te_s: Real, ti_s: Real) -> Tensor:
    """Inversion recovery with a spin-echo read-out, signed (a magnitude image is its absolute value).

        S = PD · (1 − 2 e^(−TI/T1) + e^(−TR/T1)) · e^(−TE/T2)

    ti_s: inversion time, s; the rest as in `spin_echo`. Zero at `null_inversion_time`: FLAIR nulls the fluid.
    Source: Handbook of MRI Pulse Sequences, 2004, ch. 14.

    >>> null = null_inversion_time(t1_s=4.4, tr_s=9.0)
    >>> abs(inversion_recovery(1.0, t1_s=4.4, t2_s=2.0, tr_s=9.0, te_s=0.1, ti_s=null).item()) < 1e-12
    True
    """
    pd, t1_s, t2_s, tr_s, te_s, ti_s = _tensors(pd, t1_s, t2_s, tr_s, te_s, ti_s)
    return pd * (1 - 2 * torch.exp(-ti_s / t1_s) + torch.exp(-tr_s / t1_s)) * torch.exp(-te_s / t2_s)


def null_inversion_time(t1_s: Real, tr_s: Real) -> Tensor:
    """Inversion time in s at which a tissue of T1 ``t1_s`` gives no signal: TI = T1 · ln(2 / (1 + e^(−TR/T1))).

    tr_s: repetition time, s. Source: the root of `inversion_recovery`.

    >>> round(null_inversion_time(t1_s=1.0, tr_s=1e9).item(), 4)  # ln 2
    0.6931
    """
    t1_s, tr_s = _tensors(t1_s, tr_s)
    return t1_s * (math.log(2) - torch.log1p(torch.exp(-tr_s / t1_s)))


def diffusion(s0: Real, b_s_mm2: Real, adc_mm2_s: Real) -> Tensor:
    """Signal under diffusion weighting: S = S0 · e^(−b · ADC).

    s0: signal without it, such as a `spin_echo`; b_s_mm2: weighting b, s/mm²; adc_mm2_s: apparent diffusion
    coefficient, mm²/s. Source: Le Bihan et al., Radiology 1986.

    >>> round(diffusion(1.0, b_s_mm2=1000.0, adc_mm2_s=0.7e-3).item(), 3)
    0.497
    """
    s0, b_s_mm2, adc_mm2_s = _tensors(s0, b_s_mm2, adc_mm2_s)
    return s0 * torch.exp(-b_s_mm2 * adc_mm2_s)


def enhanced_t1(t1_s: Real, concentration_mmol_l: Real, relaxivity_r1: Real) -> Tensor:
    """T1 in s under a contrast agent, whose rate adds: 1/T1' = 1/T1 + r1 · c.

    concentration_mmol_l: c, mmol/l; relaxivity_r1: r1, l/(mmol·s), as in `medmap.core.tissues.relaxivity`.

    >>> enhanced_t1(1.0, concentration_mmol_l=0.5, relaxivity_r1=4.0).item() == 1 / 3
    True
    """
    return _shortened(t1_s, concentration_mmol_l, relaxivity_r1)


def enhanced_t2(t2_s: Real, concentration_mmol_l: Real, relaxivity_r2: Real) -> Tensor:
    """T2 in s under a contrast agent, whose rate adds: 1/T2' = 1/T2 + r2 · c.

    concentration_mmol_l: c, mmol/l; relaxivity_r2: r2, l/(mmol·s).

    >>> round(enhanced_t2(0.1, concentration_mmol_l=2.0, relaxivity_r2=5.0).item(), 3)
    0.05
    """
    return _shortened(t2_s, concentration_mmol_l, relaxivity_r2)


def complex_noise(
    shape: Index3, rho: float, shared: torch.Generator, own: Sequence[torch.Generator]
) -> Float32[Tensor, "M 2 X Y Z"]:
    """Standard normal noise of real and imaginary channel, correlated between modalities but not between voxels.

        n_m = √ρ · n_0 + √(1 − ρ) · n'_m   ⇒   Var n_m = 1,   Corr(n_m, n_k) = ρ for m ≠ k

    shape:  X, Y, Z voxels
    rho:    ρ, correlation between any two modalities, channel by channel: 0 … 1
    shared: draws n_0, which all modalities have in common
    own:    one generator per modality draws its n'_m; so a modality's noise does not depend on which others are made.
            Each is to have a seed of its own. All generators live on the device where the noise shall be

    Magnitudes correlate less than ρ where the signal is not far above the noise: see `rician`.
    Raises InputError for ρ outside 0 … 1 and for no modality.

    >>> seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    >>> complex_noise((4, 4, 4), 1.0, seeds[0], seeds[1:]).diff(dim=0).count_nonzero().item()  # ρ = 1: the same twice
    0
    """
    if not 0 <= rho <= 1:
        raise InputError(f"noise: found ρ = {rho}; expected a correlation between modalities of 0 to 1")
    if not own:
        raise InputError("noise: found no generator; expected one for each modality")
    common = rho**0.5 * _channels(shape, shared) if rho else torch.zeros(())
    return torch.stack([common + (1 - rho) ** 0.5 * _channels(shape, generator) for generator in own])


def rician(
    signal: Float[Tensor, "*#m X Y Z"], noise: Float[Tensor, "*#m 2 X Y Z"], sigma: Real
) -> Float[Tensor, "*#m X Y Z"]:
    """Magnitude of a real signal with complex noise: |S + σ (n₁ + i n₂)|.

    signal: S, of any sign, such as [M X Y Z]
    noise:  n₁ and n₂, such as `complex_noise` draws
    sigma:  σ per channel, in the signal's unit; a number, or a tensor that broadcasts against the signal

    Where S ≫ σ its spread is σ; where S = 0 its mean is σ √(π/2) and it is never zero. Of two magnitudes whose noises
    correlate by ρ, the correlation tends to ρ where S ≫ σ and is less elsewhere: about ρ² where S = 0.
    Raises InputError for σ < 0.
    Source: Gudbjartsson and Patz, Magn Reson Med 1995.

    >>> rician(torch.full((1, 1, 2), -2.0), torch.ones(2, 1, 1, 2), 0.0).flatten().tolist()
    [2.0, 2.0]
    """
    if not (torch.as_tensor(sigma) >= 0).all():
        raise InputError(f"noise: found σ = {sigma}; expected a standard deviation of at least 0")
    real, imaginary = noise.unbind(-4)
    return torch.hypot(signal + sigma * real, sigma * imaginary)


def bias_coefficients(generator: np.random.Generator) -> Float64[Tensor, " 19"]:
    """Random coefficients of one `bias_field`: normal, standard deviation 1/degree² for the terms of `BIAS_DEGREES`.

    NumPy draws them, so that they are the same whatever device the field is then made on.

    >>> tuple(bias_coefficients(np.random.default_rng(0)).shape)
    (19,)
    """
    degrees = np.sum(BIAS_DEGREES, axis=1)
    return torch.from_numpy(generator.standard_normal(len(degrees)) / degrees**2)


def bias_field(
    shape: Index3, strength: Real, coefficients: Float64[Tensor, "*batch 19"]
) -> Float32[Tensor, "*batch X Y Z"]:
    """A smooth positive gain over a grid, as receive coils leave it: exp of a polynomial of degree ≤ 3.

        log g = strength · (p − mean p) / std p,   p = Σ c_ijk · P_i(x) P_j(y) P_k(z),   x, y, z from −1 to 1

    shape:        X, Y, Z voxels
    strength:     standard deviation of log g over the grid; 0 gives exactly 1; a number, or a tensor [*batch]
    coefficients: c, for the terms of `BIAS_DEGREES`, of any number of fields; the field is made on their device

    P_n: Legendre polynomials. Mean and spread follow from the polynomials' moments over the grid, so that log g has
    mean 0 and the spread asked for on any grid.
    Raises InputError for strength < 0, a grid with an axis of fewer than 2 voxels, or coefficients that are all 0.

    >>> field = bias_field((8, 8, 8), 0.2, bias_coefficients(np.random.default_rng(0)))
    >>> bool(field.min() > 0), round(field.log().std(correction=0).item(), 3)
    (True, 0.2)
    """
    strengths = torch.as_tensor(strength, dtype=coefficients.dtype, device=coefficients.device)
    if not (strengths >= 0).all():
        raise InputError(f"bias field: found strength {strength}; expected at least 0")
    if min(shape) < 2:
        raise InputError(f"bias field: found a grid of {shape} voxels; expected at least 2 along each axis")
    axes = [_legendre(n, coefficients.device) for n in shape]
    weights = _standardised(coefficients, axes) * strengths[..., None, None, None]
    x, y, z = (axis.to(torch.float32) for axis in axes)
    along_x = torch.einsum("...ijk,ix->...xjk", weights.to(torch.float32), x)
    return torch.einsum("...xyk,kz->...xyz", torch.einsum("...xjk,jy->...xyk", along_x, y), z).exp()


def _tensors(*values: Real) -> tuple[Tensor, ...]:
    """Numbers as tensors of the precision and on the device of the tensors among the values, which stay as they are."""
    given = [value for value in values if isinstance(value, Tensor)]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given)) if given else torch.float64
    device = given[0].device if given else None
    return tuple(
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device=device) for value in values
    )


def _shortened(time_s: Real, concentration_mmol_l: Real, relaxivity: Real) -> Tensor:
    """Relaxation time whose rate grew by relaxivity times concentration; exactly unchanged without agent."""
    time_s, concentration_mmol_l, relaxivity = _tensors(time_s, concentration_mmol_l, relaxivity)
    return time_s / (1 + time_s * relaxivity * concentration_mmol_l)


def _channels(shape: Index3, generator: torch.Generator) -> Float32[Tensor, "2 X Y Z"]:
    return torch.randn((2, *shape), generator=generator, device=generator.device, dtype=torch.float32)


def _legendre(count: int, device: torch.device) -> Float64[Tensor, "4 n"]:
    """Legendre polynomials of degree 0 to 3 at ``count`` points from −1 to 1."""
    x = torch.linspace(-1, 1, count, dtype=torch.float64, device=device)
    return torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2])


def _standardised(
    coefficients: Float64[Tensor, "*batch 19"], axes: Sequence[Float64[Tensor, "4 _"]]
) -> Float64[Tensor, "*batch 4 4 4"]:
    """Weights of the products of polynomials, of mean 0 and variance 1 over the grid."""
    weights = coefficients.new_zeros((*coefficients.shape[:-1], 4, 4, 4))
    i, j, k = zip(*BIAS_DEGREES, strict=True)
    weights[..., list(i), list(j), list(k)] = coefficients
    weights[..., 0, 0, 0] = -torch.einsum("...ijk,i,j,k->...", weights, *(axis.mean(dim=1) for axis in axes))
    grams = (axis @ axis.T / axis.shape[1] for axis in axes)
    variance = torch.einsum("...ijk,il,jm,kn,...lmn->...", weights, *grams, weights)
    if not (variance > 0).all():
        raise InputError("bias field: found coefficients that are all 0; expected some to draw a field from")
    return weights / variance.sqrt()[..., None, None, None]
