"""How latents lie: how far the sequences are from each other, and how much each of them still varies.

Two questions that must not be confused. The *gap* is what alignment is there to close. The *spread* is what must be
left when it is closed: latents that have all fallen onto one point have no gap either. The spread is therefore counted
within each sequence, and does not fall because the gap does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Moments(NamedTuple):
    """Number n of some latents, their mean z̄ [C] and scatter Σ (z − z̄)(z − z̄)ᵀ [C C]; float64, so that they add up."""

    n: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    def joined(self, other: Moments) -> Moments:
        """Those of both together (Chan, Golub & LeVeque 1983).

        >>> low, high = (Moments(2, np.array([mean]), np.array([[2.0]])) for mean in (1.0, 5.0))  # {0, 2} and {4, 6}
        >>> both = low.joined(high)
        >>> both.n, both.mean.tolist(), both.scatter.tolist()
        (4, [3.0], [[20.0]])
        """
        n, apart = self.n + other.n, other.mean - self.mean
        between = np.outer(apart, apart) * (self.n * other.n / n)
        return Moments(n, self.mean + apart * (other.n / n), self.scatter + other.scatter + between)


def spread(parts: Iterable[Moments]) -> dict[str, float]:
    """How much latents vary, each sequence j (a part) about its own mean: Σ = Σ_j scatter_j / Σ_j n_j, [C C].

        std      mean over channels of √Σ_cc, in the latents' own unit
        std_min  the least of them: 0 where a channel is the same everywhere
        rank     `effective_rank` of Σ; 1 where nothing varies

    >>> round_cloud = Moments(4, np.array([0.0, 0.0]), 16 * np.eye(2))  # two directions, alike
    >>> {name: round(value, 3) for name, value in spread([round_cloud]).items()}
    {'std': 2.0, 'std_min': 2.0, 'rank': 2.0}
    """
    every = list(parts)
    covariance = np.sum([part.scatter for part in every], axis=0) / sum(part.n for part in every)
    deviations = np.sqrt(np.diag(covariance))
    rank = effective_rank(covariance)
    rank = rank if np.isfinite(rank) else 1.0
    return {"std": float(deviations.mean()), "std_min": float(deviations.min()), "rank": rank}


def effective_rank(covariance: NDArray[Any]) -> float:
    """exp(−Σ_i p_i log p_i), p_i = λ_i / Σ λ, λ the eigenvalues of a covariance [C C]: how many directions are in use,
    between 1 and C (Roy & Vetterli 2007). NaN where nothing varies.

    >>> round(effective_rank(np.diag([1.0, 1.0, 0.0])), 6), effective_rank(np.diag([5.0, 0.0]))
    (2.0, 1.0)
    """
    share = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    if share.sum() <= 0:
        return float("nan")
    share = share[share > 0] / share.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def modality_gap(latents: NDArray[Any], modality: Sequence[str] | NDArray[Any]) -> float:
    """Share of the latents' variance that lies between sequences: 0 = no gap, 1 = nothing but the gap.

        gap = Σ_j n_j ‖z̄_j − z̄‖² / Σ_i ‖z_i − z̄‖²

    latents:  [N C] pooled latents, one row a patient and sequence
    modality: N names
    NaN where the latents do not vary at all. Without any gap the expected value is `chance_gap`, not 0.

    >>> modality_gap(np.array([[0.0], [2.0], [10.0], [12.0]]), ["a", "a", "b", "b"])
    0.9615384615384616
    """
    values, names = np.asarray(latents, float), np.asarray(modality)
    centred = values - values.mean(0)
    total = float((centred**2).sum())
    between = sum((names == name).sum() * float((centred[names == name].mean(0) ** 2).sum()) for name in set(names))
    return float(between / total) if total > 0 else float("nan")


def chance_gap(modality: Sequence[str] | NDArray[Any]) -> float:
    """The gap that names without meaning give on average: (M − 1)/(N − 1) for N rows of M sequences.

    1 where every sequence comes once: then nothing can be said.

    >>> chance_gap(["a", "b", "a", "b", "a"])
    0.25
    """
    return (len(set(modality)) - 1) / max(len(modality) - 1, 1)
