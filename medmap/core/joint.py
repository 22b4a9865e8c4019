"""Several latents as one Gaussian with full covariance: divergences and total correlation in closed form, in nats.

    KL(q(Z_1 … Z_M) ‖ Π_j P_j) = TC(q) + Σ_j KL(q(Z_j) ‖ P_j)          TC: total correlation, 0 where nothing depends
    Σ_j w_j KL(P_j ‖ Q) = JSD_w(P_1 … P_M) + KL(Σ_j w_j P_j ‖ Q)        JSD: Jensen-Shannon divergence

docs/theory.md says what they mean for alignment. Diagonal Gaussians of networks are in `medmap.core.gaussian`, total
correlation of samples in `medmap.core.dependence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, cho_solve
from scipy.special import logsumexp

from medmap.errors import InputError

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

SYMMETRIC = 1e-8
"""How far a covariance may be from symmetric, as a share of its largest number."""


class FullGaussian(NamedTuple):
    """N(mean, covariance): Float[D] and Float[D D], symmetric and positive definite."""

    mean: Vector
    covariance: Matrix

    def block(self, start: int, stop: int) -> FullGaussian:
        """The marginal of some neighbouring elements."""
        return FullGaussian(self.mean[start:stop], self.covariance[start:stop, start:stop])


class Split(NamedTuple):
    """Both sides of KL(q ‖ Π_j P_j) = TC(q) + Σ_j KL(q_j ‖ P_j), in nats, each worked out on its own.

    joint: the left side; dependence: TC(q); each: KL(q_j ‖ P_j) for every block
    """

    joint: float
    dependence: float
    each: tuple[float, ...]


class Estimate(NamedTuple):
    """A mean over random draws and its standard error."""

    value: float
    error: float


def full_kl(q: FullGaussian, p: FullGaussian) -> float:
    """KL(q ‖ p) of two Gaussians in D dimensions, in nats.

        KL = ½ [ tr(Σ_p⁻¹ Σ_q) + (μ_p − μ_q)ᵀ Σ_p⁻¹ (μ_p − μ_q) − D + log det Σ_p − log det Σ_q ]

    Raises InputError where a covariance is not positive definite or the shapes differ.

    >>> one = FullGaussian(np.zeros(2), np.eye(2))
    >>> full_kl(one, FullGaussian(np.array([2.0, 0.0]), np.eye(2)))
    2.0
    """
    of_q, of_p = _factor(q.covariance, "q"), _factor(p.covariance, "p")
    if not len(of_q) == len(of_p) == len(q.mean) == len(p.mean):
        shapes = ", ".join(str(np.shape(x)) for x in (*q, *p))
        raise InputError(f"q and p: found means and covariances of shapes {shapes}, expected the same number D in all")
    difference = np.asarray(p.mean, float) - np.asarray(q.mean, float)
    trace = float(np.trace(cho_solve((of_p, True), np.asarray(q.covariance, float))))
    distance = float(difference @ cho_solve((of_p, True), difference))
    return 0.5 * (trace + distance - len(difference) + _log_det(of_p) - _log_det(of_q))


def total_correlation(covariance: Matrix, blocks: Sequence[int]) -> float:
    """TC of a Gaussian's blocks: KL between the Gaussian and the product of its marginals, in nats.

        TC = ½ (Σ_j log det Σ_jj − log det Σ)

    covariance: Float[D D] of all blocks one after the other
    blocks:     D_j, how many elements each has; Σ_j D_j = D

    0 exactly where no block depends on the others. Two scalars with correlation r: −½ log(1 − r²).
    Raises InputError where the covariance is not positive definite or the blocks do not add up to it.

    >>> round(total_correlation(np.array([[1.0, 0.6], [0.6, 1.0]]), [1, 1]), 6)
    0.223144
    """
    whole = _factor(covariance, "covariance")
    parts = [_log_det(_factor(covariance[a:b, a:b], "covariance")) for a, b in _edges(blocks, len(whole))]
    return 0.5 * (sum(parts) - _log_det(whole))


def split_kl(q: FullGaussian, blocks: Sequence[int], anchors: Sequence[FullGaussian]) -> Split:
    """KL(q ‖ Π_j P_j), and what it consists of. For P_1 = … = P_M = P_mix it is what aligning jointly would cost.

    q:       the joint distribution of all blocks
    blocks:  D_j, how many elements each has
    anchors: P_j, one a block; the identity asks that they are independent, not that they are equal

    Raises InputError where a covariance is not positive definite or blocks, q and anchors do not fit each other.

    >>> q = FullGaussian(np.zeros(2), np.array([[1.0, 0.6], [0.6, 1.0]]))
    >>> both = split_kl(q, [1, 1], [FullGaussian(np.zeros(1), np.eye(1))] * 2)
    >>> round(both.joint, 6), round(both.dependence, 6), both.each
    (0.223144, 0.223144, (0.0, 0.0))
    """
    edges = _edges(blocks, len(q.mean))
    if len(anchors) != len(edges):
        raise InputError(f"anchors: found {len(anchors)}, expected one for each of the {len(edges)} blocks")
    product = FullGaussian(np.concatenate([p.mean for p in anchors]), block_diag(*(p.covariance for p in anchors)))
    each = tuple(full_kl(q.block(a, b), p) for (a, b), p in zip(edges, anchors, strict=True))
    return Split(full_kl(q, product), total_correlation(q.covariance, blocks), each)


def moment_matched(parts: Sequence[FullGaussian], weights: Sequence[float] | Vector) -> FullGaussian:
    """The Gaussian G with the mean and the covariance of the mixture Σ_j w_j P_j.

        μ = Σ w_j μ_j        Σ = Σ w_j (Σ_j + μ_j μ_jᵀ) − μ μᵀ

    For every Gaussian Q, Σ_j w_j KL(P_j ‖ Q) = Σ_j w_j KL(P_j ‖ G) + KL(G ‖ Q): of all Gaussian anchors G is the best.
    Raises InputError where weights are negative or do not sum to 1.

    >>> moment_matched([FullGaussian(np.zeros(1), np.eye(1)), FullGaussian(np.full(1, 2.0), np.eye(1))], [0.5, 0.5])
    FullGaussian(mean=array([1.]), covariance=array([[2.]]))
    """
    w = _shares(weights, len(parts))
    means = np.stack([np.asarray(p.mean, float) for p in parts])
    covariances = np.stack([np.asarray(p.covariance, float) for p in parts])
    mean = w @ means
    second = np.einsum("j,jab->ab", w, covariances + means[:, :, None] * means[:, None])
    return FullGaussian(mean, second - np.outer(mean, mean))


def jensen_shannon(
    parts: Sequence[FullGaussian], weights: Sequence[float] | Vector, *, draws: int = 20_000, seed: int = 0
) -> Estimate:
    """JSD_w = Σ_j w_j KL(P_j ‖ Σ_k w_k P_k), in nats: how far the parts are apart, between 0 and −Σ_j w_j log w_j.

    A mixture of Gaussians has no closed form: the mean of log P_j − log mixture over ``draws`` points of each part.
    Raises InputError where weights are negative or do not sum to 1, or a covariance is not positive definite.

    >>> one = FullGaussian(np.zeros(1), np.eye(1))
    >>> far = FullGaussian(np.full(1, 100.0), np.eye(1))
    >>> round(jensen_shannon([one, far], [0.5, 0.5]).value, 6)  # log 2: each point betrays its part
    0.693147
    """
    w = _shares(weights, len(parts))
    return _over_parts(parts, w, draws, seed, lambda x, j: _log_density(parts[j], x) - _log_mixture(parts, w, x))


def mixture_kl(
    parts: Sequence[FullGaussian],
    weights: Sequence[float] | Vector,
    q: FullGaussian,
    *,
    draws: int = 20_000,
    seed: int = 0,
) -> Estimate:
    """KL(Σ_j w_j P_j ‖ Q), in nats, as the mean of log mixture − log Q over ``draws`` points of each part.

    Σ_j w_j KL(P_j ‖ Q) = JSD_w + KL(Σ_j w_j P_j ‖ Q), where the left side has a closed form. Give the two terms on the
    right different seeds: drawn at the same points, log mixture would cancel whatever it is.
    Raises InputError as `jensen_shannon`.

    >>> one = FullGaussian(np.zeros(1), np.eye(1))
    >>> mixture_kl([one, one], [0.5, 0.5], one)
    Estimate(value=0.0, error=0.0)
    """
    w = _shares(weights, len(parts))
    return _over_parts(parts, w, draws, seed, lambda x, j: _log_mixture(parts, w, x) - _log_density(q, x))


def _factor(covariance: Matrix, name: str) -> Matrix:
    """Cholesky's lower factor."""
    matrix = np.asarray(covariance, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise InputError(f"{name}: found an array of shape {matrix.shape}, expected a square matrix of finite numbers")
    if np.abs(matrix - matrix.T).max(initial=0.0) > SYMMETRIC * np.abs(matrix).max(initial=0.0):
        raise InputError(
            f"{name}: found a matrix that is not symmetric; a covariance is: average it with its transpose"
        )
    try:
        return np.asarray(np.linalg.cholesky(matrix))
    except np.linalg.LinAlgError as error:
        least = float(np.linalg.eigvalsh(matrix).min())
        raise InputError(
            f"{name}: found a smallest eigenvalue of {least:.3g}, expected a positive definite covariance; leave out "
            "elements that are functions of others, or keep fewer components"
        ) from error


def _log_det(factor: Matrix) -> float:
    return 2.0 * float(np.log(np.diag(factor)).sum())


def _edges(blocks: Sequence[int], total: int) -> list[tuple[int, int]]:
    sizes = list(blocks)
    if not sizes or any(size < 1 for size in sizes) or sum(sizes) != total:
        raise InputError(f"blocks: found sizes {sizes}, expected sizes of 1 or more that sum to {total}")
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _shares(weights: Sequence[float] | Vector, parts: int) -> Vector:
    w = np.asarray(weights, float)
    if w.shape != (parts,) or (w < 0).any() or abs(float(w.sum()) - 1) > 1e-9:
        raise InputError(f"weights: found {w.tolist()}, expected {parts} numbers of 0 or more that sum to 1")
    return w


def _log_density(p: FullGaussian, x: Matrix) -> Vector:
    factor, centred = _factor(p.covariance, "covariance"), x - p.mean
    squares = (centred * cho_solve((factor, True), centred.T).T).sum(axis=1)
    return np.asarray(-0.5 * (squares + _log_det(factor) + len(p.mean) * np.log(2 * np.pi)))


def _log_mixture(parts: Sequence[FullGaussian], w: Vector, x: Matrix) -> Vector:
    logs = np.stack([_log_density(p, x) for p in parts])
    return np.asarray(logsumexp(logs, axis=0, b=w[:, None]))


def _over_parts(
    parts: Sequence[FullGaussian], w: Vector, draws: int, seed: int, what: Callable[[Matrix, int], Vector]
) -> Estimate:
    """Σ_j w_j E of what(x, j) over x drawn from P_j."""
    generator = np.random.default_rng(seed)
    value = variance = 0.0
    for j, (part, share) in enumerate(zip(parts, w, strict=True)):
        normal = generator.standard_normal((draws, len(part.mean)))
        found = what(part.mean + normal @ _factor(part.covariance, "covariance").T, j)
        value += float(share * found.mean())
        variance += float(share**2 * found.var(ddof=1)) / draws
    return Estimate(value, float(np.sqrt(variance)))
