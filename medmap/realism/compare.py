"""How near simulated patients are to real ones: two groups of patients in, tables out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.data.cases import ordered
from medmap.data.labelmaps import patient_of
from medmap.errors import InputError
from medmap.realism.measure import CONTRASTS, Measured, measure
from medmap.realism.telling import Telling, tell_apart

SPACING_MM = 0.05
"""Images of different resolution would differ whatever is in them."""


@dataclass(frozen=True)
class Band:
    """One number in both groups.

    real, simulated: 5th, 50th and 95th percentile over patients for whom it is defined; NaN where there is none
    patients:        how many these are, real and simulated
    share:           of simulated patients inside the real 5 to 95 % band
    """

    name: str
    real: tuple[float, float, float]
    simulated: tuple[float, float, float]
    patients: tuple[int, int]
    share: float

    @property
    def inside(self) -> bool | None:
        """Whether the simulated median lies in the real 5 to 95 % band; None where either is undefined."""
        low, middle, high = self.real[0], self.simulated[1], self.real[2]
        return bool(low <= middle <= high) if np.isfinite([low, middle, high]).all() else None

    @property
    def shift(self) -> float:
        """How far apart the medians are, in units of the real band's half width."""
        width = (self.real[2] - self.real[0]) / 2
        return (self.simulated[1] - self.real[1]) / width if width > 0 else np.nan


@dataclass(frozen=True)
class Distance:
    """Wasserstein-1 distance of intensity distributions.

    simulated: mean over simulated patients of the distance from all real ones pooled
    real:      the same of each real patient from all other real ones: the yardstick
    pooled:    distance of all simulated from all real patients pooled
    """

    name: str
    simulated: float
    real: float
    pooled: float


@dataclass(frozen=True)
class Realism:
    """The whole comparison.

    contrast, texture:  one band per number of `Measured`
    histograms, within: one distance per sequence, and per sequence and class
    telling:            AUC real against simulated: from contrasts alone, from all numbers, from small patches of brain
    real, simulated:    what was measured
    """

    contrast: tuple[Band, ...]
    texture: tuple[Band, ...]
    histograms: tuple[Distance, ...]
    within: tuple[Distance, ...]
    telling: Mapping[str, Telling]
    real: tuple[Measured, ...]
    simulated: tuple[Measured, ...]

    @property
    def contrast_inside(self) -> float:
        """Share of the simulated median contrasts that lie in the real 5 to 95 % band."""
        return _share_inside(self.contrast)

    @property
    def texture_inside(self) -> float:
        """The same of the spatial numbers."""
        return _share_inside(self.texture)

    def to_dict(self) -> dict[str, Any]:
        """Plain types; of patients only the simulated ones' numbers."""
        bands = {
            key: [{**asdict(b), "inside": b.inside, "shift": b.shift} for b in table]
            for key, table in (("contrast", self.contrast), ("texture", self.texture))
        }
        return {
            "patients": [len(self.real), len(self.simulated)],
            "contrast_inside": self.contrast_inside,
            "texture_inside": self.texture_inside,
            **bands,
            "histograms": [asdict(d) for d in self.histograms],
            "within": [asdict(d) for d in self.within],
            "auc": {key: asdict(telling) for key, telling in self.telling.items()},
            "simulated": {m.id: m.features for m in self.simulated},
        }


def compare(
    real: Iterable[Case], simulated: Iterable[Case], on_case: Callable[[str], None] = lambda id: None
) -> Realism:
    """Measure all cases with one and the same estimator and compare the two groups.

    real, simulated: upright cases with labels in class indices, as `read_cases` gives them; each is used once and let
                     go, so that generators do
    on_case:         called with the id of each case once it is measured

    Raises InputError for an empty group, voxels of different size, and as `measure` does.
    """
    return compare_measured(*(_measured(cases, on_case) for cases in (real, simulated)))


def compare_measured(real: Sequence[Measured], simulated: Sequence[Measured]) -> Realism:
    """`compare` of what was measured already."""
    _check(real, simulated)
    sequences = ordered(name for m in (*real, *simulated) for name in m.histogram)
    contrasts = [f"{name} {c}/WM" for c in CONTRASTS for name in sequences]
    textures = list(dict.fromkeys(name for m in (*real, *simulated) for name in m.texture))
    within = dict.fromkeys(key for c in real for key in c.within)
    return Realism(
        tuple(_band(name, [m.contrast for m in real], [m.contrast for m in simulated]) for name in contrasts),
        tuple(_band(name, [m.texture for m in real], [m.texture for m in simulated]) for name in textures),
        _distances({name: name for name in sequences}, *([m.histogram for m in group] for group in (real, simulated))),
        _distances({key: " ".join(key) for key in within}, *([m.within for m in group] for group in (real, simulated))),
        {
            "contrasts": _by_patient(real, simulated, contrasts),
            "all numbers": _by_patient(real, simulated, [*contrasts, *textures]),
            "patches": _by_patch(real, simulated),
        },
        tuple(real),
        tuple(simulated),
    )


def wasserstein(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Wasserstein-1 distance of two samples, ∫ |Q_a(u) − Q_b(u)| du over their quantile functions.

    >>> wasserstein(np.array([0.0, 1.0]), np.array([2.0, 3.0]))
    2.0
    """
    u = (np.arange(400) + 0.5) / 400
    one, two = (np.quantile(x, u, method="inverted_cdf") for x in (a, b))
    return float(np.abs(one - two).mean())


def _measured(cases: Iterable[Case], on_case: Callable[[str], None]) -> list[Measured]:
    found = []
    for case in cases:
        found.append(measure(case))
        on_case(case.id)
    return found


def _check(real: Sequence[Measured], simulated: Sequence[Measured]) -> None:
    for name, group in (("real", real), ("simulated", simulated)):
        if not group:
            raise InputError(f"no {name} patient; at least one of each kind is needed")
    first = real[0]
    for other in (*real, *simulated):
        if np.abs(np.subtract(other.spacing_mm, first.spacing_mm)).max() > SPACING_MM:
            raise InputError(
                f"case {other.id} has voxels of {_mm(other)}, case {first.id} of {_mm(first)}; sharpness and noise "
                "depend on that: compare images of one spacing"
            )


def _mm(m: Measured) -> str:
    return "×".join(f"{mm:g}" for mm in m.spacing_mm) + " mm"


def _band(name: str, real: Sequence[Mapping[str, float]], simulated: Sequence[Mapping[str, float]]) -> Band:
    one, two = (_defined([numbers.get(name, np.nan) for numbers in group]) for group in (real, simulated))
    a, b = (_percentiles(values) for values in (one, two))
    share = float(np.mean((two >= a[0]) & (two <= a[2]))) if one.size and two.size else np.nan
    return Band(name, a, b, (int(one.size), int(two.size)), share)


def _defined(values: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.array(values, np.float64)
    there: NDArray[np.float64] = numbers[np.isfinite(numbers)]
    return there


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    if not values.size:
        return (np.nan, np.nan, np.nan)
    low, middle, high = (float(v) for v in np.percentile(values, (5, 50, 95)))
    return low, middle, high


def _share_inside(bands: Sequence[Band]) -> float:
    known = [band.inside for band in bands if band.inside is not None]
    return float(np.mean(known)) if known else np.nan


def _distances(
    names: Mapping[Any, str],
    real: Sequence[Mapping[Any, NDArray[np.float64]]],
    simulated: Sequence[Mapping[Any, NDArray[np.float64]]],
) -> tuple[Distance, ...]:
    found = []
    for key, name in names.items():
        one, two = ([m[key] for m in group if key in m] for group in (real, simulated))
        if len(one) > 1 and two:
            pool = np.concatenate(one)
            others = [np.concatenate(one[:i] + one[i + 1 :]) for i in range(len(one))]
            own = float(np.mean([wasserstein(q, rest) for q, rest in zip(one, others, strict=True)]))
            away = float(np.mean([wasserstein(q, pool) for q in two]))
            found.append(Distance(name, away, own, wasserstein(np.concatenate(two), pool)))
    return tuple(found)


def _by_patient(real: Sequence[Measured], simulated: Sequence[Measured], names: Sequence[str]) -> Telling:
    one, two = (
        np.array([[m.features.get(name, np.nan) for name in names] for m in group]) for group in (real, simulated)
    )
    return tell_apart(one, two, names, *([patient_of(m.id) for m in group] for group in (real, simulated)))


def _by_patch(real: Sequence[Measured], simulated: Sequence[Measured]) -> Telling:
    everybody = [*real, *simulated]
    names = [name for name in everybody[0].patch_names if all(name in m.patch_names for m in everybody)]
    tables, owners = [], []
    for group in (real, simulated):
        tables.append(np.concatenate([m.patches[:, [m.patch_names.index(n) for n in names]] for m in group]))
        owners.append([patient_of(m.id) for m in group for _ in range(len(m.patches))])
    return tell_apart(tables[0], tables[1], names, *owners)
