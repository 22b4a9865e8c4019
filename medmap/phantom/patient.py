"""Every number that is drawn for a simulated patient: body, what it is made of, how it was scanned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medmap.errors import InputError
from medmap.phantom.brain import BRAIN
from medmap.phantom.liver import LIVER
from medmap.phantom.organ import Organ
from medmap.phantom.scan import Scan, draw_relaxation, draw_scan

SHARE_OF_1_5_T = 0.4


@dataclass(frozen=True)
class Patient:
    """Every number that was drawn for a patient; with the seed, which also draws the random fields, all there is.

    field_t:      field strength, T
    body:         anatomy and disease, as the organ draws them
    relaxation:   {tissue: {pd, t1_s, t2_s, t2star_s, adc_mm2_s}}
    agent_mmol_l: {phase: {tissue: concentration of contrast agent}}
    scans:        {modality: how it was taken}
    """

    seed: int
    organ: str
    field_t: float
    body: Any
    relaxation: Mapping[str, Mapping[str, float]]
    agent_mmol_l: Mapping[str, Mapping[str, float]]
    scans: Mapping[str, Scan]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest."""
        return asdict(self)


def draw_patient(seed: int, organ: str = "brain", *, operated: bool = False, grown: bool = True) -> Patient:
    """Draw anatomy, disease and the protocol of all sequences.

    Raises InputError for a negative seed and for an unknown organ.

    >>> draw_patient(7) == draw_patient(7), sorted(draw_patient(7).scans)
    (True, ['adc', 'dwi', 'pd', 't1c', 't1n', 't2f', 't2star', 't2w'])
    """
    kind = organ_named(organ)
    field_t = 1.5 if stream(seed, "field").random() < SHARE_OF_1_5_T else 3.0
    return Patient(
        seed=seed,
        organ=organ,
        field_t=field_t,
        body=kind.draw({part: stream(seed, part) for part in kind.drawn}, operated, grown),
        relaxation=_draw_relaxation(kind, field_t, stream(seed, "relaxation")),
        agent_mmol_l=kind.agent(stream(seed, "agent")),
        scans={name: _draw_scan(kind, name, field_t, seed) for name in kind.sequences},
    )


def stream(seed: int, part: str) -> np.random.Generator:
    """Random numbers of one part of a patient, independent of every other part's. Raises InputError for a seed < 0."""
    if seed < 0:
        raise InputError(f"seed: found {seed}; expected a whole number of at least 0")
    return np.random.default_rng([seed, *part.encode()])


def seed_of(seed: int, number: int) -> int:
    """The seed of patient ``number`` of a set: a written set and a stream of the same seed hold the same patients."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def organ_named(name: str) -> Organ:
    """An organ by name. Raises InputError with the list of names."""
    if name not in ORGANS:
        raise InputError(f"organ {name!r}: not simulated; expected one of {', '.join(ORGANS)}")
    return ORGANS[name]


def _draw_scan(organ: Organ, name: str, field_t: float, seed: int) -> Scan:
    generator = stream(seed, f"scan {name}")
    scan = draw_scan(organ.sequences[name](field_t, generator), tuple(organ.tissues), generator)
    return replace(scan, gamma_score=float(stream(seed, f"gamma {name}").uniform(-1, 1)))


def _draw_relaxation(organ: Organ, field_t: float, generator: np.random.Generator) -> dict[str, dict[str, float]]:
    """A tumour's compartments vary together: T2-FLAIR alone shall not tell rim from core."""
    shared = dict(zip(("t1_s", "t2_s"), 0.7 * generator.standard_normal(2), strict=True))
    return {
        name: draw_relaxation(row, field_t, shared if name in organ.sick else {}, generator)
        for name, row in organ.tissues.items()
    }


ORGANS: dict[str, Organ] = {"brain": BRAIN, "liver": LIVER}
