"""MedMAP: latents of every modality are pulled to one anchor distribution.

    L = L_backbone + α · L_align            L_align = 1/|S| · Σ_{j∈S} KL( q(Z_j|X_j) ‖ P_mix )

Two anchors must not be confused. The *loss* anchor is built over ``seen``, what exists on disk; the *filling* anchor
over ``kept``, what this pass may look at, in training and at test alike. Building the second over ``seen`` lets a
dropped modality into the prediction.

Source: MedMAP (arXiv 2408.09465). Deviations from its public fragment, all of them by default: weights are a softmax
and not w/Σw; masks are per sample; nothing that was dropped enters a prediction; features are not rescaled at test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from math import nan
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from medmap.anchors import Anchor, ElectedTeacher, PrecisionWeighted, alignment_loss, build_anchor
from medmap.config import AlignConfig, ModelConfig
from medmap.core.gaussian import Gaussian
from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.models import build_backbone
from medmap.models.backbone import Auxiliary, Backbone, Decoded, Encoded, Term, stacked, trait
from medmap.models.stem import Stem, build_stem

STEM = "stem"


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
    >>> net = build_segmenter(ModelConfig(size="tiny"), AlignConfig(anchor="pstar"), GLIOMA_MRI, classes=4)
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

    @property
    def uses_dropped(self) -> bool:
        """Whether training asks for the latents of what was dropped: an anchor does, or a backbone's own losses."""
        leaks = self.stem is not None and self.stem.leaks
        return bool(self.anchors) or leaks or bool(trait(self.backbone, "uses_dropped"))

    @property
    def blinkered(self) -> bool:
        """Whether a joint T mixes the sequences, so that it may see, and makes latents of, what is kept alone."""
        return self.stem is not None and not self.stem.separable and not self.stem.leaks

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
        """{level: {modality: w}} of the anchors that have weights; where these depend on the case, of the last loss."""
        found = {level: self._anchor(level).told().get("weights") for level in self.anchors}
        return {
            level: dict(zip(self.modalities, w.tolist(), strict=True)) for level, w in found.items() if w is not None
        }

    def anchor_log_var(self) -> dict[str, float]:
        """{level: mean log-variance of the latents in the last loss} of the anchors that are about variances."""
        found = {level: self._anchor(level).told().get("log_var") for level in self.anchors}
        return {level: float(log_var) for level, log_var in found.items() if log_var is not None}

    def elect(self, scores: Mapping[str, float]) -> None:
        """Tell the anchors that choose a teacher how good each modality alone was in validation."""
        for anchor in self.anchors.values():
            if isinstance(anchor, ElectedTeacher):
                anchor.elect([scores.get(name, nan) for name in self.modalities])

    def encode(
        self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"], kept: Bool[Tensor, "B M"] | None = None
    ) -> Encoded:
        """Latents of the seen modalities, the stem's among them. ``kept`` (default: all seen) matters to a joint stem,
        which may not look at anything else, and to a stem that is filled."""
        kept = seen if kept is None else kept
        if self.stem is None:
            return self.backbone.encode(images, seen)
        if self.blinkered:
            seen = kept
        latents = Encoded({STEM: self.stem(images, seen)}, _size(images))
        inputs = latents
        if STEM in self.anchors:
            inputs = self._sampled(self._filled(latents, STEM, seen, kept), STEM, seen)
        encoded = self.backbone.encode(self._scaled(STEM, inputs.levels[STEM]), inputs.present(STEM, seen))
        # The loss is about the latents as they were, not about samples or what was put in their place.
        return replace(encoded, levels={**latents.levels, **encoded.levels}, filled=inputs.filled)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"], seen: Bool[Tensor, "B M"] | None = None) -> Decoded:
        """Logits from the kept modalities. ``seen`` is looked at by the published filling alone."""
        seen = kept if seen is None else seen
        for level in self.anchors:
            if level != STEM:
                encoded = self._sampled(self._filled(encoded, level, seen, kept), level, seen)
        if STEM in encoded.filled:
            kept = kept | encoded.filled[STEM]
        levels = {level: self._scaled(level, latents) for level, latents in encoded.levels.items()}
        return self.backbone.decode(replace(encoded, levels=levels), kept)

    def forward(self, images: Tensor, seen: Tensor, kept: Tensor) -> Output:
        """One training pass over images [B M X Y Z] with masks Bool[B M]."""
        named = {name: images[:, m : m + 1] for m, name in enumerate(self.modalities)}
        visible = seen if self.uses_dropped else kept
        encoded = self.encode(named, visible, kept)
        present = kept if self.blinkered else visible
        latents = {level: stacked(encoded.levels[level], self.modalities) for level in self.anchors}
        losses = {f"align/{level}": self._alignment(level, z, present) for level, z in latents.items()}
        decoded = self.decode(encoded, kept, present)
        weights = trait(self.backbone, "loss_weights")
        return Output(decoded.logits, decoded.auxiliary, {**decoded.losses, **losses}, latents, weights)

    def at_progress(self, share: float) -> None:
        """Tell the backbone which share of the training steps is done, if it asks."""
        if hasattr(self.backbone, "progress"):
            self.backbone.progress = share

    def is_gaussian(self, level: str) -> bool:
        """Whether the backbone's latents there hold means and log-variances, one after the other."""
        return level != STEM and bool(trait(self.backbone, "gaussian"))

    def _alignment(self, level: str, latents: Tensor, seen: Tensor) -> Tensor:
        if not self.is_gaussian(level):
            return alignment_loss(latents, self._anchor(level), seen)
        own = Gaussian.split(latents, dim=2)
        return alignment_loss(own.mean, self._anchor(level), seen, own.log_var)

    def _filled(self, encoded: Encoded, level: str, seen: Tensor, kept: Tensor) -> Encoded:
        if self.fill == "none":
            return encoded
        over = seen if self.fill == "seen" else kept
        return fill_absent(
            encoded, level, self._anchor(level), self.modalities, over, kept, gaussian=self.is_gaussian(level)
        )

    def _sampled(self, encoded: Encoded, level: str, seen: Tensor) -> Encoded:
        """In training a draw from each latent whose variance an anchor learns; what was filled in stays a mean."""
        anchor = self._anchor(level)
        if not (self.training and isinstance(anchor, PrecisionWeighted) and anchor.heads):
            return encoded
        rows = seen & ~encoded.filled[level] if level in encoded.filled else seen
        at = self.modalities.names.index
        drawn = {name: anchor.sample(z, at(name), rows[:, at(name)]) for name, z in encoded.levels[level].items()}
        return replace(encoded, levels={**encoded.levels, level: drawn})

    def _scaled(self, level: str, latents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.training or not self.scale_at_test or level not in self.anchors:
            return latents
        weights = self._anchor(level).weights()
        if weights is None or self.is_gaussian(level):
            return latents
        return {name: z * weights[self.modalities.names.index(name)] for name, z in latents.items()}


def _size(images: Mapping[str, Tensor]) -> tuple[int, int, int]:
    x, y, z = next(iter(images.values())).shape[2:]
    return x, y, z


def _check_weights(model: ModelConfig, backbone: Backbone, aligned: tuple[str, ...]) -> None:
    """Raises ConfigError for a weight of a term that a backbone which names its terms does not have."""
    if not hasattr(backbone, "loss_weights"):
        return
    terms = list(dict.fromkeys(["dice_ce", *trait(backbone, "loss_weights"), *(f"align/{level}" for level in aligned)]))
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
            near = get_close_matches(level, offered, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"align.levels: {model.name} {model.size} has no level {level!r}; {hint}it offers {', '.join(offered)}"
            )
    if align.anchor == "none" or (align.alpha == 0 and align.fill == "none"):
        wanted = ()
    _check_weights(model, backbone, wanted)
    _check_stages(model, align, backbone)
    plain = AlignedSegmenter(backbone, stem, {})
    channels = _channels(plain, align) if wanted and align.anchor in ("precision", "ema", "gated") else {}
    anchors = {level: build_anchor(align, modalities, channels.get(level, 0)) for level in wanted}
    return AlignedSegmenter(backbone, stem, anchors, align.fill, align.scale_at_test)


def _check_stages(model: ModelConfig, align: AlignConfig, backbone: Backbone) -> None:
    """Raises ConfigError for what would move, or change what is shown to, the parts of a network that learn in turns.

    A teacher that has learned is frozen, and each student answers from what it has: a T in front of both, variances
    that only an alignment loss still teaches, and latents that are put in the place of absent ones break that.
    """
    if not trait(backbone, "stages"):
        return
    wrong = {
        f"model.stem: {model.stem}": model.stem != "none",
        f"align.fill: {align.fill}": align.fill != "none",
        f"align.anchor: {align.anchor}": align.anchor == "precision",
    }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise ConfigError(
            f"{', '.join(found)}: {model.name} cannot have it, for its students learn from a teacher that stands still "
            "and answer from their own sequences alone; take model.stem: none, align.fill: none and another anchor"
        )


@torch.no_grad()
def _channels(network: AlignedSegmenter, align: AlignConfig) -> dict[str, int]:
    """{level: channels that `build_anchor` is told}: no network says how many it has, so a small image is encoded."""
    subset, edge = network.backbone.supported_subsets()[0], 2 * network.stride
    seen = torch.tensor([[name in subset.names for name in network.modalities]])
    training = network.training
    with torch.random.fork_rng(devices=[]):
        encoded = network.eval().encode({name: torch.zeros(1, 1, edge, edge, edge) for name in subset}, seen)
    network.train(training)
    gaussian = trait(network.backbone, "gaussian")

    def told(level: str, width: int) -> int:
        if level == STEM or not gaussian:
            return width
        return 0 if align.anchor == "precision" else width // 2  # half are log-variances, and then need no heads

    return {level: told(level, next(iter(latents.values())).shape[1]) for level, latents in encoded.levels.items()}
