"""What a network must offer to be trained, evaluated and explained by medmap.

Two steps, because alignment sits between them::

    images, seen ── encode ──▶ Encoded ── (align, fill) ──▶ decode, kept ──▶ Decoded

``seen`` says which sequences exist, ``kept`` which of them this pass may look at. A sequence that is not kept must be
unable to move the logits. `medmap.models.check.check_backbone` holds a network to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medmap.core.modality import ModalitySet

Size3 = tuple[int, int, int]
Levels = Mapping[str, Mapping[str, Tensor]]
Term = Tensor | Callable[[Tensor], Tensor]
"""A loss term: a scalar, or what makes one of the truth, Int[B X Y Z] class indices."""


@dataclass(frozen=True)
class Encoded:
    """Latents of every sequence, by level and modality.

    levels:  {level: {modality: [B C x y z]}}; rows of samples in which the modality is not seen are 0; a modality
             that no sample has may be left out
    size:    (X, Y, Z) of the images in voxels; logits come back in this size
    context: whatever the backbone hands from encode to decode besides; None for a separable backbone
    filled:  per level, Bool[B M] of latents that were put in for absent ones
    seen:    Bool[B M], what was encoded, for a backbone whose own losses look at what was dropped
    digests: {level: {modality: what the backbone's ``digest`` made of these latents}}, where that is done already
    """

    levels: Levels
    size: Size3
    context: Any = None
    filled: Mapping[str, Tensor] = field(default_factory=dict)
    seen: Tensor | None = None
    digests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def digest(self, backbone: Backbone, level: str, name: str) -> Any:
        """A backbone's digest of one latent: the one that is here, or a new one."""
        ready = self.digests.get(level, {})
        make: Callable[[str, str, Tensor], Any] = getattr(backbone, "digest")  # noqa: B009 (need not be there)
        return ready[name] if name in ready else make(level, name, self.levels[level][name])

    def present(self, level: str, kept: Bool[Tensor, "B M"]) -> Bool[Tensor, "B M"]:
        """Which latents of a level a decoder may use: the kept ones, and those that were filled in."""
        return kept | self.filled[level] if level in self.filled else kept

    def own(self, kept: Bool[Tensor, "B M"]) -> Bool[Tensor, "B M"]:
        """Which latents are still those of a sequence itself at every level: seen, and nothing put in their place."""
        own = kept if self.seen is None else self.seen
        for filled in self.filled.values():
            own = own & ~filled
        return own

    def with_filled(self, level: str, latents: Mapping[str, Tensor], filled: Bool[Tensor, "B M"]) -> Encoded:
        """These latents with one level replaced."""
        return replace(self, levels={**self.levels, level: latents}, filled={**self.filled, level: filled})


class Auxiliary(NamedTuple):
    """More logits that training holds against the truth, with the same criterion as the main ones.

    logits: [B K x y z], of any resolution
    rows:   Bool[B] samples that count, or None for all
    """

    logits: Tensor
    rows: Tensor | None = None


class Decoded(NamedTuple):
    """The answer: logits [B K X Y Z]; further logits to supervise, by name; the backbone's own loss terms, by name.

    A name may have parts, as in ``separate/t1n``; a weight for ``separate`` is one for all of them.
    """

    logits: Tensor
    auxiliary: dict[str, Auxiliary]
    losses: Mapping[str, Term]

    def terms(self, target: Tensor) -> dict[str, Tensor]:
        """The own loss terms as scalars, given the truth Int[B X Y Z]."""
        return {name: term if isinstance(term, Tensor) else term(target) for name, term in self.losses.items()}


@runtime_checkable
class Backbone(Protocol):
    """A torch module with these members; nothing has to be inherited but `torch.nn.Module`.

    Those after ``separable`` need not be there; `trait` reads them.

    modalities: the sequences it was built for; column m of every mask is ``modalities.names[m]``
    classes:    K, label classes with the background
    strides:    {level: voxels per latent element}, the levels it offers for alignment
    separable:  encoding a modality depends on that modality alone, and ``context`` is None; then each sequence is
                encoded once for all subsets, on its own brain box
    loss_weights: {name: default weight} of everything it adds to the loss, auxiliary logits and own terms
    needs:        {term: the term it learns nothing without}
    stages:       shares of the training steps at which another part begins to learn, with a new learning rate
    uses_dropped: in training it wants the latents of what is seen but not kept as well, for its own losses
    gaussian:     a latent holds a mean and a log-variance, half of the channels each
    digest:       (level, modality, latent) → what ``decode`` makes of this latent whatever the others are; decode asks
                  `Encoded.digest` for it, and for many subsets it is made once
    progress:     the trainer sets it before each step to the share of the steps that are done, 0 … 1
    """

    modalities: ModalitySet
    classes: int
    strides: Mapping[str, int]
    separable: bool

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        """Latents of the modalities in ``images``, [B 1 X Y Z] each, any size, rows that are not seen arbitrary."""
        ...

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        """Logits from the kept modalities alone."""
        ...

    def supported_subsets(self) -> list[ModalitySet]:
        """The subsets it can answer; all 2^M − 1 unless the method cannot."""
        ...


TRAITS: dict[str, Any] = {"loss_weights": {}, "needs": {}, "stages": (), "uses_dropped": False, "gaussian": False}


_FREE: ContextVar[bool] = ContextVar("masks are free", default=False)
_FULL: ContextVar[bool] = ContextVar("masks are full", default=False)


@contextmanager
def free_masks(full: bool = False) -> Iterator[None]:
    """While this lasts, no decision is taken by what a mask holds: it has its effect through arithmetic alone.

    Every sequence passes its layers, and what a mask takes away becomes 0 behind them: the same result at a higher
    price. A graph that is recorded meanwhile holds for every subset, with the mask as an input.

    full: masks are known to be true everywhere, and need no arithmetic
    """
    free, known = _FREE.set(True), _FULL.set(full)
    try:
        yield
    finally:
        _FREE.reset(free)
        _FULL.reset(known)


def masks_are_free() -> bool:
    """Whether no decision may be taken by what a mask holds, see `free_masks`."""
    return _FREE.get()


def all_true(rows: Bool[Tensor, "*any"]) -> bool:
    """Whether a mask takes nothing away, as far as one may know."""
    return _FULL.get() if masks_are_free() else bool(rows.all())


def trait(backbone: Backbone, name: str) -> Any:
    """A member that a backbone need not have, or its default."""
    return getattr(backbone, name, TRAITS[name])


def encode_rows(
    module: Callable[[Tensor], Mapping[str, Tensor]], image: Float[Tensor, "B C X Y Z"], rows: Bool[Tensor, " B"]
) -> dict[str, Tensor]:
    """Run a module on the rows of a batch in which a modality exists, and put zeros in the others.

    What is absent then meets no convolution, no attention and no statistics of a normalisation.
    """
    if all_true(rows):
        return dict(module(image))
    if masks_are_free():
        return {level: z.where(rows.view(-1, *[1] * (z.ndim - 1)), 0.0) for level, z in module(image).items()}
    some = module(image.index_select(0, rows.nonzero().squeeze(1)))
    return {level: _among_zeros(latent, rows) for level, latent in some.items()}


def _among_zeros(latent: Float[Tensor, "b *any"], rows: Bool[Tensor, " B"]) -> Float[Tensor, "B *any"]:
    there, none = iter(latent.split(1)), blank(latent, (1, *latent.shape[1:]))
    return torch.cat([next(there) if row else none for row in rows.tolist()])


def blank(latent: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros of another shape, of the kind of a latent and with its layout in memory."""
    last = latent.ndim == 5 and not latent.is_contiguous()
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=latent.dtype, device=latent.device, memory_format=layout).zero_()


def stacked(latents: Mapping[str, Tensor], modalities: ModalitySet) -> Float[Tensor, "B M C x y z"]:
    """One level's latents as one tensor in the order of ``modalities``; zeros for a modality that is left out."""
    template = next(iter(latents.values()))
    return torch.stack([latents.get(name, torch.zeros_like(template)) for name in modalities], dim=1)


def columns(mask: Bool[Tensor, "B M"], modalities: ModalitySet) -> Iterator[tuple[str, Bool[Tensor, " B"]]]:
    """(modality, its column of the mask) for every modality that at least one sample has, or that one may have."""
    for index, name in enumerate(modalities):
        if masks_are_free() or bool(mask[:, index].any()):
            yield name, mask[:, index]
