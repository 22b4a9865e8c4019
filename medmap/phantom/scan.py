"""How a sequence is taken: its timing, the signal of each tissue, and what the scanner adds to the picture.

A `Scan` is numbers only. `SEQUENCES` draws the timing of any modality that has a signal equation here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from medmap.core.box import Index3
from medmap.core.signal import (
    bias_field,
    diffusion,
    enhanced_t1,
    enhanced_t2,
    inversion_recovery,
    null_inversion_time,
    rician,
    spin_echo,
    spoiled_gradient_echo,
)
from medmap.core.tissues import relaxivity, tissue
from medmap.phantom.space import along_axes, gaussian_matrix

Triple = tuple[float, float, float]
Matrix = NDArray[np.floating[Any]]

PROPERTIES = ("pd", "t1_s", "t2_s", "t2star_s", "adc_mm2_s")

FLOWING = ("blood", "artery", "portal_vein", "hepatic_vein")
"""Tissues that leave the slice between the pulses of a spin echo."""


@dataclass(frozen=True)
class Timing:
    """A pulse sequence: times in s, angle in rad.

    kind:             spin_echo, spoiled_gradient_echo, inversion_recovery, or adc (the map computed from diffusion)
    tr_s, te_s, ti_s: repetition, echo and inversion time
    flip_rad:         flip angle of a gradient echo
    b_s_mm2:          diffusion weighting
    fat_left:         what fat suppression leaves of the signal of fat; 1: none was used
    flow_left:        what spin echoes see of blood, which flows out of the slice between their pulses; 1: all of it
    phase:            how long after contrast agent it was taken, a key of the patient's concentrations; "": before
    """

    kind: str
    tr_s: float = 0.0
    te_s: float = 0.0
    ti_s: float = 0.0
    flip_rad: float = 0.0
    b_s_mm2: float = 0.0
    phase: str = ""
    fat_left: float = 1.0
    flow_left: float = 1.0


@dataclass(frozen=True)
class Scan:
    """One sequence of one patient.

    timing:        the pulse sequence
    slice_axis:    0 … 2, across the slices; slice_mm: their thickness; gap: between them, relative to that
    in_plane_mm:   resolution within a slice, and in all directions where slices are thin
    ringing:       0: k-space ends softly; 1: it is cut off (Gibbs)
    shift_mm:      what registration left
    noise:         σ of the complex noise relative to this patient's others
    blur_mm:       standard deviation of the blur that interpolation has left, on signal and noise
    texture:       standard deviation of what varies within a tissue, over some mm
    bias:          standard deviation of the log of the coil's gain
    ghost:         amplitude of the ghost; ghost_shift: its distance as a share of the field of view, along ghost_axis
    gain:          scanner units per unit of signal
    uncovered_mm:  thickness that the slices miss at the top (> 0) or the bottom (< 0)
    randomness:    0 … 1; the scan has random contrast where this is below the weight of the randomised mode
    random_signal: {tissue: signal} in that case; around the physical one where ``around`` > 0
    around:        standard deviation of the log of signal over physical signal; 0: any signal
    gamma_score:   −1 … 1; log of the exponent that bends random contrast, relative to the largest of the set
    """

    timing: Timing
    slice_axis: int
    slice_mm: float
    gap: float
    in_plane_mm: float
    ringing: float
    shift_mm: Triple
    noise: float
    blur_mm: float
    texture: float
    bias: float
    ghost: float
    ghost_shift: float
    ghost_axis: int
    gain: float
    uncovered_mm: float
    randomness: float
    random_signal: Mapping[str, float]
    around: float
    gamma_score: float = 0.0


def draw_scan(timing: Timing, tissues: Sequence[str], generator: np.random.Generator) -> Scan:
    """A random scan with that timing."""
    between, chance = generator.uniform, generator.random
    thick = chance() < 0.65
    around = float(between(0.05, 0.4)) if chance() < 0.5 else 0.0
    values = generator.standard_normal(len(tissues)) if around else between(0.05, 1.0, len(tissues))
    return Scan(
        timing=timing,
        slice_axis=int(generator.choice(3, p=(0.1, 0.15, 0.75))),
        slice_mm=float(between(3.0, 6.0)) if thick else 1.0,
        gap=float(between(0.0, 0.25)) if thick else 0.0,
        in_plane_mm=float(between(0.8, 1.5)),
        ringing=float(between(0, 1)),
        shift_mm=_triple(np.clip(generator.normal(0, 0.3, 3), -1, 1)),
        noise=float(np.exp(np.clip(generator.normal(0.0, 0.5), -1, 1.2))),
        blur_mm=float(between(0.6, 1.2)),
        texture=float(between(0.01, 0.05)),
        bias=float(between(0.02, 0.12)),
        ghost=float(between(0.01, 0.06)) if chance() < 0.25 else 0.0,
        ghost_shift=float(generator.choice((0.5, 0.25, 0.125))),
        ghost_axis=int(generator.choice(2)),
        gain=float(np.exp(generator.normal(np.log(400.0), 0.6))),
        uncovered_mm=float(generator.choice((-1, 1)) * between(3, 12)) if chance() < 0.1 else 0.0,
        randomness=float(chance()),
        random_signal=dict(zip(tissues, values.tolist(), strict=True)),
        around=around,
    )


def signals(
    scan: Scan,
    field_t: float,
    relaxation: Mapping[str, Mapping[str, float]],
    agent_mmol_l: Mapping[str, Mapping[str, float]],
    randomised: float,
) -> dict[str, float]:
    """Signal of each pure tissue, in units of the proton density of water.

    relaxation:   {tissue: {pd, t1_s, t2_s, t2star_s, adc_mm2_s}} of this patient
    agent_mmol_l: {phase: contrast agent in each tissue}
    randomised:   weight of the randomised mode: the share of scans whose contrast is not physical
    """
    physical = _physical(scan.timing, field_t, relaxation, agent_mmol_l)
    if scan.randomness >= randomised:
        return physical
    if scan.around:
        return {name: value * float(np.exp(scan.around * scan.random_signal[name])) for name, value in physical.items()}
    return {name: scan.random_signal[name] for name in physical}


def _physical(
    timing: Timing,
    field_t: float,
    relaxation: Mapping[str, Mapping[str, float]],
    agent_mmol_l: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    pd, t1, t2, t2star, adc = (
        torch.tensor([properties[key] for properties in relaxation.values()], dtype=torch.float64) for key in PROPERTIES
    )
    if timing.phase:
        there = agent_mmol_l[timing.phase]
        agent = torch.tensor([there.get(name, 0.0) for name in relaxation], dtype=torch.float64)
        strength = relaxivity(field_t)
        t1 = enhanced_t1(t1, agent, strength.r1.mean)
        t2, t2star = (enhanced_t2(t, agent, strength.r2.mean) for t in (t2, t2star))
    if timing.kind == "adc":
        measured = adc * 1e3
    elif timing.kind == "spoiled_gradient_echo":
        measured = spoiled_gradient_echo(pd, t1, t2star, timing.tr_s, timing.te_s, timing.flip_rad)
    elif timing.kind == "inversion_recovery":
        measured = inversion_recovery(pd, t1, t2, timing.tr_s, timing.te_s, timing.ti_s).abs()
    else:
        measured = spin_echo(pd, t1, t2, timing.tr_s, timing.te_s)
    if timing.b_s_mm2:
        measured = diffusion(measured, timing.b_s_mm2, adc)
    special = {"fat": timing.fat_left, **dict.fromkeys(FLOWING, timing.flow_left)}
    left = (special.get(name, 1.0) for name in relaxation)
    return {name: value * share for name, value, share in zip(relaxation, measured.tolist(), left, strict=True)}


def acquire(
    scan: Scan,
    signal: Float[Tensor, "X Y Z"],
    spacing_mm: float,
    noise: Float[Tensor, "2 X Y Z"],
    sigma: float,
    bias_coefficients: Tensor,
) -> Float[Tensor, "X Y Z"]:
    """What the scanner makes of a signal, brought back onto the signal's grid: resolution, shift, ghost, noise, gain.

    noise: standard normal, real and imaginary channel; sigma: its σ in the signal's unit, per acquired voxel
    """
    x, y, z = shape = signal.shape
    taken, spread = (_on(signal.device, matrices) for matrices in acquisition(scan, (x, y, z), spacing_mm))
    image = along_axes(signal, taken)
    if scan.ghost:
        n = shape[scan.ghost_axis]
        image = image + scan.ghost * image.roll(round(scan.ghost_shift * n), dims=scan.ghost_axis)
    image = rician(image, along_axes(noise, spread), sigma)
    if scan.timing.kind == "adc":  # the ratio of two images, in which the coil's gain cancels
        return image
    return image * bias_field((x, y, z), scan.bias, bias_coefficients)


def bent(image: Float[Tensor, "X Y Z"], exponent: float) -> Float[Tensor, "X Y Z"]:
    """x' = max x · (x / max x)^γ: dark tissues are spread (γ < 1) or pressed together (γ > 1); the brightest stays.

    image: magnitudes, 0 or more; exponent: γ > 0
    """
    top = image.amax().clamp(min=1e-12)
    return top * (image / top) ** exponent


def acquisition(scan: Scan, shape: Index3, spacing_mm: float) -> tuple[list[Matrix], list[Matrix]]:
    """The scan as one matrix per axis, for the signal (resolution, shift, slices, and the interpolation back onto the
    grid) and for the noise (the interpolation alone: it is drawn per acquired voxel)."""
    blurs = [gaussian_matrix(n, scan.blur_mm / spacing_mm).numpy() for n in shape]
    noise = list(blurs)
    signal = [
        blur @ _in_plane(n, spacing_mm, scan.in_plane_mm, scan.ringing, shift)
        for blur, n, shift in zip(blurs, shape, scan.shift_mm, strict=True)
    ]
    if scan.slice_mm > spacing_mm:
        axis, n = scan.slice_axis, shape[scan.slice_axis]
        back, averaged = _slices(n, spacing_mm, scan.slice_mm, scan.gap)
        signal[axis] = blurs[axis] @ back @ averaged
        # a slice's noise is that drawn for the voxel in its middle, so scans of other slices share it where they meet
        middle = np.rint(averaged @ np.arange(n)).astype(int)
        noise[axis] = blurs[axis] @ back @ np.eye(n)[middle]
    return signal, noise


def _on(device: torch.device, matrices: Sequence[Matrix]) -> list[Float[Tensor, "n n"]]:
    return [torch.tensor(matrix, dtype=torch.float32, device=device) for matrix in matrices]


def _in_plane(n: int, spacing_mm: float, resolution_mm: float, ringing: float, shift_mm: float) -> Matrix:
    """Low-pass in k-space: what lies beyond 1/(2·resolution) was not acquired. A cut-off rings, a Hann window does not;
    the shift is a phase."""
    frequency = np.fft.fftfreq(n, spacing_mm)  # cycles/mm
    relative = np.abs(frequency) * 2 * resolution_mm
    window = (relative <= 1.0) * (ringing + (1 - ringing) * np.cos(np.pi / 2 * np.clip(relative, 0, 1)) ** 2)
    if ringing < 1 and relative.max() < 1:  # all of k-space was acquired: nothing to soften
        window = np.ones(n)
    transfer = window * np.exp(-2j * np.pi * frequency * shift_mm)
    index = np.arange(n)
    kernel = np.fft.ifft(transfer).real
    matrix: Matrix = kernel[(index[:, None] - index) % n]
    return matrix


def _slices(n: int, spacing_mm: float, thickness_mm: float, gap: float) -> tuple[Matrix, Matrix]:
    """Matrices [n slices] and [slices n]: a slice averages the voxels it cuts; between slices, linear interpolation."""
    step = thickness_mm * (1 + gap)
    count = max(2, int(np.ceil(n * spacing_mm / step)))
    centres = (np.arange(count) - (count - 1) / 2) * step
    edges = (np.arange(n + 1) - n / 2) * spacing_mm
    low, high = centres - thickness_mm / 2, centres + thickness_mm / 2
    overlap = np.clip(np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1]), 0, None)
    averaged = overlap / np.maximum(overlap.sum(axis=1, keepdims=True), 1e-6)
    voxels = (edges[1:] + edges[:-1]) / 2
    back = np.stack([np.interp(voxels, centres, row) for row in np.eye(count)], axis=1)
    return back, averaged


def draw_relaxation(
    name: str, field_t: float, scores: Mapping[str, float], generator: np.random.Generator
) -> dict[str, float]:
    """Properties of a tissue in one patient: log-normal round the table's means.

    scores: normal scores shared with other tissues, for t1_s and t2_s
    """
    table = tissue(name, field_t)
    drawn = {}
    for key in PROPERTIES:
        spread = getattr(table, key)
        score = 0.7 * float(np.clip(generator.standard_normal(), -2.5, 2.5)) + scores.get(key, 0.0)
        drawn[key] = spread.mean * float(np.exp(spread.sd / spread.mean * score))
    drawn["t2star_s"] = min(drawn["t2star_s"], drawn["t2_s"])
    return drawn


def _t1(field_t: float, generator: np.random.Generator) -> Timing:
    kind = generator.random()
    if kind < 0.45:
        te, left = generator.uniform(0.008, 0.015), generator.uniform(0.3, 1.0)
        return Timing("spin_echo", generator.uniform(0.45, 0.75), te, flow_left=left)
    if kind < 0.85:
        flip = float(np.deg2rad(generator.uniform(15, 30)))
        return Timing(
            "spoiled_gradient_echo", generator.uniform(0.012, 0.03), generator.uniform(0.002, 0.005), 0.0, flip
        )
    ti = generator.uniform(0.8, 1.1)
    return Timing("inversion_recovery", generator.uniform(1.6, 2.4), generator.uniform(0.002, 0.005), ti)


def _t1_enhanced(field_t: float, generator: np.random.Generator) -> Timing:
    plain = _t1(field_t, generator)
    return replace(plain, phase="late")


def _t2(field_t: float, generator: np.random.Generator) -> Timing:
    tr, te = generator.uniform(3.0, 6.0), generator.uniform(0.07, 0.1)
    return Timing("spin_echo", tr, te, flow_left=generator.uniform(0.05, 0.7))


def _flair(field_t: float, generator: np.random.Generator) -> Timing:
    tr = generator.uniform(8.0, 11.0)
    null = float(null_inversion_time(tissue("csf", field_t).t1_s.mean, tr))
    # operators stop a little before the null, since fluid of shorter T1 matters too
    te, ti = generator.uniform(0.09, 0.14), null * generator.uniform(0.93, 1.02)
    return Timing("inversion_recovery", tr, te, ti, flow_left=generator.uniform(0.05, 0.7))


def _pd(field_t: float, generator: np.random.Generator) -> Timing:
    return Timing("spin_echo", generator.uniform(2.5, 4.0), generator.uniform(0.01, 0.03))


def _t2star(field_t: float, generator: np.random.Generator) -> Timing:
    flip = float(np.deg2rad(generator.uniform(15, 25)))
    return Timing("spoiled_gradient_echo", generator.uniform(0.5, 0.8), generator.uniform(0.015, 0.03), 0.0, flip)


def _dwi(field_t: float, generator: np.random.Generator) -> Timing:
    return Timing("spin_echo", generator.uniform(4.0, 8.0), generator.uniform(0.07, 0.1), b_s_mm2=1000.0)


def _adc(field_t: float, generator: np.random.Generator) -> Timing:
    return Timing("adc")


def _triple(values: Matrix) -> Triple:
    x, y, z = (float(value) for value in values)
    return x, y, z


SEQUENCES: dict[str, Callable[[float, np.random.Generator], Timing]] = {
    "t1n": _t1,
    "t1c": _t1_enhanced,
    "t2w": _t2,
    "t2f": _flair,
    "pd": _pd,
    "t2star": _t2star,
    "dwi": _dwi,
    "adc": _adc,
}
"""Modalities of the head with a signal equation; a new one is a function here and a row."""
