"""Total correlation between modalities, in nats, from as many subjects as a study has.

What it is of a known Gaussian, and what it has to do with alignment: `medmap.core.joint` and docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from medmap.core.joint import total_correlation
from medmap.errors import InputError

Matrix = NDArray[np.float64]

NOTHING = 1e-6
"""Share of the largest component, and of the largest number, below which a component is none: float32 has no more."""

ONE_IS_THE_OTHER = 1e-9
"""Share of variance that components do not have in common, below which one is called a function of the others."""


@dataclass(frozen=True)
class Dependence:
    """Total correlation as a sample shows it, in nats.

    nats:      plain − null_mean; about 0 without dependence (it may fall below), NaN where there are too few subjects
    low, high: 95 % interval of it (jackknife over patients); somewhat too wide with tens of patients
    plain:     TC of the sample covariance; with tens of subjects mostly noise
    null_mean, null_sd: plain TC where subjects are shuffled within each modality, over the draws
    p:         share of shuffles, the sample itself counted as one, that reach plain
    shrunk:    the same difference for the Ledoit-Wolf covariance; it errs towards 0, and is defined for any number
    shrunk_null: mean of its shuffles
    subjects, components: rows, and dimensions kept of each modality
    explained: share of each modality's variance that these hold
    """

    nats: float
    low: float
    high: float
    plain: float
    null_mean: float
    null_sd: float
    p: float
    shrunk: float
    shrunk_null: float
    subjects: int
    components: tuple[int, ...]
    explained: tuple[float, ...]


def estimate_total_correlation(
    samples: Mapping[str, NDArray[Any]],
    *,
    components: int = 4,
    draws: int = 100,
    patients: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Dependence:
    """TC between modalities of a *population*, from one vector a subject and modality.

    samples:    {modality: Float[N C_j]}, row i of each from subject i
    components: principal components kept of each modality; TC of more can only be larger
    draws:      shuffles for the null
    patients:   N names; rows of one patient are left out together for the interval (default: each row its own)

    Each modality is turned to its first components and scaled to unit variance there, which changes no TC. The plain
    estimate −½ log det of their joint correlation is far too large: with 40 subjects and 4 × 4 components by 1.5 nats.
    For Gaussian data its mean depends on the numbers alone and not on the truth (log det of a Wishart matrix is that of
    its scale plus a pivot), so that shuffled data, whose truth is 0, show it and it can be taken off.
    Shrinkage (Ledoit & Wolf 2004) has no such excess and less noise, but pulls every dependence towards 0.

    The estimate is of covariances: dependence that leaves them at 0 is not seen.
    Raises InputError for fewer than 3 subjects, 1 component or 2 draws, modalities of different length, numbers that
    are not finite, and where scikit-learn is not installed.

    >>> rng = np.random.default_rng(0)
    >>> brain, noise = rng.normal(size=(40, 4)), rng.normal(size=(2, 40, 4))
    >>> alike = estimate_total_correlation({"t1c": 3 * brain + noise[0], "t2f": 3 * brain + noise[1]})
    >>> apart = estimate_total_correlation({"t1c": noise[0], "t2f": noise[1]})
    >>> 2 < alike.low < 3.3 < alike.high, apart.low < 0 < apart.high  # the truth: 3.3 and 0 nats
    (True, True)
    """
    if components < 1 or draws < 2:
        raise InputError(f"components, draws: found {components} and {draws}, expected 1 or more, and 2 or more")
    rows, names = _rows(samples, patients)
    generator = np.random.default_rng(seed)
    parts = [_components(x, components) for x in rows]
    scores, count = [part[0] for part in parts], len(rows[0])
    shuffled = [[z[generator.permutation(count)] for z in scores] for _ in range(draws)]
    plain, shrunk = _plain(scores), _shrunk(scores)
    null, shrunk_null = np.array([_plain(z) for z in shuffled]), float(np.mean([_shrunk(z) for z in shuffled]))
    half = _half_width(rows, components, names) if np.isfinite(plain) else np.nan
    nats = plain - float(null.mean())
    return Dependence(
        nats,
        nats - half,
        nats + half,
        plain,
        float(null.mean()),
        float(null.std(ddof=1)),
        float((1 + (null >= plain).sum()) / (1 + draws)) if not np.isnan(plain) else np.nan,
        shrunk - shrunk_null,
        shrunk_null,
        count,
        tuple(z.shape[1] for z in scores),
        tuple(part[1] for part in parts),
    )


def require_scikit_learn() -> None:
    """Nothing where scikit-learn is installed. Raises InputError where it is not."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            "scikit-learn is not installed; numbers on latents need it: pip install 'medmap[study]'"
        ) from error


def _rows(
    samples: Mapping[str, NDArray[Any]], patients: Sequence[Hashable] | None
) -> tuple[list[Matrix], list[Hashable]]:
    require_scikit_learn()
    rows = [np.asarray(x, float) for x in samples.values()]
    shapes = ", ".join(f"{name} {x.shape}" for name, x in zip(samples, rows, strict=True))
    if not rows or any(x.ndim != 2 or not x.size or len(x) != len(rows[0]) for x in rows) or len(rows[0]) < 3:
        raise InputError(
            f"samples: found {shapes or 'none'}, expected subjects × channels of each modality, 3 subjects or more"
        )
    if not all(np.isfinite(x).all() for x in rows):
        raise InputError(f"samples: found numbers that are NaN or infinite in {shapes}; leave those subjects out")
    names = list(range(len(rows[0])) if patients is None else patients)
    if len(names) != len(rows[0]):
        raise InputError(f"patients: found {len(names)} names for {len(rows[0])} subjects, expected one each")
    return rows, names


def _components(values: Matrix, components: int) -> tuple[Matrix, float]:
    """Scores [N d] on the first principal components, each of variance 1, and the share of variance they hold."""
    centred = values - values.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    there = int((s > NOTHING * max(float(s[0]), float(np.abs(values).max()))).sum())
    kept = min(components, there, len(values) - 1)
    total = float((s**2).sum())
    share = float((s[:kept] ** 2).sum()) / total if total > 0 else np.nan
    return u[:, :kept] * np.sqrt(len(values) - 1), share


def _plain(scores: Sequence[Matrix]) -> float:
    z = np.hstack(scores)
    if len(z) < z.shape[1] + 2:  # the sample covariance has no inverse, or next to none
        return float("nan")
    spectrum = np.linalg.eigvalsh(z.T @ z / (len(z) - 1))
    if spectrum.min(initial=1.0) < ONE_IS_THE_OTHER:
        return float("inf")
    return float(-0.5 * np.log(spectrum).sum())


def _shrunk(scores: Sequence[Matrix]) -> float:
    from sklearn.covariance import ledoit_wolf

    z = np.hstack(scores)
    if z.shape[1] == 0:
        return 0.0
    covariance = np.asarray(ledoit_wolf(z, assume_centered=True)[0])
    return total_correlation(covariance, [x.shape[1] for x in scores if x.shape[1]])


def _half_width(rows: Sequence[Matrix], components: int, names: Sequence[Hashable]) -> float:
    """Half a 95 % interval: the standard deviation of what is left when one patient goes, times Student's t."""
    groups = list(dict.fromkeys(names))
    n = len(groups)
    kept = [np.array([name != group for name in names]) for group in groups]
    without = np.array([_plain([_components(x[mask], components)[0] for x in rows]) for mask in kept])
    if n < 2 or not np.isfinite(without).all():
        return float("nan")
    spread = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return float(spread * student.ppf(0.975, n - 1))
