"""Diagonal Gaussians and the divergences between them, in nats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_VARIANCE = 1e-6
"""No variance that is worked out from values is taken to be less, so that its logarithm is a number."""


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

    @classmethod
    def split(cls, halves: Tensor, dim: int) -> Gaussian:
        """From one tensor that holds the mean and the log-variance, half of an axis each.

        >>> Gaussian.split(torch.tensor([1.0, 2.0, 0.0, 0.0]), dim=0).mean
        tensor([1., 2.])
        """
        mean, log_var = halves.chunk(2, dim=dim)
        return cls(mean, log_var)

    def detached(self) -> Gaussian:
        """The same without a gradient."""
        return Gaussian(self.mean.detach(), self.log_var.detach())

    def joined(self, dim: int) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([self.mean, self.log_var.expand_as(self.mean)], dim=dim)


def mixed(parts: Gaussian, shares: Tensor, dim: int) -> Gaussian:
    """The Gaussian with the mean and the variance of the mixture Σ_j share_j N(μ_j, σ_j²).

        μ = Σ share_j μ_j        σ² = Σ share_j (σ_j² + (μ_j − μ)²)

    Of all Gaussians Q it has the least KL(mixture ‖ Q). parts: stacked along ``dim``; shares: broadcast to them, with
    sum 1 along it.

    >>> two = Gaussian(torch.tensor([0.0, 2.0]), torch.zeros(2))
    >>> [round(float(x.exp()), 3) for x in mixed(two, torch.tensor([0.5, 0.5]), dim=0)]
    [2.718, 2.0]
    """
    mean = (shares * parts.mean).sum(dim=dim, keepdim=True)
    # Not E x² − μ²: of large means that are near each other, rounding would leave nothing of that difference.
    variance = (shares * (parts.log_var.exp() + (parts.mean - mean).square())).sum(dim=dim)
    return Gaussian(mean.squeeze(dim), variance.clamp(min=LEAST_VARIANCE).log())


def moments(values: Tensor, dim: tuple[int, ...], log_var: Tensor | None = None) -> Gaussian:
    """The Gaussian with the mean and the variance of values along some axes, which keep the length 1.

        μ = mean x        σ² = mean (x − μ)², and where values are Gaussians themselves the mean of their variances more

    values: x, any shape; log_var: of the same shape, the values' own log-variances, or None for plain numbers

    >>> found = moments(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), dim=(1,))
    >>> found.mean.tolist(), [[round(v, 6) for v in row] for row in found.log_var.exp().tolist()]
    ([[2.0], [5.0]], [[1.0], [1e-06]])
    """
    variance, mean = torch.var_mean(values, dim=dim, correction=0, keepdim=True)
    if log_var is not None:
        variance = variance + log_var.exp().mean(dim=dim, keepdim=True)
    return Gaussian(mean, variance.clamp(min=LEAST_VARIANCE).log())


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
