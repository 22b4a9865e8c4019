"""Diagonal Gaussians and the divergences between them, in nats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Gaussian(NamedTuple):
    """A Gaussian with independent elements.

    mean, log_var: tensors of one shape (or shapes that broadcast); log_var is the natural logarithm of the variance
    """

    mean: Tensor
    log_var: Tensor

    @classmethod
    def unit(cls, mean: Tensor) -> Gaussian:
        """N(mean, I): how a deterministic feature z is read as a distribution."""
        return cls(mean, torch.zeros((), dtype=mean.dtype, device=mean.device))


def kl(q: Gaussian, p: Gaussian) -> Float[Tensor, "..."]:
    """KL(q ‖ p) of every element, in nats.

        KL = ½ [ log σ_p² − log σ_q² + (σ_q² + (μ_q − μ_p)²) / σ_p² − 1 ]

    For unit variances this is ½ (μ_q − μ_p)²: the mean-squared error of MedMAP's public code, halved.
    Source: the standard closed form, e.g. Kingma & Welling 2014, appendix B, for p = N(0, 1).

    >>> float(kl(Gaussian.unit(torch.tensor(3.0)), Gaussian.unit(torch.tensor(1.0))))
    2.0
    """
    difference = (q.mean - p.mean).square()
    return 0.5 * (p.log_var - q.log_var + (q.log_var - p.log_var).exp() + difference * (-p.log_var).exp() - 1)
