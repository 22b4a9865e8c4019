"""Can a small classifier tell simulated patients from real ones? 0.5: no; 1: always."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

FOLDS, REPEATS, RIDGE, DRAWS = 5, 5, 1.0, 2000


@dataclass(frozen=True)
class Telling:
    """Area under the ROC curve of held-out patients, with a bootstrap interval over patients of both kinds.

    auc, low, high: NaN where a kind has fewer than two patients
    patients:       real, simulated
    clues:          the features that weigh most, with their weight (per standard deviation; above 0: larger when
                    simulated), of a fit to all
    """

    auc: float
    low: float
    high: float
    patients: tuple[int, int]
    clues: tuple[tuple[str, float], ...] = ()


def tell_apart(
    real: Table,
    simulated: Table,
    names: Sequence[str],
    real_of: Sequence[Hashable] | None = None,
    simulated_of: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Telling:
    """Cross-validated AUC of logistic regression, real against simulated.

    real, simulated: Float64[N F], Float64[S F], rows of features; NaN where one is undefined
    names:           of the F features
    real_of, simulated_of: the patient of each row; rows of one patient are held out together and their scores averaged

    Features are standardised, undefined ones take the training mean. Ridge: half the squared weights. Five folds over
    patients, each with its share of both kinds, drawn five times; a patient's score is the mean log-odds of the fits
    that did not see it. AUC = P(score of a simulated > score of a real patient), ties count a half. Where nothing
    differs and there are few patients it falls below 0.5, for who is held out is missing from the mean of his kind.

    >>> rng = np.random.default_rng(0)
    >>> tell_apart(rng.normal(0, 1, (20, 2)), rng.normal(9, 1, (20, 2)), ["a", "b"]).auc
    1.0
    """
    table = np.concatenate([real, simulated])
    kind = np.repeat([0.0, 1.0], [len(real), len(simulated)])
    of_real = [("real", p) for p in (range(len(real)) if real_of is None else real_of)]
    of_simulated = [("simulated", p) for p in (range(len(simulated)) if simulated_of is None else simulated_of)]
    owners = [*of_real, *of_simulated]
    people = list(dict.fromkeys(owners))
    index = {person: i for i, person in enumerate(people)}
    owner = np.array([index[o] for o in owners])
    person_kind = np.array([float(person[0] == "simulated") for person in people])
    counts = (int((person_kind == 0).sum()), int((person_kind == 1).sum()))
    if min(counts) < 2:
        return Telling(np.nan, np.nan, np.nan, counts)
    generator = np.random.default_rng(seed)
    scores = np.mean([_held_out(table, kind, owner, person_kind, generator) for _ in range(REPEATS)], axis=0)
    wins = _wins(scores[person_kind == 0], scores[person_kind == 1])
    low, high = _interval(wins, generator)
    weights = fit_logistic(_standard(table, table), kind)[1:]
    largest = np.argsort(-np.abs(weights))[:12]
    return Telling(float(wins.mean()), low, high, counts, tuple((names[i], float(weights[i])) for i in largest))


def fit_logistic(table: Table, kind: Table, ridge: float = RIDGE, steps: int = 30) -> Table:
    """Weights Float64[1 + F], intercept first, of ridge logistic regression by Newton's method.

    Minimises −Σ w log p + ½ ridge |weights|²; both kinds weigh alike, the intercept is free.
    """
    x = np.concatenate([np.ones((len(table), 1)), table], axis=1)
    weight = np.where(kind == 1, 0.5 / max(kind.mean(), 1e-9), 0.5 / max(1 - kind.mean(), 1e-9))
    penalty = ridge * np.eye(x.shape[1])
    penalty[0, 0] = 1e-9
    beta = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        hessian = (x * (weight * np.maximum(p * (1 - p), 1e-9))[:, None]).T @ x + penalty
        change = np.linalg.solve(hessian, x.T @ (weight * (kind - p)) - penalty @ beta)
        beta = beta + change * min(1.0, 5.0 / max(float(np.abs(change).max()), 1e-12))
        if np.abs(change).max() < 1e-8:
            break
    return beta


def _held_out(
    table: Table, kind: Table, owner: NDArray[np.int64], person_kind: Table, generator: np.random.Generator
) -> Table:
    """Float64[people], the mean held-out log-odds of each one's rows."""
    fold = np.empty(len(person_kind), int)
    for value in (0.0, 1.0):
        members = np.flatnonzero(person_kind == value)
        fold[generator.permutation(members)] = np.arange(len(members)) % min(FOLDS, len(members))
    scores = np.zeros(len(table))
    for f in range(fold.max() + 1):
        out = fold[owner] == f
        if out.any():
            beta = fit_logistic(_standard(table[~out], table[~out]), kind[~out])
            scores[out] = _standard(table[~out], table[out]) @ beta[1:] + beta[0]
    return np.bincount(owner, scores) / np.bincount(owner)


def _standard(reference: Table, table: Table) -> Table:
    there = np.isfinite(reference)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, reference, 0).sum(axis=0) / count
    spread = np.sqrt((np.where(there, reference - mean, 0) ** 2).sum(axis=0) / count)
    z = (table - mean) / np.where(spread > 1e-9, spread, 1.0)
    return np.where(np.isfinite(z), np.clip(z, -5, 5), 0.0)


def _wins(real: Table, simulated: Table) -> Table:
    """Float64[N S]: 1 where the simulated patient's score is larger, ½ for ties."""
    return (simulated > real[:, None]) + 0.5 * (simulated == real[:, None])


def _interval(wins: Table, generator: np.random.Generator) -> tuple[float, float]:
    # two samples, so `bootstrap_interval` of one mean does not fit: both kinds are drawn anew
    n, s = wins.shape
    rows = generator.multinomial(n, np.full(n, 1 / n), DRAWS) / n
    columns = generator.multinomial(s, np.full(s, 1 / s), DRAWS) / s
    low, high = np.quantile(np.einsum("dn,ns,ds->d", rows, wins, columns, optimize=True), (0.025, 0.975))
    return round(float(low), 9), round(float(high), 9)  # sums of weights may pass 1 by a rounding
