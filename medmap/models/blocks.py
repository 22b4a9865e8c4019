"""Convolution blocks that several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normalise(channels: int) -> nn.Sequential:
    """Instance normalisation with learned scale and shift, then LeakyReLU(0.01)."""
    return nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(0.01, inplace=True))


class EncoderLevel(nn.Module):
    """One resolution of an encoder, pre-activated, so that what it returns is not yet normalised.

        h = conv(act(norm(x)));  out = h + conv(act(norm(h)))      light: out = h

    Latents leave *before* a normalisation: after it every channel has mean 0 and variance 1 whatever the modality, and
    an anchor would have nothing left to align.
    """

    def __init__(self, before: int, channels: int, stride: int, light: bool = False) -> None:
        super().__init__()
        self.enter = nn.Identity() if before == 1 else normalise(before)
        self.down = nn.Conv3d(before, channels, 3, stride=stride, padding=1)
        self.inner = None if light else nn.Sequential(normalise(channels), nn.Conv3d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(self.enter(x))
        return h if self.inner is None else h + self.inner(h)


class DecoderLevel(nn.Module):
    """Upsample ×2 (nearest, after a 1×1×1 convolution), join the skip, convolve.

    light: the skip is added and one convolution follows, in place of concatenation and two
    """

    def __init__(self, below: int, channels: int, light: bool = False) -> None:
        super().__init__()
        self.light = light
        self.reduce = nn.Conv3d(below, channels, 1)
        merge = [nn.Conv3d(channels if light else 2 * channels, channels, 3, padding=1), normalise(channels)]
        if not light:
            merge += [nn.Conv3d(channels, channels, 3, padding=1), normalise(channels)]
        self.merge = nn.Sequential(*merge)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = F.interpolate(self.reduce(x), scale_factor=2.0, mode="nearest")
        out: Tensor = self.merge(up + skip if self.light else torch.cat([up, skip], dim=1))
        return out


def pad_to_stride(image: Tensor, stride: int) -> Tensor:
    """Zeros at the end of each axis up to a multiple of ``stride``, and to at least two strides.

    Two, because a normalisation over a single element has no variance.
    """
    missing = [max(2 * stride, -(-n // stride) * stride) - n for n in image.shape[2:]]
    if not any(missing):
        return image
    return F.pad(image, [p for extra in reversed(missing) for p in (0, extra)])


def cropped(volume: Tensor, size: Sequence[int]) -> Tensor:
    """The first ``size`` voxels of each spatial axis: the inverse of `pad_to_stride`."""
    x, y, z = size
    return volume[..., :x, :y, :z]
