"""A number predicted for a new patient, with an interval that held its promise on patients who were not looked at.

A table has several rows a patient, each of some *kind* (for medmap: the combination of sequences given). With features
x, centred and 0 where undefined, kind k and truth y::

    ŷ = a + b·x + d_k        least squares + m Σ_k d_k²,  b ≥ 0: a feature never speaks against itself
    s² = mean of (y − ŷ)² over all rows of a kind, m times that of all kinds added to it

d_k and s_k are thus shrunken towards what all kinds have in common, as if there were m patients more of whom nothing
but that is known. Rows of one patient and kind share a weight of 1.

The interval ŷ ± q·s_k is conformal over patients: each is left out once, and q is the least number that
|y − ŷ|/s_k does not exceed in ``level`` of them plus one, each patient counting once. Sources: Lee, Barber and Willett,
Distribution-free inference with hierarchical data, 2023 (weights of rows); Barber et al., Predictive inference with the
jackknife+, Annals of Statistics 2021 (leaving out).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PRIOR_PATIENTS = 4.0
"""m of the head of this file."""

PARTS = 20
"""Patients are left out one by one up to so many, beyond that in so many parts."""

LEAST_SPREAD = 0.01
"""No interval is narrower than a multiple of this: rows that a fit meets exactly do not promise that the next will."""

Floats = NDArray[np.float64]
Names = NDArray[Any] | Sequence[str]


class Rows(NamedTuple):
    """A table of N rows.

    patients: N names; kinds: N names; features: Float64[N P], NaN where undefined; truth: Float64[N]
    """

    patients: NDArray[Any]
    kinds: NDArray[Any]
    features: Floats
    truth: Floats

    def where(self, rows: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(self.patients[rows], self.kinds[rows], self.features[rows], self.truth[rows])


@dataclass(frozen=True)
class Fit:
    """ŷ and s_k of the head of this file.

    centre, slopes: one number a feature; deviations, spreads: {kind: d_k}, {kind: s_k}
    """

    intercept: float
    centre: tuple[float, ...]
    slopes: tuple[float, ...]
    deviations: Mapping[str, float]
    spreads: Mapping[str, float]

    def predict(self, features: Floats, kinds: Names) -> Floats:
        """Float64[N] ŷ of features Float64[N P]."""
        deviations = np.array([self.deviations[kind] for kind in kinds])
        predicted: Floats = self.intercept + _centred(features, self.centre) @ np.array(self.slopes) + deviations
        return predicted

    def spread(self, kinds: Names) -> Floats:
        """Float64[N] s_k."""
        return np.array([self.spreads[kind] for kind in kinds])


def fit(rows: Rows, kinds: Sequence[str] | None = None) -> Fit:
    """Least squares over a table; ``kinds`` without a row have the deviation 0 and the common spread.

    >>> same = np.array([[0.2], [0.4], [0.6], [0.8]])
    >>> found = fit(Rows(np.array(list("abcd")), np.array(["k"] * 4), same, same[:, 0]))
    >>> round(found.slopes[0], 4), found.predict(np.array([[0.5]]), ["k"]).round(4).tolist()
    (1.0, [0.5])
    """
    names = sorted(set(map(str, rows.kinds)) if kinds is None else kinds)
    weights = _weights(rows.patients, rows.kinds)
    defined = np.isfinite(rows.features)
    some = np.maximum(defined.sum(axis=0), 1)
    centre = np.where(defined, rows.features, 0).sum(axis=0) / some
    features = _centred(rows.features, centre)
    columns = np.array(rows.kinds)[:, None] == np.array(names)[None]
    used = [i for i in range(features.shape[1]) if features[:, i].any()]
    while True:
        design = np.hstack([np.ones((len(features), 1)), features[:, used], columns])
        penalty = np.array([0.0, *(1e-6 for _ in used), *(PRIOR_PATIENTS for _ in names)])
        solved = np.linalg.solve(
            design.T @ (weights[:, None] * design) + np.diag(penalty), design.T @ (weights * rows.truth)
        )
        found = solved[1 : 1 + len(used)]
        if not used or found.min() >= 0:
            break
        del used[int(found.argmin())]
    slopes = np.zeros(features.shape[1])
    slopes[used] = found
    squares = weights * (rows.truth - design @ solved) ** 2
    common = squares.sum() / weights.sum()
    shared = (squares @ columns + PRIOR_PATIENTS * common) / (weights @ columns + PRIOR_PATIENTS)
    spreads = np.maximum(np.sqrt(shared), LEAST_SPREAD)
    deviations = dict(zip(names, map(float, solved[1 + len(used) :]), strict=True))
    return Fit(
        float(solved[0]),
        tuple(centre.tolist()),
        tuple(slopes.tolist()),
        deviations,
        dict(zip(names, map(float, spreads), strict=True)),
    )


def quantile(scores: Floats, patients: Names, level: float) -> float:
    """The least score that a share ``level`` of K patients and one more stays at or below; inf where K is too small.

    Every patient has the weight 1/(K + 1), in equal parts of it its rows.

    >>> quantile(np.array([0.1, 0.2, 0.3, 0.4]), ["a", "b", "c", "d"], 0.8), quantile(np.array([0.1]), ["a"], 0.8)
    (0.4, inf)
    """
    count = Counter(map(str, patients))
    weights = np.array([1 / count[str(patient)] for patient in patients]) / (len(count) + 1)
    order = np.argsort(scores, kind="stable")
    reached = np.flatnonzero(np.cumsum(weights[order]) >= level - 1e-9)
    return float(scores[order][reached[0]]) if reached.size else np.inf


def left_out(rows: Rows) -> Iterator[tuple[NDArray[np.bool_], Fit]]:
    """Bool[N] of the rows of some patients, and the fit of all others: every patient once, never on both sides."""
    kinds = sorted(set(map(str, rows.kinds)))
    names = sorted(set(map(str, rows.patients)))
    parts = min(len(names), PARTS)
    for part in range(parts):
        out = np.isin(rows.patients, names[part::parts])
        yield out, fit(rows.where(~out), kinds)


def scores(rows: Rows) -> Floats:
    """Float64[N] |y − ŷ|/s_k, each by a fit that did not see the row's patient."""
    found = np.empty(len(rows.truth))
    for out, without in left_out(rows):
        kinds = rows.kinds[out]
        found[out] = np.abs(rows.truth[out] - without.predict(rows.features[out], kinds)) / without.spread(kinds)
    return found


def conformal(rows: Rows, level: float) -> tuple[Fit, float]:
    """The fit of all rows, and q."""
    return fit(rows), quantile(scores(rows), rows.patients, level)


class Tried(NamedTuple):
    """What was said of every row by everything that was fitted without its patient: ŷ, q·s_k; Float64[N] each."""

    predicted: Floats
    reach: Floats


def tried(rows: Rows, level: float) -> Tried:
    """Predicts every patient from the others alone, quantile included."""
    predicted, reach = np.empty(len(rows.truth)), np.empty(len(rows.truth))
    for out, without in left_out(rows):
        rest, kinds = rows.where(~out), rows.kinds[out]
        predicted[out] = without.predict(rows.features[out], kinds)
        reach[out] = quantile(scores(rest), rest.patients, level) * without.spread(kinds)
    return Tried(predicted, reach)


def others_mean(rows: Rows) -> Floats:
    """Float64[N] mean truth of the other patients' rows of a row's kind: what is to be expected without any feature."""
    found = np.full(len(rows.truth), np.nan)
    for patient, kind in sorted(set(zip(map(str, rows.patients), map(str, rows.kinds), strict=True))):
        alike, own = rows.kinds == kind, rows.patients == patient
        if (alike & ~own).any():
            found[alike & own] = rows.truth[alike & ~own].mean()
    return found


def _weights(patients: NDArray[Any], kinds: NDArray[Any]) -> Floats:
    pairs = list(zip(map(str, patients), map(str, kinds), strict=True))
    count = Counter(pairs)
    return np.array([1 / count[pair] for pair in pairs])


def _centred(features: Floats, centre: Sequence[float] | Floats) -> Floats:
    away: Floats = features - np.asarray(centre)
    return np.where(np.isfinite(away), away, 0.0)
