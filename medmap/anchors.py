"""Anchors: the distributions that latents of every modality are pulled to, and the loss that pulls.

    L_align = 1/|S| · Σ_{j∈S} KL( q(Z_j|X_j) ‖ P_mix )        S: the modalities that a sample has

Source: MedMAP (arXiv 2408.09465) for P*, P^k and P^N; the others name theirs. docs/method.md compares them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import atanh, inf, isnan

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from medmap.config import AlignConfig
from medmap.core.gaussian import LEAST_VARIANCE, Gaussian, kl, mixed, moments
from medmap.core.modality import ModalitySet, canonical
from medmap.core.processes import averaged, processes
from medmap.errors import ConfigError


class Anchor(nn.Module, ABC):
    """P_mix of one level: a distribution made from latents, or given beforehand. What `mix` gives makes an anchor."""

    detached = False  # True: latents feel no pull from the anchor that is made of them, as in the published first form

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, Tensor] = {}

    @abstractmethod
    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        """P_mix, broadcast to [B C x y z], from what `read` gave; modalities that are not seen have no influence."""

    def read(self, latents: Float[Tensor, "B M C x y z"], log_var: Tensor | None = None) -> Gaussian:
        """q(Z_j | X_j) of every modality, broadcast to [B M C x y z]: N(z, I) where latents bring no log-variances."""
        return Gaussian.unit(latents) if log_var is None else Gaussian(latents, log_var)

    def forward(
        self, latents: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"], log_var: Tensor | None = None
    ) -> Gaussian:
        """P_mix, broadcast to [B C x y z], of what is seen. latents: means; without log_var variances are 1."""
        return self.mix(self.read(latents, log_var), seen)

    def divergence(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """What the loss is made of: KL( q(Z_j|X_j) ‖ P_mix ) of each modality, nats, the mean over elements."""
        p = self.mix(own.detached() if self.detached else own, seen)
        spread = p.log_var if p.log_var.ndim == 0 else p.log_var[:, None]
        return kl(own, Gaussian(p.mean[:, None], spread)).mean(dim=(2, 3, 4, 5))

    def note(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> None:
        """Remember something of the latents of the loss that is worked out next, without a gradient."""

    def defined(self, seen: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        """Samples in which the anchor exists."""
        return seen.any(dim=1)

    def weights(self) -> Float[Tensor, " M"] | None:
        """w over all M modalities, where the anchor has them whatever the sample."""
        return None

    def told(self) -> dict[str, Tensor]:
        """What a log is told after a loss: ``weights`` [M], ``log_var`` (mean over what was seen), or neither."""
        weights = self.weights()
        return self.noted if weights is None else {"weights": weights.detach(), **self.noted}


class Mixture(Anchor, ABC):
    """P = Σ_{j∈S} w_j Z_j with Σ_{j∈S} w_j = 1; of latents with variances, the Gaussian with the mixture's moments."""

    @abstractmethod
    def shares(self, mean: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """w_j of every sample, 0 where j is not seen."""

    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        # Not einsum: under autocast that would be a bfloat16 product.
        shares = self.shares(own.mean, seen).to(own.mean.dtype)[:, :, None, None, None, None]
        if own.log_var.ndim == 0:
            return Gaussian.unit((shares * own.mean).sum(dim=1))
        return mixed(own, shares, dim=1)


class Uniform(Mixture):
    """Σ_j Z_j / |S|: the control that every learned mixture has to beat, and the common shape of several:

    P = Σ_{j∈S} w_j Z_j / Σ_{j∈S} w_j  with w_j = 1/M here.
    """

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities

    def weights(self) -> Float[Tensor, " M"]:
        return torch.full((self.modalities,), 1 / self.modalities)

    def shares(self, mean: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        weights = self.weights().to(mean) * seen
        total = weights.sum(dim=1, keepdim=True)
        return weights / torch.where(seen.any(dim=1, keepdim=True), total, torch.ones_like(total))


class LearnedMixture(Uniform):
    """P*_mix: Σ_j w_j Z_j with w = softmax(θ), θ ∈ R^M learned from 0, renormalised over what is seen.

    Without filling, the only force on w is Σ_j ‖Z_j − P‖², whose minimiser is w = 1/M: expect the weights to carry no
    information then (docs/method.md).
    """

    def __init__(self, modalities: int) -> None:
        super().__init__(modalities)
        self.theta = nn.Parameter(torch.zeros(modalities))

    def weights(self) -> Float[Tensor, " M"]:
        return self.theta.softmax(dim=0)


class RatioMixture(Uniform):
    """The published form of P*_mix: w / Σw from w ~ N(0, 0.1²). Some weight starts negative with probability 0.88."""

    def __init__(self, modalities: int) -> None:
        super().__init__(modalities)
        self.w = nn.Parameter(0.1 * torch.randn(modalities))

    def weights(self) -> Float[Tensor, " M"]:
        return self.w / self.w.sum()


class FixedModality(Anchor):
    """P^k_mix: the latent of modality k behind a stop-gradient. Says nothing about a sample without k."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def defined(self, seen: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        return seen[:, self.index]

    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        mean = own.mean[:, self.index].detach()
        return Gaussian.unit(mean) if own.log_var.ndim == 0 else Gaussian(mean, own.log_var[:, self.index].detach())


class StandardNormal(Anchor):
    """P^N: N(0, I), whatever the sample."""

    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        return Gaussian.unit(torch.zeros_like(own.mean[:, 0]))


class PrecisionWeighted(Anchor):
    """The barycentre of Gaussian latents: who is sure of an element says where the others are pulled to.

        q_j = N(μ_j, 1/λ_j)     λ_j = 1/σ_j², element by element, [B M C x y z]
        P   = N(μ, 1/λ)         μ = Σ_{j∈S} λ_j μ_j / Σ_{j∈S} λ_j,   λ = Σ_{j∈S} λ_j / |S|

    λ is the mean and not the sum: modalities that agree cost 0, and so does one alone. The product of experts, whose
    precision is the sum, charges four that agree 0.81 nats an element. Gaussian latents bring their own log σ². For all
    others each modality has a head h_j here, a convolution 1³ of ``channels`` to as many::

        log σ_j² = 4 tanh(h_j(z_j / √(1 + mean over channels of z_j²))) − 2        in (−6, 2); 0 at the start

    and the decoder is given samples in training (`sample`), means at test. That is the price of a variance: a modality
    with a large one is pulled less and counts less, but what it tells the decoder drowns.

    Source: precision-weighted averages; samples as in Kingma & Welling 2014.
    """

    def __init__(self, modalities: int, channels: int = 0) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv3d(channels, channels, 1) for _ in range(modalities if channels else 0))
        for name, parameter in self.heads.named_parameters():
            nn.init.constant_(parameter, atanh(0.5) if name.endswith("bias") else 0)  # 4 · 0.5 − 2 = 0

    def log_var(self, latent: Float[Tensor, "B C x y z"], index: int) -> Float[Tensor, "B C x y z"]:
        """log σ² of one modality's latent, from its head, float32."""
        with torch.autocast(latent.device.type, enabled=False):
            raw: Tensor = self.heads[index](_bounded(latent.float()))
            return 4 * raw.tanh() - 2

    def sample(self, latent: Float[Tensor, "B C x y z"], index: int, rows: Bool[Tensor, " B"]) -> Tensor:
        """z + σ ε, ε ~ N(0, I), of one modality's latent; gradients reach z and σ. Other rows stay as they are."""
        noise = (0.5 * self.log_var(latent, index)).exp() * torch.randn_like(latent, dtype=torch.float32)
        return (latent + noise * rows[:, None, None, None, None]).to(latent.dtype)

    def read(self, latents: Float[Tensor, "B M C x y z"], log_var: Tensor | None = None) -> Gaussian:
        if log_var is None and self.heads:
            log_var = torch.stack([self.log_var(z, m) for m, z in enumerate(latents.unbind(1))], dim=1)
        return super().read(latents, log_var)

    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        there = _seen_or_all(seen)[:, :, None, None, None, None]
        log_precision = (-own.log_var).expand_as(own.mean).masked_fill(~there, -inf)
        mean = (log_precision.softmax(dim=1) * own.mean).sum(dim=1)
        return Gaussian(mean, there.sum(dim=1).to(mean).log() - log_precision.logsumexp(dim=1))

    def note(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> None:
        each = own.log_var.detach().expand_as(own.mean).mean(dim=(2, 3, 4, 5))
        self.noted = {"log_var": (each * seen).sum() / seen.sum().clamp(min=1)}


class Moments(Uniform):
    """Distributions are aligned and not voxels: how each channel's values spread over the voxels of a sample.

        q_j = N(m_j, v_j)     m_jc, v_jc: mean and variance of Z_jc over the sample's voxels, [B M C]
        P   = N(m, v)         m = Σ_{j∈S} m_j / |S|,   v = Σ_{j∈S} (v_j + (m_j − m)²) / |S|

    P has the moments of the equal mixture of what is seen. To v_j of Gaussian latents belongs the mean of their own
    variances; no variance counts as less than 1e-6. The loss is 0 for one modality, and where all have the same
    moments: *where* a value stands does not matter.

    Source: moment matching, as a divergence of Gaussians.
    """

    def read(self, latents: Float[Tensor, "B M C x y z"], log_var: Tensor | None = None) -> Gaussian:
        """q_j, [B M C 1 1 1]."""
        return moments(latents.float(), (3, 4, 5), None if log_var is None else log_var.float())


class MovingMoments(Moments):
    """A dynamic anchor: `Moments` remembered over the training, one distribution for all samples.

        P = N(m, v)     m, v ∈ R^C: moments of the mixture d · (P before) + (1 − d) · (the batch)
        d = min(decay, n / (n + 1)) after n batches: P begins as the first, then is the mean of all, then forgets

    The batch is the mixture of its samples, each the equal mixture of the modalities it has; q_j as in `Moments`. P
    moves with every loss in training mode, just before it, and rests in evaluation; no gradient flows into it. It lies
    in buffers, which checkpoints hold: a resumed run has the same bits. Several processes average over all their rows
    and have one P. As it is the same for every sample, one modality alone pays as well; the loss is 0 where each has
    P's own moments, and before the first batch.

    Source: the running statistics of batch normalisation (Ioffe & Szegedy 2015), taken as an anchor.
    """

    mean: Tensor
    log_var: Tensor
    batches: Tensor

    def __init__(self, modalities: int, channels: int, decay: float = 0.99) -> None:
        super().__init__(modalities)
        self.decay = decay
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("log_var", torch.zeros(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def defined(self, seen: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        return seen.any(dim=1) & (self.batches > 0)

    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        # Copies: what is handed out must not move with the next batch.
        mean, log_var = (x.clone().view(-1, 1, 1, 1).expand(len(seen), -1, 1, 1, 1) for x in (self.mean, self.log_var))
        return Gaussian(mean, log_var)

    @torch.no_grad()
    def note(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> None:
        if not self.training:
            return
        rows = averaged(seen.any(dim=1).sum().to(self.mean))
        some = rows.clamp(min=1 / processes())  # as these are means over the processes
        mean, variance = own.mean[..., 0, 0, 0], own.log_var[..., 0, 0, 0].exp()
        share = (seen / seen.sum(dim=1, keepdim=True).clamp(min=1)).to(mean)[:, :, None]
        m = averaged((share * mean).sum(dim=(0, 1))) / some
        v = averaged((share * (variance + (mean - m).square())).sum(dim=(0, 1))) / some
        d = (self.batches / (self.batches + 1)).clamp(max=self.decay).where(rows > 0, 1.0)  # 1: P stays
        both = Gaussian(torch.stack([self.mean, m]), torch.stack([self.log_var, v.clamp(min=LEAST_VARIANCE).log()]))
        now = mixed(both, torch.stack([d, 1 - d])[:, None], dim=0)
        self.mean.copy_(now.mean)
        self.log_var.copy_(now.log_var)
        self.batches += rows > 0


class GatedMixture(Mixture):
    """A mixture whose weights depend on the case: Σ_j w_j Z_j over what is seen.

        w_j = softmax over j ∈ S of  g · z̄_j / √(1 + mean over channels of z̄_j²) + b_j

    z̄_j: mean of Z_j over the sample's voxels, [B M C]; g ∈ R^C: one gate for all modalities; b ∈ R^M; both learned from
    0, where P is the plain mean. The gate looks at *detached* latents: otherwise the loss could be lowered by channel
    means that please the gate and tell the decoder nothing. Without filling, the only force on g and b is towards the
    plain mean. The loss is 0 for one modality, and where all agree. Logged is the mean of w over one process's rows.

    Source: the gate of mixtures of experts (Jacobs et al. 1991).
    """

    def __init__(self, modalities: int, channels: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(modalities))

    def shares(self, mean: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        pooled = _bounded(mean.detach().float().mean(dim=(3, 4, 5)).movedim(2, 1))
        score = (pooled * self.gate[:, None]).sum(dim=1) + self.bias
        return score.masked_fill(~_seen_or_all(seen), -inf).softmax(dim=1)

    def note(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> None:
        self.noted = {"weights": self.shares(own.mean, seen).detach().mean(dim=0)}


class ElectedTeacher(Anchor):
    """LCKD: every modality learns from the latent of the one that is best alone, by validation.

        D_j = mean over elements of |Z_j − sg[Z_k]|        sg: stop-gradient; k: the teacher

    A distance and no divergence: not in nats. k has the highest mean Dice over regions among the single modalities;
    every validation elects anew (`elect`), and checkpoints hold k. Before the first there is no teacher, and the loss
    is 0; so it is in samples without k, for k alone, and where all agree.

    Source: Wang et al., MICCAI 2023 (arXiv 2310.01035), where each region may have teachers of its own.
    """

    teacher: Tensor

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.register_buffer("teacher", torch.tensor(-1))

    def elect(self, scores: Sequence[float]) -> None:
        """scores: of each modality alone, NaN where there is none; without any the teacher stays."""
        if not all(map(isnan, scores)):
            self.teacher.fill_(max(range(len(scores)), key=lambda m: -inf if isnan(scores[m]) else scores[m]))

    def defined(self, seen: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        return seen.index_select(1, self.teacher.clamp(min=0).view(1))[:, 0] & (self.teacher >= 0)

    def mix(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Gaussian:
        return Gaussian.unit(own.mean.index_select(1, self.teacher.clamp(min=0).view(1))[:, 0].detach())

    def divergence(self, own: Gaussian, seen: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        return (own.mean - self.mix(own, seen).mean[:, None]).abs().mean(dim=(2, 3, 4, 5))

    def told(self) -> dict[str, Tensor]:
        return {} if int(self.teacher) < 0 else {"weights": one_hot(self.teacher, self.modalities).float()}


def _bounded(x: Float[Tensor, "B C *any"]) -> Float[Tensor, "B C *any"]:
    """x / √(1 + mean over channels of x²): latents grow fortyfold in training, and tanh and softmax would harden."""
    return x / (1 + x.square().mean(dim=1, keepdim=True)).sqrt()


def _seen_or_all(seen: Bool[Tensor, "B M"]) -> Bool[Tensor, "B M"]:
    """A sample without anything counts as one with everything: nobody uses it, but it must be finite."""
    return seen | ~seen.any(dim=1, keepdim=True)


def alignment_loss(
    latents: Float[Tensor, "B M C x y z"],
    anchor: Anchor,
    seen: Bool[Tensor, "B M"],
    log_var: Float[Tensor, "B M C x y z"] | None = None,
) -> Float[Tensor, ""]:
    """L_align of one level, in nats per latent element (for `ElectedTeacher` in the unit of latents).

        L = 1/B Σ_b 1/|S_b| Σ_{j∈S_b} D_bj        D: `Anchor.divergence`, the mean over elements of KL( q_bj ‖ P_mix,b )

    latents: Z, [B M C x y z]; rows of modalities that are not seen may hold anything
    anchor:  P_mix; samples in which it does not exist add 0
    seen:    S as a mask, Bool[B M]
    log_var: log σ² of a backbone with Gaussian latents; σ = 1 without

    Worked out in float32. For M = 4, all seen, a mixture anchor and unit variances this is Σ_j MSE(Z_j, P) / 8 of
    MedMAP's public code.
    >>> z = torch.randn(2, 4, 3, 2, 2, 2)
    >>> bool(alignment_loss(z[:, :1].expand_as(z), Uniform(4), torch.ones(2, 4, dtype=torch.bool)) < 1e-12)
    True
    """
    absent = ~seen[:, :, None, None, None, None]
    spread = None if log_var is None else log_var.float().masked_fill(absent, 0)
    own = anchor.read(latents.float().masked_fill(absent, 0), spread)
    anchor.note(own, seen)
    terms = anchor.divergence(own, seen)
    counted = seen & anchor.defined(seen)[:, None]
    per_sample = (terms * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return per_sample.mean()


def build_anchor(config: AlignConfig, modalities: ModalitySet, channels: int = 0) -> Anchor:
    """The anchor a configuration names. Raises ConfigError where ``fixed`` is none of the modalities. channels: of the
    latents, for precision, ema and gated; 0 for precision where latents bring their own variances."""
    count, name = len(modalities), canonical(config.fixed or "")
    if config.anchor == "pk" and name not in modalities:
        raise ConfigError(f"align.fixed: {config.fixed} is not one of the model's modalities {', '.join(modalities)}")
    kinds: dict[str, Callable[[], Anchor]] = {
        "pstar": lambda: (LearnedMixture if config.weights == "softmax" else RatioMixture)(count),
        "pk": lambda: FixedModality(modalities.names.index(name)),
        "pn": StandardNormal,
        "uniform": lambda: Uniform(count),
        "precision": lambda: PrecisionWeighted(count, channels),
        "moments": lambda: Moments(count),
        "ema": lambda: MovingMoments(count, channels),
        "gated": lambda: GatedMixture(count, channels),
        "lckd": lambda: ElectedTeacher(count),
    }
    anchor = kinds[config.anchor]()
    anchor.detached = config.detach
    return anchor
