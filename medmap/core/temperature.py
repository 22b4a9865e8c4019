"""A temperature a kind of answer, so that of the voxels given a probability of 0.7 seven in ten are what was said.

Class probabilities p are raised to a power and normalised, for one network the same as dividing its logits by T::

    q_c = p_c^(1/T) / Σ_j p_j^(1/T)        T > 1: less sure, T < 1: surer; the largest stays the largest
    ℓ(T) = −mean over voxels of log q_t    t: the true class

ℓ is averaged over the voxels of an answer, over the answers of a patient and kind, then over patients. T of a kind (for
medmap: the combination of sequences given) minimises Σ ℓ over its patients + m · the mean ℓ of all kinds: as if there
were m patients more of whom nothing but what all kinds have in common is known. Source: Guo et al., On calibration of
modern neural networks, ICML 2017.

Predicted and found are compared in bins of equal width; the expected calibration error is::

    ECE = Σ_bins n_b/N · |mean probability − share that was true|
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medmap.core.conformal import PARTS, PRIOR_PATIENTS, Floats

TRIED = 2.0 ** np.linspace(-2, 3, 41)
"""Temperatures at which ℓ is computed; its minimum is that of the parabola through the least three."""

BINS = 10
NOTHING = np.zeros((3, BINS))

DOUBTFUL = 0.01
"""Most of a brain is surely no tumour; over voxels with less than this an error says nothing."""

LEAST_P = float(np.finfo(np.float32).tiny)
"""A class that underflowed to 0 counts as this probable."""


def tempered(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """q of the head of this file, Float32[K …], of p Float[K …]; where all classes are 0 they stay so.

    >>> tempered(np.array([0.8, 0.2], np.float32), 2.0)
    array([0.6666667 , 0.33333334], dtype=float32)
    """
    raised: NDArray[np.float32] = np.power(probabilities, np.float32(1 / temperature), dtype=np.float32)
    total: NDArray[np.float32] = np.maximum(raised.sum(axis=0), np.float32(LEAST_P))
    return raised / total


class Voxels(NamedTuple):
    """Some voxels of one answer: whose, from which kind, log p Float16[K V] and the true classes UInt8[V]."""

    patient: str
    kind: str
    log_p: NDArray[np.float16]
    truth: NDArray[np.uint8]


def drawn(patient: str, kind: str, probabilities: NDArray[np.float32], truth: NDArray[np.uint8], most: int) -> Voxels:
    """At most so many voxels of p Float32[K X Y Z] and the true classes UInt8[X Y Z], each as likely as any other."""
    picked = np.random.default_rng(0).permutation(truth.size)[:most]
    values = probabilities.reshape(len(probabilities), -1)[:, picked]
    return Voxels(patient, kind, np.log(np.maximum(values, LEAST_P)).astype(np.float16), truth.reshape(-1)[picked])


class Losses(NamedTuple):
    """ℓ of N pairs of a patient and a kind at the temperatures `TRIED`: N names, N names, Float64[N T]."""

    patients: NDArray[Any]
    kinds: NDArray[Any]
    values: Floats

    def where(self, rows: NDArray[np.bool_]) -> Losses:
        """Some of the pairs."""
        return Losses(self.patients[rows], self.kinds[rows], self.values[rows])


def losses(answers: Sequence[Voxels]) -> Losses:
    """ℓ of answers; those of one patient and kind become one, their mean."""
    found: dict[tuple[str, str], list[Floats]] = {}
    for answer in answers:
        found.setdefault((answer.patient, answer.kind), []).append(_loss(answer))
    patients, kinds = zip(*found, strict=True) if found else ((), ())
    values = np.array([np.mean(several, axis=0) for several in found.values()]).reshape(len(found), len(TRIED))
    return Losses(np.array(patients, dtype=str), np.array(kinds, dtype=str), values)


def _loss(answer: Voxels) -> Floats:
    log_p = answer.log_p.astype(np.float32)
    log_p = log_p - log_p.max(axis=0)
    true = np.take_along_axis(log_p, answer.truth[None].astype(np.intp), axis=0)[0]
    return np.array([np.mean(np.log(np.exp(log_p / t).sum(axis=0)) - true / t, dtype=np.float64) for t in TRIED])


@dataclass(frozen=True)
class Temperatures:
    """T that all kinds have in common, and {kind: T}."""

    common: float
    of: Mapping[str, float]


def fit_temperatures(found: Losses, kinds: Sequence[str] | None = None) -> Temperatures:
    """The temperatures of the head of this file; ``kinds`` of which there is no patient have the common one.

    >>> sure = np.array([[0.1] * 10, [0.9] * 10], np.float32)[:, :, None, None]
    >>> wrong_in_3_of_10 = np.array([0] * 3 + [1] * 7, np.uint8)[:, None, None]
    >>> told = fit_temperatures(losses([drawn("ann", "t1c", sure, wrong_in_3_of_10, 10)]))
    >>> tempered(np.array([0.1, 0.9], np.float32), told.of["t1c"]).round(2)
    array([0.3, 0.7], dtype=float32)
    """
    mean = found.values.mean(axis=0)
    names = sorted(set(map(str, found.kinds)) if kinds is None else kinds)
    of = {name: _least(found.values[found.kinds == name].sum(axis=0) + PRIOR_PATIENTS * mean) for name in names}
    return Temperatures(_least(mean), of)


def _least(values: Floats) -> float:
    """The temperature of the least ℓ."""
    middle = int(np.clip(values.argmin(), 1, len(TRIED) - 2))
    before, at, after = values[middle - 1 : middle + 2]
    bend = before - 2 * at + after
    off = float(np.clip((before - after) / (2 * bend), -1, 1)) if bend > 0 else float(np.sign(before - after))
    return float(TRIED[middle] * (TRIED[1] / TRIED[0]) ** off)


def each_left_out(found: Losses) -> Iterator[tuple[set[str], Temperatures]]:
    """Some patients, and the temperatures of all others: every patient once, never on both sides."""
    kinds, names = sorted(set(map(str, found.kinds))), sorted(set(map(str, found.patients)))
    parts = min(len(names), PARTS)
    for part in range(parts if len(names) > 1 else 0):
        out = names[part::parts]
        yield set(out), fit_temperatures(found.where(~np.isin(found.patients, out)), kinds)


# ---- predicted and found -----------------------------------------------------------------------------------------


def tally(probability: NDArray[np.float32], true: NDArray[np.bool_]) -> Floats:
    """Float64[3 B]: voxels, the sum of their probabilities, and how many were true, by bins of the probability.

    >>> tally(np.array([0.25, 0.25, 1.0], np.float32), np.array([False, True, True]))[:, [2, 9]].tolist()
    [[2.0, 1.0], [0.5, 1.0], [1.0, 1.0]]
    """
    bins = np.minimum((probability * BINS).astype(np.intp), BINS - 1)
    return np.array([np.bincount(bins, weights, BINS) for weights in (None, probability, true)], dtype=np.float64)


def calibration_error(tallied: Floats) -> float:
    """ECE of the head of this file; NaN where there is no voxel.

    >>> round(calibration_error(tally(np.array([0.2, 0.2, 0.8], np.float32), np.array([False, False, True]))), 4)
    0.2
    """
    voxels, predicted, true = tallied
    return float(np.abs(predicted - true).sum() / voxels.sum()) if voxels.sum() else float("nan")


@dataclass(frozen=True)
class Reading:
    """What temperatures made of some patients.

    losses:   {patient: ℓ at T = 1, ℓ tempered}, the means over a patient's answers
    tallies:  {region: `tally` of its voxels at T = 1, and tempered}
    doubtful: the same of voxels alone that had a probability of `DOUBTFUL` or more at T = 1
    """

    losses: Mapping[str, tuple[float, float]]
    tallies: Mapping[str, tuple[Floats, Floats]]
    doubtful: Mapping[str, tuple[Floats, Floats]]


def reading(
    answers: Sequence[Voxels],
    found: Losses,
    regions: Mapping[str, Sequence[int]],
    parts: Iterable[tuple[set[str], Temperatures]],
) -> Reading:
    """Some patients after the other, each by the temperatures that are named with them.

    answers, found: voxels and their losses; regions: {name: the classes whose probabilities make it up}
    parts:          `each_left_out`, or all patients and temperatures of others
    """
    before_after: dict[str, tuple[float, float]] = {}
    tallies: dict[str, tuple[Floats, Floats]] = dict.fromkeys(regions, (NOTHING, NOTHING))
    doubtful = dict(tallies)
    for out, fitted in parts:
        for patient in sorted(out):
            rows = np.flatnonzero(found.patients == patient)
            logs = np.array([[0.0, np.log(fitted.of[str(found.kinds[row])])] for row in rows])
            losses = [np.interp(log, np.log(TRIED), found.values[row]) for row, log in zip(rows, logs, strict=True)]
            before, after = np.mean(losses, axis=0)
            before_after[patient] = float(before), float(after)
        for answer in (each for each in answers if each.patient in out):
            plain = np.exp(answer.log_p.astype(np.float32))
            cooled = tempered(plain, fitted.of[answer.kind])
            for region, members in regions.items():
                both = plain[list(members)].sum(axis=0), cooled[list(members)].sum(axis=0)
                true, some = np.isin(answer.truth, members), both[0] >= DOUBTFUL
                tallies[region] = _added(tallies[region], both, true)
                doubtful[region] = _added(doubtful[region], (both[0][some], both[1][some]), true[some])
    return Reading(before_after, tallies, doubtful)


def _added(
    tallied: tuple[Floats, Floats], both: tuple[NDArray[np.float32], NDArray[np.float32]], true: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    return tallied[0] + tally(both[0], true), tallied[1] + tally(both[1], true)
