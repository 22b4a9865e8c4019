"""MedMAP: latents of every modality are pulled to one anchor distribution.

    L = L_backbone + α · L_align            L_align = 1/|S| · Σ_{j∈S} KL( q(Z_j|X_j) ‖ P_mix )

Two anchors must not be confused. The *loss* anchor is built over ``seen``, what exists on disk; the *filling* anchor
over ``kept``, what this pass may look at, in training and at test alike. Building the second over ``seen`` lets a
dropped modality into the prediction.

Source: MedMAP (arXiv 2408.09465). Deviations from its public fragment, all of them by default: weights are a softmax
and not w/Σw; masks are per sample; nothing that was dropped enters a prediction; features are not rescaled at test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medmap.config import AlignConfig, ModelConfig
from medmap.core.gaussian import Gaussian, kl, mixed
from medmap.core.modality import ModalitySet, canonical
from medmap.errors import ConfigError
from medmap.models import build_backbone
from medmap.models.backbone import Auxiliary, Backbone, Decoded, Encoded, Term, stacked, trait
from medmap.models.stem import Stem, build_stem

STEM = "stem"


class Anchor(nn.Module, ABC):
    """P_mix of one level: a distribution made from latents, or given beforehand."""

    @abstractmethod
    def forward(
        self, latents: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"], log_var: Tensor | None = None
    ) -> Gaussian:
        """Gaussian [B C x y z] from the modalities that are seen; the others have no influence.

        latents are means; ``log_var``, of the same shape, their log-variances; without it all variances are 1
        """

    def defined(self, seen: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        """Samples in which the anchor exists."""
        return seen.any(dim=1)

    def weights(self) -> Float[Tensor, " M"] | None:
        """w over all M modalities, where the anchor has them."""
        return None


class Uniform(Anchor):
    """Σ_j Z_j / |S|: the control that every learned mixture has to beat, and their common shape:

    P = Σ_{j∈S} w_j Z_j / Σ_{j∈S} w_j  with w_j = 1/M here.
    """

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities

    def weights(self) -> Float[Tensor, " M"]:
        return torch.full((self.modalities,), 1 / self.modalities)

    def forward(
        self, latents: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"], log_var: Tensor | None = None
    ) -> Gaussian:
        weights = self.weights().to(latents) * seen
        total = weights.sum(dim=1, keepdim=True)
        share = weights / torch.where(seen.any(dim=1, keepdim=True), total, torch.ones_like(total))
        # Not einsum: under autocast that would be a bfloat16 product.
        shares = share.to(latents.dtype)[:, :, None, None, None, None]
        if log_var is None:
            return Gaussian.unit((shares * latents).sum(dim=1))
        return mixed(Gaussian(latents, log_var), shares, dim=1)


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

    def forward(
        self, latents: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"], log_var: Tensor | None = None
    ) -> Gaussian:
        mean = latents[:, self.index].detach()
        return Gaussian.unit(mean) if log_var is None else Gaussian(mean, log_var[:, self.index].detach())


class StandardNormal(Anchor):
    """P^N: N(0, I), whatever the sample."""

    def forward(
        self, latents: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"], log_var: Tensor | None = None
    ) -> Gaussian:
        return Gaussian.unit(torch.zeros_like(latents[:, 0]))


def alignment_loss(
    latents: Float[Tensor, "B M C x y z"],
    anchor: Anchor,
    seen: Bool[Tensor, "B M"],
    log_var: Float[Tensor, "B M C x y z"] | None = None,
) -> Float[Tensor, ""]:
    """L_align of one level, in nats per latent element.

        L = 1/B Σ_b 1/|S_b| Σ_{j∈S_b} mean over elements of KL( N(Z_bj, σ²_bj) ‖ P_mix,b )

    latents: Z, [B M C x y z]; rows of modalities that are not seen may hold anything finite
    anchor:  P_mix; samples in which it does not exist add 0
    seen:    S as a mask, Bool[B M]
    log_var: log σ² of a backbone with Gaussian latents; σ = 1 without

    For M = 4, all seen, a mixture anchor and unit variances this is Σ_j MSE(Z_j, P) / 8 of MedMAP's public code.
    >>> z = torch.randn(2, 4, 3, 2, 2, 2)
    >>> bool(alignment_loss(z[:, :1].expand_as(z), Uniform(4), torch.ones(2, 4, dtype=torch.bool)) < 1e-12)
    True
    """
    latents = latents.float()
    own = Gaussian.unit(latents) if log_var is None else Gaussian(latents, log_var.float())
    target = anchor(latents, seen) if log_var is None else anchor(latents, seen, own.log_var)
    counted = seen & anchor.defined(seen)[:, None]
    spread = target.log_var if target.log_var.ndim == 0 else target.log_var[:, None]
    terms = kl(own, Gaussian(target.mean[:, None], spread)).mean(dim=(2, 3, 4, 5))
    per_sample = (terms * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return per_sample.mean()


def fill_absent(
    encoded: Encoded,
    level: str,
    anchor: Anchor,
    modalities: ModalitySet,
    over: Bool[Tensor, "B M"],
    kept: Bool[Tensor, "B M"],
    gaussian: bool = False,
) -> Encoded:
    """Replace the latents of one level that this pass may not look at by the anchor over ``over``.

    over: the modalities the anchor is built from: ``kept``, or ``seen`` for the published form (a leak)
    kept: what this pass may look at; everything else is replaced where the anchor exists
    gaussian: the latents hold means and log-variances, and so does what is put in
    """
    latents = stacked(encoded.levels[level], modalities)
    if gaussian:
        own = Gaussian.split(latents, dim=2)
        p = anchor(own.mean, over, own.log_var).joined(dim=1).to(latents.dtype)
    else:
        p = anchor(latents, over).mean.to(latents.dtype)
    absent = ~kept & anchor.defined(over)[:, None]
    whole = torch.where(absent[:, :, None, None, None, None], p[:, None], latents)
    return encoded.with_filled(level, {name: whole[:, m] for m, name in enumerate(modalities)}, absent)


class Output(NamedTuple):
    """What one training pass gives: logits [B K X Y Z], auxiliary logits, named losses, latents that were aligned, and
    the weights that the backbone gives to what it adds."""

    logits: Tensor
    auxiliary: dict[str, Auxiliary]
    losses: dict[str, Term]
    latents: dict[str, Tensor]
    weights: Mapping[str, float]


class AlignedSegmenter(nn.Module):
    """Stem → encode → anchor → fill → decode.

    backbone: any `Backbone`; stem: T or None; anchors: one per aligned level, by name (``stem`` is T's own output)
    fill:     none | kept | seen, see `AlignConfig`

    >>> from medmap.core.modality import GLIOMA_MRI
    >>> net = build_segmenter(ModelConfig(size="tiny"), AlignConfig(levels=("x4",)), GLIOMA_MRI, classes=4)
    >>> seen = torch.ones(2, 4, dtype=torch.bool)
    >>> out = net(torch.randn(2, 4, 16, 16, 16), seen, torch.tensor([[True, False, False, False]]).expand(2, 4))
    >>> out.logits.shape, sorted(out.losses)
    (torch.Size([2, 4, 16, 16, 16]), ['align/x4'])
    """

    def __init__(
        self,
        backbone: Backbone,
        stem: Stem | None,
        anchors: Mapping[str, Anchor],
        fill: str = "none",
        scale_at_test: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.stem = stem
        self.anchors = nn.ModuleDict(dict(anchors))
        self.fill, self.scale_at_test = fill, scale_at_test

    def _anchor(self, level: str) -> Anchor:
        return cast(Anchor, self.anchors[level])

    @property
    def modalities(self) -> ModalitySet:
        """The sequences, in mask order."""
        return self.backbone.modalities

    @property
    def stride(self) -> int:
        """Voxels per element of the coarsest latent."""
        return max(self.backbone.strides.values())

    @property
    def separable(self) -> bool:
        """Whether a sequence may be encoded alone, once for all subsets."""
        stem_alone = self.stem is None or (
            bool(self.stem.separable) and not (self.fill != "none" and STEM in self.anchors)
        )
        return stem_alone and self.backbone.separable

    def digested(self, encoded: Encoded) -> Encoded:
        """With what the backbone makes of each latent in its place, where nothing is filled in or rescaled before."""
        if (digest := getattr(self.backbone, "digest", None)) is None:
            return encoded
        changed = {STEM, *(self.anchors if self.fill != "none" or self.scale_at_test else ())}
        kept = {level: z for level, z in encoded.levels.items() if level in changed}
        ready = [(level, z) for level, z in encoded.levels.items() if level not in changed]
        digests = {level: {n: digest(level, n, z) for n, z in each.items()} for level, each in ready}
        return replace(encoded, levels=kept, digests=digests)

    def anchor_weights(self) -> dict[str, dict[str, float]]:
        """{level: {modality: w}} of the anchors that have weights."""
        found = {level: self._anchor(level).weights() for level in self.anchors}
        return {
            level: dict(zip(self.modalities, w.tolist(), strict=True)) for level, w in found.items() if w is not None
        }

    def encode(
        self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"], kept: Bool[Tensor, "B M"] | None = None
    ) -> Encoded:
        """Latents of the seen modalities, the stem's among them. ``kept`` (default: all seen) matters to a joint stem,
        which may not look at anything else, and to a stem that is filled."""
        kept = seen if kept is None else kept
        if self.stem is None:
            return self.backbone.encode(images, seen)
        if not self.stem.separable:
            seen = kept
        latents = Encoded({STEM: self.stem(images, seen)}, _size(images))
        inputs = latents
        if self.fill != "none" and STEM in self.anchors:
            inputs = self._filled(latents, STEM, seen, kept)
        encoded = self.backbone.encode(self._scaled(STEM, inputs.levels[STEM]), inputs.present(STEM, seen))
        # The loss is about the latents as they were, not about what was put in their place.
        return replace(encoded, levels={**latents.levels, **encoded.levels}, filled=inputs.filled)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"], seen: Bool[Tensor, "B M"] | None = None) -> Decoded:
        """Logits from the kept modalities. ``seen`` is looked at by the published filling alone."""
        seen = kept if seen is None or self.fill != "seen" else seen
        for level in self.anchors:
            if self.fill != "none" and level != STEM:
                encoded = self._filled(encoded, level, seen, kept)
        if STEM in encoded.filled:
            kept = kept | encoded.filled[STEM]
        levels = {level: self._scaled(level, latents) for level, latents in encoded.levels.items()}
        return self.backbone.decode(replace(encoded, levels=levels), kept)

    def forward(self, images: Tensor, seen: Tensor, kept: Tensor) -> Output:
        """One training pass over images [B M X Y Z] with masks Bool[B M]."""
        named = {name: images[:, m : m + 1] for m, name in enumerate(self.modalities)}
        # Without an anchor nobody asks for the latents of what was dropped, but a backbone whose own losses do.
        visible = seen if self.anchors or trait(self.backbone, "uses_dropped") else kept
        encoded = self.encode(named, visible, kept)
        present = kept if self.stem is not None and not self.stem.separable else visible
        latents = {level: stacked(encoded.levels[level], self.modalities) for level in self.anchors}
        losses = {f"align/{level}": self._alignment(level, z, present) for level, z in latents.items()}
        decoded = self.decode(encoded, kept, seen)
        weights = trait(self.backbone, "loss_weights")
        return Output(decoded.logits, decoded.auxiliary, {**decoded.losses, **losses}, latents, weights)

    def at_progress(self, share: float) -> None:
        """Tell the backbone which share of the training steps is done, if it asks."""
        if hasattr(self.backbone, "progress"):
            self.backbone.progress = share

    def _is_gaussian(self, level: str) -> bool:
        return level != STEM and bool(trait(self.backbone, "gaussian"))

    def _alignment(self, level: str, latents: Tensor, seen: Tensor) -> Tensor:
        if not self._is_gaussian(level):
            return alignment_loss(latents, self._anchor(level), seen)
        own = Gaussian.split(latents, dim=2)
        return alignment_loss(own.mean, self._anchor(level), seen, own.log_var)

    def _filled(self, encoded: Encoded, level: str, seen: Tensor, kept: Tensor) -> Encoded:
        over = seen if self.fill == "seen" else kept
        return fill_absent(
            encoded, level, self._anchor(level), self.modalities, over, kept, gaussian=self._is_gaussian(level)
        )

    def _scaled(self, level: str, latents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.training or not self.scale_at_test or level not in self.anchors:
            return latents
        weights = self._anchor(level).weights()
        if weights is None or self._is_gaussian(level):
            return latents
        return {name: z * weights[self.modalities.names.index(name)] for name, z in latents.items()}


def _size(images: Mapping[str, Tensor]) -> tuple[int, int, int]:
    x, y, z = next(iter(images.values())).shape[2:]
    return x, y, z


def build_anchor(config: AlignConfig, modalities: ModalitySet) -> Anchor:
    """The anchor a configuration names."""
    if config.anchor == "pk":
        name = canonical(config.fixed or "")
        if name not in modalities:
            raise ConfigError(
                f"align.fixed: {config.fixed} is not one of the model's modalities {', '.join(modalities)}"
            )
        return FixedModality(modalities.names.index(name))
    if config.anchor == "pn":
        return StandardNormal()
    if config.anchor == "uniform":
        return Uniform(len(modalities))
    return (LearnedMixture if config.weights == "softmax" else RatioMixture)(len(modalities))


def _check_weights(model: ModelConfig, backbone: Backbone, aligned: tuple[str, ...]) -> None:
    """Raises ConfigError for a weight of a term that a backbone which names its terms does not have."""
    if not hasattr(backbone, "loss_weights"):
        return
    terms = ["dice_ce", *trait(backbone, "loss_weights"), *(f"align/{level}" for level in aligned)]
    for name in model.loss_weights:
        if name not in terms and name.partition("/")[0] not in terms:
            near = get_close_matches(name, terms, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"model.loss_weights: {model.name} {model.size} has no term {name!r}; {hint}it has {', '.join(terms)}"
            )
    chosen = {**trait(backbone, "loss_weights"), **model.loss_weights}
    for name, needed in trait(backbone, "needs").items():
        if chosen[name] and not chosen[needed]:
            raise ConfigError(
                f"model.loss_weights: {needed} is switched off, but {name} of {model.name} has nothing to learn from "
                f"without it; leave {needed} on (one command trains both), or set {name}: 0 too"
            )


def build_segmenter(model: ModelConfig, align: AlignConfig, modalities: ModalitySet, classes: int) -> AlignedSegmenter:
    """The network a configuration describes. With α = 0 and no filling there is no anchor at all.

    Raises ConfigError for an unknown backbone, size or level, with what there is.
    """
    students = [modalities.parse(subset) for subset in model.students]
    backbone = build_backbone(model.name, modalities, classes, model.size, students)
    stem = build_stem(model.stem, modalities, model.stem_published)
    offered = [*([STEM] if stem is not None else []), *backbone.strides]
    wanted = align.levels or tuple(backbone.strides)[-1:]
    for level in wanted:
        if level not in offered:
            raise ConfigError(
                f"align.levels: {model.name} {model.size} has no level {level!r}; it offers {', '.join(offered)}"
            )
    if align.anchor == "none" or (align.alpha == 0 and align.fill == "none"):
        wanted = ()
    _check_weights(model, backbone, wanted)
    anchors = {level: build_anchor(align, modalities) for level in wanted}
    return AlignedSegmenter(backbone, stem, anchors, align.fill, align.scale_at_test)
