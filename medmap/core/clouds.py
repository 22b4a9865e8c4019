"""Clouds of points, one a sequence with one point a patient: do they lie in one place, and are the pairs still pairs?

Two questions with two answers. Equal distributions (`between_kl`, `mmd`, `probe`) do not say that the points of one
patient lie together, and points of one patient can lie together (`likeness`, `retrieval`) beside a gap between the
clouds. A map for the eye is `planar`. docs/theory.md says what may be concluded from which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.dependence import require_scikit_learn
from medmap.core.stats import bootstrap_interval
from medmap.errors import InputError

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

LEAST_VARIANCE = 1e-6
"""Share of the mean variance that every channel is given at least: a channel that is constant in one sequence alone
would else be infinitely far from the other."""

FOLDS, SWAPS, PERPLEXITY = 5, 200, 30.0


@dataclass(frozen=True)
class Clouds:
    """N points of M sequences.

    points:   Float[N F]
    modality: N names; case: N names, at most one point of each modality; patient: N names, of one or more cases
    """

    points: Matrix
    modality: tuple[str, ...]
    case: tuple[str, ...]
    patient: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = [len(self.points), len(self.modality), len(self.case), len(self.patient)]
        if self.points.ndim != 2 or len(set(counts)) > 1 or not np.isfinite(self.points).all():
            raise InputError(
                f"clouds: found points {self.points.shape} with {counts[1]} modalities, {counts[2]} cases and "
                f"{counts[3]} patients, expected finite points N × F and N names of each"
            )
        if len(set(zip(self.case, self.modality, strict=True))) < len(self.case):
            raise InputError(
                "clouds: found two points of one modality of a case, expected one; give the scans two names"
            )

    @property
    def names(self) -> list[str]:
        """The sequences, in the order in which they come."""
        return list(dict.fromkeys(self.modality))

    def paired(self, names: Sequence[str]) -> tuple[list[Matrix], list[str]]:
        """Of the n cases that have all of some sequences: their points, [n F] a sequence, and their patients."""
        row = {pair: i for i, pair in enumerate(zip(self.case, self.modality, strict=True))}
        cases = [case for case in dict.fromkeys(self.case) if all((case, name) in row for name in names)]
        patients = [self.patient[row[case, names[0]]] for case in cases]
        return [self.points[[row[case, name] for case in cases]] for name in names], patients

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Int[C M], where the point of a case and sequence stands, −1 for none; Int[C], the number of its patient."""
        cases, people = list(dict.fromkeys(self.case)), list(dict.fromkeys(self.patient))
        rows, patients = np.full((len(cases), len(self.names)), -1), np.zeros(len(cases), int)
        for index, (case, name, patient) in enumerate(zip(self.case, self.modality, self.patient, strict=True)):
            rows[cases.index(case), self.names.index(name)] = index
            patients[cases.index(case)] = people.index(patient)
        return rows, patients

    def masks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Bool[N N]: the same sequence, the same case, the same patient."""
        same = [np.array(x)[:, None] == np.array(x) for x in (self.modality, self.case, self.patient)]
        return same[0], same[1], same[2]


# ---- one place? -------------------------------------------------------------------------------------------------


def between_kl(moments: Mapping[str, tuple[Vector, Vector]]) -> dict[str, float]:
    """How far the sequences' distributions are apart, channel by channel, as Gaussians, in nats per channel.

        ½ (KL(N(m_j, v_j) ‖ N(m_k, v_k)) + KL(N(m_k, v_k) ‖ N(m_j, v_j)))          averaged over channels

    moments: {modality: (mean [C], variance [C])}
    Returns its ``mean`` over pairs of sequences and the ``largest``; 0 says that means and variances agree, and nothing
    about what they are made of. NaN for one sequence.

    >>> between_kl({"t1c": (np.zeros(1), np.ones(1)), "t2f": (np.ones(1), np.ones(1))})
    {'mean': 0.5, 'largest': 0.5}
    """
    every = np.stack([variance for _, variance in moments.values()])
    least = max(LEAST_VARIANCE * float(every.mean()), np.finfo(float).tiny)
    found = []
    for j, k in combinations(moments, 2):
        (mean, v), (other, w) = moments[j], moments[k]
        v, w = np.maximum(v, least), np.maximum(w, least)
        squares = (mean - other) ** 2
        found.append(float(np.mean(0.25 * ((v + squares) / w + (w + squares) / v - 2))))
    return _mean_and_largest(found)


def mmd(clouds: Clouds, seed: int = 0) -> dict[str, float]:
    """Squared maximum mean discrepancy between sequences, unbiased, kernel exp(−‖x − y‖² / 2σ²).

        MMD² = 1/|pairs| Σ_{i, j of different patients} k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i)

    σ² is the median squared distance of all points. x_i and y_i are of one patient, so no term compares these two: that
    both show one brain would else count as if the sequences were alike (Gretton et al. 2012, the estimate for paired
    samples). About 0, also below, where the distributions are the same.
    Returns its ``mean`` over pairs of sequences, the ``largest``, and ``chance95``: below it the mean stays in 95 % of
    draws in which every patient's sequences change their names among themselves.

    >>> rng = np.random.default_rng(0)
    >>> cases, sequences = tuple("abcdefgh") * 2, ("t1c",) * 8 + ("t2f",) * 8
    >>> far = Clouds(np.r_[rng.normal(size=(8, 2)), rng.normal(9, 1, (8, 2))], sequences, cases, cases)
    >>> found = mmd(far)
    >>> found["mean"] > 0.5 > found["chance95"]
    True
    """
    generator = np.random.default_rng(seed)
    squares = _square_distances(clouds.points, clouds.points)
    apart = squares[np.triu_indices(len(squares), 1)]
    kernel = np.exp(-squares / (2 * float(np.median(apart)) or 1.0)) if apart.size else squares
    rows, patients = clouds.rows()
    found = _pairwise_mmd(kernel, rows, patients)
    drawn = (_pairwise_mmd(kernel, _renamed(rows, patients, generator), patients) for _ in range(SWAPS))
    chance = float(np.quantile([np.mean(one) for one in drawn], 0.95)) if found else np.nan
    return {**_mean_and_largest(found), "chance95": chance}


def _pairwise_mmd(kernel: Matrix, rows: NDArray[np.int64], patients: NDArray[np.int64]) -> list[float]:
    """MMD² of every pair of sequences that two patients or more have. kernel [N N]; rows, patients: `Clouds.rows`."""
    found = []
    for j, k in combinations(range(rows.shape[1]), 2):
        both = (rows[:, j] >= 0) & (rows[:, k] >= 0)
        (x, y), whose = rows[both][:, [j, k]].T, patients[both]
        others = whose[:, None] != whose
        if not others.any():
            continue
        xx, yy, xy = (kernel[np.ix_(a, b)] for a, b in ((x, x), (y, y), (x, y)))
        found.append(float(((xx + yy - xy - xy.T) * others).sum() / others.sum()))
    return found


def _renamed(rows: NDArray[np.int64], patients: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Every patient's sequences under each other's names, in all scans of a patient that have the same ones alike."""
    order = generator.random((int(patients.max()) + 1, rows.shape[1]))[patients]
    drawn = np.take_along_axis(rows, np.argsort(np.where(rows < 0, np.inf, order), axis=1), axis=1)
    renamed = rows.copy()
    renamed[rows >= 0] = drawn[drawn >= 0]
    return renamed


def probe(clouds: Clouds) -> dict[str, float]:
    """Whether a straight cut tells the sequences: accuracy of logistic regression on patients it has not seen.

    Standardised features, ridge of strength 1, five folds over patients (as many as there are, where fewer).
    Returns ``accuracy`` with ``low`` and ``high`` (95 %, bootstrap over patients), and ``chance``: the share of the
    most frequent sequence, 1/M where nobody lacks any. NaN with fewer than two patients or sequences.
    Raises InputError where scikit-learn is not installed.

    >>> rng = np.random.default_rng(0)
    >>> cases, sequences = tuple("abcdefgh") * 2, ("t1c",) * 8 + ("t2f",) * 8
    >>> far = Clouds(np.r_[rng.normal(size=(8, 2)), rng.normal(9, 1, (8, 2))], sequences, cases, cases)
    >>> probe(far)
    {'accuracy': 1.0, 'low': 1.0, 'high': 1.0, 'chance': 0.5}
    """
    require_scikit_learn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, groups = np.array(clouds.modality), np.array(clouds.patient)
    folds = min(FOLDS, len(set(clouds.patient)))
    chance = max((clouds.modality.count(name) for name in clouds.names), default=0) / max(len(names), 1)
    if folds < 2 or len(clouds.names) < 2:
        return {"accuracy": np.nan, "low": np.nan, "high": np.nan, "chance": chance}
    hits = np.zeros(len(names))
    for train, test in GroupKFold(folds).split(clouds.points, names, groups):
        if len(set(names[train])) < 2:  # the others have one sequence only: it is what a guess can be
            hits[test] = names[test] == names[train][0]
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        hits[test] = model.fit(clouds.points[train], names[train]).predict(clouds.points[test]) == names[test]
    interval = bootstrap_interval(hits, clouds.patient)
    return {"accuracy": interval.mean, "low": interval.low, "high": interval.high, "chance": chance}


# ---- still pairs? -----------------------------------------------------------------------------------------------


def likeness(clouds: Clouds) -> dict[str, float]:
    """Mean cosine of points of one patient in two sequences (``matched``), against what it must be compared with.

        cos(a, b) = aᵀb / (‖a‖ ‖b‖)

    matched, shuffled:               after the mean of all sequences' means is taken off: same patient in another
                                     sequence, another patient in the same sequence. The gap counts: matched < shuffled
                                     says that a point lies nearer to its sequence than to its patient.
    centred_matched, centred_shuffled: after each sequence's own mean is taken off: same patient, another patient, both
                                     in another sequence. No gap counts; without pairing both are about 0.
    NaN where there is no such pair, or nothing varies.

    >>> points, cases = np.array([[1.0, 9], [-1.0, 9], [1.0, -9], [-1.0, -9]]), tuple("pqpq")
    >>> two = Clouds(points, ("t1c", "t1c", "t2f", "t2f"), cases, cases)
    >>> {name: round(value, 2) for name, value in likeness(two).items()}
    {'matched': -0.98, 'shuffled': 0.98, 'centred_matched': 1.0, 'centred_shuffled': -1.0}
    """
    sequence, case, patient = clouds.masks()
    plain = _cosines(clouds.points - _mean_of_means(clouds))
    centred = _cosines(_centred(clouds))
    return {
        "matched": _mean(plain[case & ~sequence]),
        "shuffled": _mean(plain[~patient & sequence]),
        "centred_matched": _mean(centred[case & ~sequence]),
        "centred_shuffled": _mean(centred[~patient & ~sequence]),
    }


def retrieval(clouds: Clouds) -> dict[str, float]:
    """How often a point's nearest neighbour in another sequence is of the same patient.

    Nearest by cosine after each sequence's mean is taken off; mean over points and other sequences that the case has.
    Returns ``accuracy`` with ``low`` and ``high`` (95 %, bootstrap over patients), and ``chance``, 1/n with n cases
    that have the other sequence. Equal distributions without pairing give chance.

    >>> cases = tuple("pqrpqr")
    >>> two = Clouds(np.array([[1.0, 0], [0, 1], [-1, -1], [3, 0], [0, 3], [-3, -3]]), tuple("aaabbb"), cases, cases)
    >>> retrieval(two)["accuracy"], round(retrieval(two)["chance"], 2)
    (1.0, 0.33)
    """
    sequence, case, patient = clouds.masks()
    cosines, names = _cosines(_centred(clouds)), np.array(clouds.modality)
    hits, chances, owners = [], [], []
    for i, j in np.argwhere(case & ~sequence):
        there = np.flatnonzero(names == names[j])
        if len(there) < 2 or not np.isfinite(cosines[i, there]).any():
            continue
        ties = there[cosines[i, there] == np.nanmax(cosines[i, there])]
        hits.append(float(patient[i, ties].mean()))
        chances.append(float(patient[i, there].mean()))
        owners.append(clouds.patient[i])
    interval = bootstrap_interval(hits, owners)
    return {"accuracy": interval.mean, "low": interval.low, "high": interval.high, "chance": _mean(np.array(chances))}


# ---- for the eye ------------------------------------------------------------------------------------------------


def planar(points: Matrix, seed: int = 0) -> dict[str, Any]:
    """Points [N F] on a plane, twice: ``pca`` and ``tsne``, N × 2 numbers each.

    ``share`` is the variance that each of the two principal components holds; ``perplexity`` of t-SNE is (N − 1)/3 and
    30 at most. ``tsne`` is None for fewer than four points or where nothing varies.
    Raises InputError where scikit-learn is not installed.

    >>> found = planar(np.random.default_rng(0).normal(size=(10, 3)))
    >>> np.shape(found["pca"]), np.shape(found["tsne"]), found["perplexity"]
    ((10, 2), (10, 2), 3.0)
    """
    require_scikit_learn()
    from sklearn.manifold import TSNE

    values = np.asarray(points, float)
    centred = values - values.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    u, s = np.pad(u, ((0, 0), (0, 2))), np.pad(s, (0, 2))
    total, perplexity = float((s**2).sum()), min(PERPLEXITY, (len(values) - 1) / 3)
    tsne = None
    if len(values) >= 4 and total > 0:
        model = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
        tsne = model.fit_transform(centred / np.sqrt(total / len(values))).astype(float).tolist()
    share = (s[:2] ** 2 / total).tolist() if total > 0 else [0.0, 0.0]
    return {"pca": (u[:, :2] * s[:2]).tolist(), "share": share, "tsne": tsne, "perplexity": perplexity}


# ---- shared -----------------------------------------------------------------------------------------------------


def _mean_and_largest(values: Sequence[float]) -> dict[str, float]:
    return {"mean": _mean(np.array(values)), "largest": max(values, default=np.nan)}


def _mean(values: Vector) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else float("nan")


def _square_distances(x: Matrix, y: Matrix) -> Matrix:
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x @ y.T
    return np.asarray(np.maximum(squares, 0))


def _mean_of_means(clouds: Clouds) -> Vector:
    """Not the mean of all points: sequences that some patients lack would count less."""
    names = np.array(clouds.modality)
    return np.asarray(np.mean([clouds.points[names == name].mean(axis=0) for name in clouds.names], axis=0))


def _centred(clouds: Clouds) -> Matrix:
    names, out = np.array(clouds.modality), clouds.points.copy()
    for name in clouds.names:
        out[names == name] -= out[names == name].mean(axis=0)
    return out


def _cosines(points: Matrix) -> Matrix:
    """[N N], NaN for a point at the origin."""
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    unit = points / np.where(norms > 0, norms, np.nan)
    return np.asarray(unit @ unit.T)
