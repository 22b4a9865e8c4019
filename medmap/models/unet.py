"""The plain backbone: one encoder per modality, a gated mean at every level, one decoder.

    z_{j,l} = encoder_j(x_j)                                              per modality j, level l
    a_{j,l} = softmax over kept j of score_{j,l}(z_{j,l})                  per voxel; they start at 0
    f_l     = act(norm(Σ_j a_{j,l} z_{j,l}))
    logits  = decoder(f_1 … f_L)

Fusion by mean goes back to HeMIS (Havaei et al., MICCAI 2016); the gate lets a voxel trust the sequence that shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from medmap.core.modality import ModalitySet
from medmap.models.backbone import Auxiliary, Decoded, Encoded, columns
from medmap.models.blocks import (
    DecoderLevel,
    EncoderLevel,
    cropped,
    encode_separately,
    gated_mean,
    mean_of_present,
    normalise,
    size_named,
)
from medmap.models.convolution import Head


@dataclass(frozen=True)
class UNetSize:
    """channels: per level, level l has stride 2^(l−1)
    light:    full resolution, which costs as much as all other levels together, gets one convolution in place of two,
              a plain mean and a skip that is added
    deep:     levels whose own logits are supervised as well
    """

    channels: tuple[int, ...]
    light: bool = False
    deep: tuple[str, ...] = ()


class UNet(nn.Module):
    """Per-modality encoders, gated fusion per level, one decoder; see the head of this file.

    modalities: M sequences; classes: K; size: ``tiny`` (0.7 M parameters at M = 4), ``base`` (9 M), ``large`` (30 M,
    deep supervision).

    >>> import torch
    >>> net = UNet(ModalitySet(("t1c", "t2f")), classes=4, size="tiny")
    >>> seen = torch.tensor([[True, False]])
    >>> net.decode(net.encode({"t1c": torch.randn(1, 1, 17, 20, 16)}, seen), seen).logits.shape
    torch.Size([1, 4, 17, 20, 16])
    """

    separable = True

    def __init__(self, modalities: ModalitySet, classes: int, size: str = "base") -> None:
        super().__init__()
        shape = size_named(SIZES, size, "unet")
        self.modalities = modalities
        self.classes = classes
        names = [f"x{level}" for level in range(1, len(shape.channels) + 1)]
        self.strides = {name: 2**level for level, name in enumerate(names)}
        self.encoders = nn.ModuleDict({name: _Encoder(shape) for name in modalities})
        self.fusions = nn.ModuleDict(
            {
                name: _GatedMean(modalities, channels, gated=not (shape.light and name == "x1"))
                for name, channels in zip(names, shape.channels, strict=True)
            }
        )
        self.decoder = nn.ModuleDict(
            {
                name: DecoderLevel(below, c, shape.light and name == "x1")
                for name, (c, below) in zip(names, pairwise(shape.channels), strict=False)
            }
        )
        self.head = Head(shape.channels[0], classes)
        self.loss_weights = {"deep": 0.5} if shape.deep else {}
        self.deep = nn.ModuleDict({name: Head(shape.channels[names.index(name)], classes) for name in shape.deep})

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        return encode_separately(self.encoders, images, seen, self.modalities, self.strides)

    def digest(self, level: str, name: str, latent: Tensor) -> Any:
        """What fusion needs of a modality, whatever the others are."""
        return self.fusions[level].digest(name, latent)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        fused = {}
        for level, fusion in self.fusions.items():
            present = encoded.present(level, kept)
            parts = {name: encoded.digest(self, level, name) for name, _ in columns(present, self.modalities)}
            fused[level] = fusion(parts, present)
        *shallow, deepest = self.strides
        x = fused[deepest]
        auxiliary = {}
        for level in reversed(shallow):
            x = self.decoder[level](x, fused[level])
            if self.training and level in self.deep:
                auxiliary[f"deep/{level}"] = Auxiliary(self.deep[level](x))
        return Decoded(cropped(self.head(x), encoded.size), auxiliary, {})


class _Encoder(nn.Module):
    """One modality's encoder: image [B 1 X Y Z] → {level: [B C x y z]}."""

    def __init__(self, shape: UNetSize) -> None:
        super().__init__()
        finest, *coarser = shape.channels
        self.levels = nn.ModuleList([EncoderLevel(1, finest, stride=1, light=shape.light)])
        self.levels.extend(
            EncoderLevel(before, channels, stride=2) for before, channels in zip(shape.channels, coarser, strict=False)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = {}
        for index, level in enumerate(self.levels, start=1):
            x = level(x)
            latents[f"x{index}"] = x
        return latents


class _GatedMean(nn.Module):
    """Σ_j a_j z_j, then norm and activation.

    a = softmax over the present modalities of a 1×1×1 convolution of z_j; without gates a = 1/|present|
    """

    def __init__(self, modalities: ModalitySet, channels: int, gated: bool = True) -> None:
        super().__init__()
        self.modalities = modalities
        # With one modality there is nothing to weigh: a gate would be a parameter without a gradient.
        gates = modalities if gated and len(modalities) > 1 else ()
        self.scores = nn.ModuleDict({name: nn.Conv3d(channels, 1, 1, bias=False) for name in gates})
        for score in self.scores.values():
            nn.init.zeros_(score.weight)
        self.after = normalise(channels)

    def digest(self, name: str, latent: Tensor) -> Any:
        return (latent, self.scores[name](latent)) if self.scores else latent

    def forward(self, parts: Mapping[str, Any], present: Bool[Tensor, "B M"]) -> Float[Tensor, "B C x y z"]:
        mean = gated_mean if self.scores else mean_of_present
        fused: Tensor = self.after(mean(parts, present, self.modalities))
        return fused


SIZES: dict[str, UNetSize] = {
    "tiny": UNetSize((8, 16, 32, 48), light=True),
    "small": UNetSize((16, 32, 64, 96), light=True),
    "base": UNetSize((16, 32, 64, 128, 128)),
    "large": UNetSize((32, 64, 128, 224, 256), deep=("x2", "x3")),
}
