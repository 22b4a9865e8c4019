"""Every number that is drawn for a simulated patient: head, tumour, what it is made of, how it was scanned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmap.core.signal import TISSUES, null_inversion_time
from medmap.errors import InputError
from medmap.phantom.anatomy import Head, draw_head
from medmap.phantom.tumour import Tumour, draw_tumour


@dataclass(frozen=True)
class Scan:
    """How one sequence of one patient was taken: times in s, angles in rad.

    kind:             spin_echo, spoiled_gradient_echo or inversion_recovery
    tr_s, te_s, ti_s: repetition, echo and inversion time; ti_s is 0 where there is no inversion
    flip_rad:         flip angle of a gradient echo; 0 elsewhere
    gain:             scanner units per unit of signal
    bias:             standard deviation of the log of the coil's gain
    blur_mm:          standard deviation of the point spread
    uncovered_mm:     thickness that the slices miss at the top (> 0) or the bottom (< 0) of the brain
    """

    kind: str
    tr_s: float
    te_s: float
    ti_s: float
    flip_rad: float
    gain: float
    bias: float
    blur_mm: float
    uncovered_mm: float


@dataclass(frozen=True)
class Pathology:
    """What the tumour is made of, and the contrast agent.

    oedema:       share of oedema in a voxel labelled so, at the tumour's heart; it thins out outwards
    solid:        share of solid tumour, not fluid, in the voxels labelled necrotic or non-enhancing
    agent_mmol_l: concentration of contrast agent in {tissue}
    halo_mm:      width of the unlabelled bright rim round the ventricles of older patients
    relaxation:   {tissue: factors on PD, T1, T2} of this patient
    """

    oedema: float
    solid: float
    agent_mmol_l: Mapping[str, float]
    halo_mm: float
    relaxation: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Patient:
    """Every number that was drawn for a patient; with the seed, which also draws the random fields, all there is."""

    seed: int
    head: Head
    tumour: Tumour
    pathology: Pathology
    scans: Mapping[str, Scan]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest."""
        return asdict(self)


def draw_patient(seed: int) -> Patient:
    """Draw head, tumour, pathology and protocol of all sequences.

    Raises InputError for a negative seed.

    >>> draw_patient(7) == draw_patient(7), sorted(draw_patient(7).scans)
    (True, ['t1c', 't1n', 't2f', 't2w'])
    """
    if seed < 0:
        raise InputError(f"seed: found {seed}; expected a whole number of at least 0")
    return Patient(
        seed=seed,
        head=draw_head(stream(seed, "head")),
        tumour=draw_tumour(stream(seed, "tumour")),
        pathology=_draw_pathology(stream(seed, "pathology")),
        scans=_draw_scans(stream(seed, "scans")),
    )


def stream(seed: int, part: str) -> np.random.Generator:
    """Random numbers of one part of a patient, independent of every other part's."""
    return np.random.default_rng([seed, *part.encode()])


def _draw_scans(generator: np.random.Generator) -> dict[str, Scan]:
    between = generator.uniform
    t1 = _draw_t1(generator)
    flair_tr = between(8.0, 11.0)
    csf_null = null_inversion_time(TISSUES["csf"].t1_s, flair_tr)
    timing: dict[str, tuple[str, float, float, float, float]] = {
        "t1n": t1,
        "t1c": t1,
        "t2w": ("spin_echo", between(3.0, 6.0), between(0.075, 0.1), 0.0, 0.0),
        # operators stop a little before the null, since fluid of shorter T1 matters too
        "t2f": ("inversion_recovery", flair_tr, between(0.09, 0.13), csf_null * between(0.88, 1.0), 0.0),
    }
    return {name: _draw_scan(values, generator) for name, values in timing.items()}


def _draw_t1(generator: np.random.Generator) -> tuple[str, float, float, float, float]:
    if generator.random() < 0.5:
        return ("spin_echo", generator.uniform(0.45, 0.75), generator.uniform(0.008, 0.015), 0.0, 0.0)
    flip_rad = np.deg2rad(generator.uniform(15, 25))
    return ("spoiled_gradient_echo", generator.uniform(0.012, 0.025), generator.uniform(0.002, 0.005), 0.0, flip_rad)


def _draw_scan(timing: tuple[str, float, float, float, float], generator: np.random.Generator) -> Scan:
    kind, *numbers = timing
    tr_s, te_s, ti_s, flip_rad = (float(number) for number in numbers)
    short = generator.random() < 0.15
    return Scan(
        kind=kind,
        tr_s=tr_s,
        te_s=te_s,
        ti_s=ti_s,
        flip_rad=flip_rad,
        gain=float(np.exp(generator.normal(np.log(400.0), 0.6))),
        bias=float(generator.uniform(0.04, 0.18)),
        blur_mm=float(generator.uniform(0.5, 1.1)),
        uncovered_mm=float(generator.choice([-1, 1]) * generator.uniform(3, 10)) if short else 0.0,
    )


def _draw_pathology(generator: np.random.Generator) -> Pathology:
    between = generator.uniform
    return Pathology(
        oedema=float(between(0.7, 1.0)),
        solid=float(between(0.1, 0.9)),
        agent_mmol_l={
            "solid": float(np.exp(np.clip(generator.normal(np.log(0.16), 0.3), np.log(0.12), np.log(0.3)))),
            "blood": float(between(0.15, 0.5)),
            "oedema": float(between(0.0, 0.02)),
            "necrosis": float(between(0.0, 0.03)),
        },
        halo_mm=float(np.clip(generator.normal(0.5, 1.5), 0.0, 3.0)),
        relaxation=_draw_relaxation(generator),
    )


def _draw_relaxation(generator: np.random.Generator) -> dict[str, tuple[float, float, float]]:
    """Factors on PD, T1, T2. A tumour's compartments vary together: T2-FLAIR alone shall not tell rim from core."""
    shared = generator.normal(0.0, (0.0, 0.1, 0.12))
    factors = {}
    for tissue in TISSUES:
        sick = tissue in ("oedema", "solid", "necrosis")
        own = generator.normal(0.0, (0.02, 0.06, 0.06) if sick else (0.02, 0.04, 0.04))
        pd, t1, t2 = np.exp(own + shared if sick else own).tolist()
        factors[tissue] = (pd, t1, t2)
    return factors
