"""What an MR scanner measures: signal equations, contrast agent, bias field, noise. Seconds, radians, mmol/l.

Every equation takes numbers or arrays that broadcast against each other; magnetisation is in units of the proton
density ``pd`` (1 = water).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.errors import InputError

Real = float | NDArray[np.floating[Any]]
FloatArray = NDArray[np.floating[Any]]

GADOLINIUM_R1 = 4.5
"""Longitudinal relaxivity r1 of a gadolinium chelate in plasma at 3 T, l/(mmol·s) (Rohrer et al., Invest Radiol 2005:
3.5–5.2 for the extracellular agents)."""


@dataclass(frozen=True)
class Tissue:
    """What a tissue contributes to a signal: ``pd`` relative to water, relaxation times ``t1_s`` and ``t2_s`` in s."""

    pd: float
    t1_s: float
    t2_s: float


def spin_echo(pd: Real, t1_s: Real, t2_s: Real, tr_s: Real, te_s: Real) -> Any:
    """Spin echo, 90°–180°, echo time much shorter than the repetition time.

    S = PD · (1 − e^(−TR/T1)) · e^(−TE/T2)

    pd: proton density; t1_s, t2_s: relaxation times, s; tr_s, te_s: repetition and echo time, s.
    Source: Bernstein, King, Zhou, Handbook of MRI Pulse Sequences, 2004, ch. 14.

    >>> round(float(spin_echo(1.0, t1_s=1.0, t2_s=0.1, tr_s=0.5, te_s=0.01)), 3)
    0.356
    """
    return pd * (1 - np.exp(-tr_s / t1_s)) * np.exp(-te_s / t2_s)


def spoiled_gradient_echo(pd: Real, t1_s: Real, t2star_s: Real, tr_s: Real, te_s: Real, flip_rad: Real) -> Any:
    """Spoiled gradient echo (FLASH, SPGR) in its steady state.

    S = PD · sin α · (1 − E1) / (1 − cos α · E1) · e^(−TE/T2*),   E1 = e^(−TR/T1)

    flip_rad: flip angle α, rad; the rest as in `spin_echo`. Largest at the Ernst angle cos α = E1.
    Source: Ernst and Anderson 1966; Handbook of MRI Pulse Sequences, 2004, ch. 14.

    >>> round(float(spoiled_gradient_echo(1.0, t1_s=1.0, t2star_s=0.05, tr_s=0.02, te_s=0.0, flip_rad=0.35)), 3)
    0.086
    """
    e1 = np.exp(-tr_s / t1_s)
    return pd * np.sin(flip_rad) * (1 - e1) / (1 - np.cos(flip_rad) * e1) * np.exp(-te_s / t2star_s)


def inversion_recovery(pd: Real, t1_s: Real, t2_s: Real, tr_s: Real, te_s: Real, ti_s: Real) -> Any:
    """Inversion recovery with a spin-echo read-out, signed (a magnitude image is its absolute value).

    S = PD · (1 − 2 e^(−TI/T1) + e^(−TR/T1)) · e^(−TE/T2)

    ti_s: inversion time, s; the rest as in `spin_echo`. Zero at `null_inversion_time`: FLAIR nulls the fluid.
    Source: Handbook of MRI Pulse Sequences, 2004, ch. 14.

    >>> null = null_inversion_time(t1_s=4.2, tr_s=9.0)
    >>> abs(float(inversion_recovery(1.0, 4.2, 2.0, tr_s=9.0, te_s=0.1, ti_s=null))) < 1e-12
    True
    """
    return pd * (1 - 2 * np.exp(-ti_s / t1_s) + np.exp(-tr_s / t1_s)) * np.exp(-te_s / t2_s)


def null_inversion_time(t1_s: Real, tr_s: Real) -> Any:
    """Inversion time in s at which a tissue of ``t1_s`` gives no signal: TI = T1 · ln(2 / (1 + e^(−TR/T1))).

    >>> round(float(null_inversion_time(t1_s=1.0, tr_s=1e9)), 4)  # ln 2
    0.6931
    """
    return t1_s * np.log(2 / (1 + np.exp(-tr_s / t1_s)))


def enhanced_t1(t1_s: Real, concentration_mmol_l: Real, relaxivity: float = GADOLINIUM_R1) -> Any:
    """T1 in s under a contrast agent: 1/T1' = 1/T1 + r1 · c.

    concentration_mmol_l: c, mmol/l; relaxivity: r1, l/(mmol·s).

    >>> float(enhanced_t1(1.0, concentration_mmol_l=0.5, relaxivity=4.0)) == 1 / 3
    True
    """
    return 1 / (1 / t1_s + relaxivity * concentration_mmol_l)


def rician(signal: FloatArray, sigma: float, generator: np.random.Generator) -> FloatArray:
    """Magnitude of a signal with complex Gaussian noise: |S + σ (n₁ + i n₂)|, n standard normal, independent per voxel.

    signal: Float[...], any sign; sigma: σ per channel, in the signal's unit. Where S ≫ σ its spread is σ; where S = 0
    its mean is σ √(π/2) and it is never zero. Raises InputError for σ < 0.
    Source: Gudbjartsson and Patz, Magn Reson Med 1995.

    >>> rician(np.full(3, -2.0), 0.0, np.random.default_rng(0)).tolist()
    [2.0, 2.0, 2.0]
    """
    if not sigma >= 0:
        raise InputError(f"noise: found σ = {sigma}; expected a standard deviation of at least 0")
    dtype = np.float32 if signal.dtype == np.float32 else np.float64
    noise = generator.standard_normal((2, *signal.shape), dtype=dtype)
    magnitude: FloatArray = np.hypot(signal + noise.dtype.type(sigma) * noise[0], noise.dtype.type(sigma) * noise[1])
    return magnitude


def bias_field(shape: tuple[int, int, int], strength: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """A smooth positive gain over a grid, as receive coils leave it: exp of a random polynomial of degree ≤ 3.

    shape:    X, Y, Z voxels
    strength: standard deviation of the field's logarithm over the grid; 0 gives exactly 1 everywhere

    Returns Float32[X Y Z] whose logarithm has mean 0. Coefficients fall off as 1/degree².
    Raises InputError for strength < 0 or a grid with an axis of fewer than 2 voxels.

    >>> field = bias_field((8, 8, 8), 0.2, np.random.default_rng(0))
    >>> bool(field.min() > 0), round(float(np.log(field).std()), 3)
    (True, 0.2)
    """
    if not strength >= 0:
        raise InputError(f"bias field: found strength {strength}; expected at least 0")
    if min(shape) < 2:
        raise InputError(f"bias field: found a grid of {shape} voxels; expected at least 2 along each axis")
    degrees = [d for d in product(range(4), repeat=3) if 1 <= sum(d) <= 3]
    weights = np.zeros((4, 4, 4))
    for degree in degrees:
        weights[degree] = generator.standard_normal() / sum(degree) ** 2
    x, y, z = (np.polynomial.legendre.legvander(np.linspace(-1, 1, n), 3) for n in shape)
    log_field = np.einsum("ijk,xi,yj,zk->xyz", weights, x, y, z, optimize=True)
    log_field -= log_field.mean()
    gain: NDArray[np.float32] = np.exp(strength * log_field / log_field.std()).astype(np.float32)
    return gain


TISSUES: dict[str, Tissue] = {
    # Relaxation: Wansapura et al., J Magn Reson Imaging 1999; water content: Whittall et al., Magn Reson Med 1997.
    "white": Tissue(pd=0.71, t1_s=0.832, t2_s=0.080),
    "grey": Tissue(pd=0.83, t1_s=1.331, t2_s=0.110),
    # T1: Lin et al., J Magn Reson Imaging 2001; T2: Spijkerman et al., MAGMA 2018 (ventricles).
    "csf": Tissue(pd=1.0, t1_s=4.16, t2_s=2.03),
    # Stanisz et al., Magn Reson Med 2005.
    "blood": Tissue(pd=0.87, t1_s=1.93, t2_s=0.275),
    # Glioma varies more between patients than any mean can say. These are round values, longer than normal tissue's
    # as in Nunez-Gonzalez et al., Sci Rep 2022; spread is drawn around them. Solid tumour enhances once it is given
    # contrast agent: 0.17 mmol/l shortens its T1 by 0.8 s, what enhancing glioblastoma showed in the 3-T maps of
    # "Quantitative T1 mapping indicates tumor infiltration beyond the enhancing part of glioblastomas",
    # NMR Biomed 2020 (0.84 ± 0.21 s); oedema lost 0.12 s there.
    "oedema": Tissue(pd=0.87, t1_s=1.40, t2_s=0.180),
    "solid": Tissue(pd=0.87, t1_s=1.50, t2_s=0.165),
    "necrosis": Tissue(pd=0.94, t1_s=2.20, t2_s=0.300),
}
"""Tissues at 3 T, of normal brain and of glioma."""
