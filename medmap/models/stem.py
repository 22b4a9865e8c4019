"""The encoder T of MedMAP: every image becomes a latent *before* the backbone, one full-resolution channel each.

    joint       groups = 1: every output channel sees all kept images. Absent images enter as zeros; the latent of an
                absent modality is never used. Encoding one modality then depends on the others, so each subset is
                encoded anew.
    leaking     the same, but in training it sees what is dropped: a fault of the published first form, here to be shown
    non_shared  one private stem per modality (groups = M)
    enhanced    private, wider and one layer deeper

Two blocks of [Conv3d 3³ without bias, normalisation, ReLU]. Published, the second block ends in BatchNorm and ReLU, and
the latents are aligned behind them (880 parameters for M = 4 in the joint form). Here the last block ends in its
convolution, because alignment behind a normalisation has nothing left to align; ``published=True`` restores theirs.
Source: MedMAP (arXiv 2408.09465), its T and the "non-shared" and "enhanced" comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from jaxtyping import Bool
from torch import Tensor, nn

from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.models.backbone import columns, encode_rows, stacked
from medmap.models.blocks import InstanceNorm
from medmap.models.convolution import Conv3d


class JointStem(nn.Module):
    """groups = 1: M images in, M latents out, mixed. The caller passes only what this pass may look at."""

    separable = False

    def __init__(self, modalities: ModalitySet, published: bool = False, leaks: bool = False) -> None:
        super().__init__()
        self.modalities, self.leaks = modalities, leaks
        m = len(modalities)
        self.mix = nn.Sequential(*_blocks((m, m, m), published))

    def forward(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> dict[str, Tensor]:
        """Latents [B 1 X Y Z] of the modalities that are seen; rows that are not seen are 0, before and after."""
        rows = dict(columns(seen, self.modalities))
        present = {name: images[name] * _rows(rows[name], images[name]) for name in rows}
        mixed = self.mix(stacked(present, self.modalities)[:, :, 0])
        at = self.modalities.names.index
        return {name: mixed[:, at(name)][:, None] * _rows(rows[name], mixed) for name in rows}


class PrivateStem(nn.Module):
    """groups = M: one small stem per modality, which meets only samples in which the modality exists."""

    separable, leaks = True, False

    def __init__(self, modalities: ModalitySet, widths: tuple[int, ...], published: bool = False) -> None:
        super().__init__()
        self.modalities = modalities
        self.private = nn.ModuleDict({name: nn.Sequential(*_blocks(widths, published)) for name in modalities})

    def forward(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> dict[str, Tensor]:
        """Latents [B 1 X Y Z] of the modalities that are seen; rows that are not seen are 0."""

        def through(name: str, rows: Tensor) -> Tensor:
            return encode_rows(lambda image: {"stem": self.private[name](image)}, images[name], rows)["stem"]

        return {name: through(name, rows) for name, rows in columns(seen, self.modalities)}


Stem = JointStem | PrivateStem


def build_stem(kind: str, modalities: ModalitySet, published: bool = False) -> Stem | None:
    """The stem a configuration names; None for ``none``. Raises ConfigError for another name."""
    if kind == "none":
        return None
    if kind in ("joint", "leaking"):
        return JointStem(modalities, published, leaks=kind == "leaking")
    if kind in PRIVATE_WIDTHS:
        return PrivateStem(modalities, PRIVATE_WIDTHS[kind], published)
    raise ConfigError(f"stem {kind!r} is not known; expected none, joint, leaking, {', '.join(PRIVATE_WIDTHS)}")


PRIVATE_WIDTHS: dict[str, tuple[int, ...]] = {"non_shared": (1, 1, 1), "enhanced": (1, 8, 8, 1)}


def _blocks(widths: tuple[int, ...], published: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for index, (before, after) in enumerate(pairwise(widths)):
        layers.append(Conv3d(before, after, 3, padding=1, bias=False))
        if published:
            layers += [nn.BatchNorm3d(after), nn.ReLU()]
        elif index < last:
            layers += [InstanceNorm(after), nn.ReLU()]
    return layers


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))
