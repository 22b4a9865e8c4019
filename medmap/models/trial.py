"""What the laws of `medmap.models.check` are tried with: networks with shaken weights, head-like images, masks.

Weights are shaken before each trial: a gate or a residual branch that starts at exactly 0 would hide a leak, and would
look as if no gradient reached what lies behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medmap.core.modality import ModalitySet
from medmap.models.backbone import Backbone, Decoded, Size3

TOLERANCE = 1e-4
"""Largest difference that counts as equal, in units of 1 + the largest magnitude compared.

Float32 sums taken in another order (another batch size, another convolution kernel) move logits by 1e-7 to 1e-5 of
their size. The voxels that must not matter are replaced by noise of `WILD` standard deviations, which moves the logits
of a leaking network by their own size.
"""

WILD = 100.0

Net = Any  # a Backbone that is also an nn.Module: an intersection Python's types cannot write
Images = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """Networks, images and masks to try laws with, all of them from one seed."""

    build: Callable[[], Backbone]
    odd: Size3
    seed: int

    def network(self, shift: int = 0) -> Net:
        """A fresh network in eval mode, its weights shaken; another ``shift``, other weights."""
        torch.manual_seed(self.seed + shift)
        net: Net = self.build()
        net.cpu().eval()
        with torch.no_grad():
            for p in net.parameters():
                spread = 0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
                p.add_(spread * torch.randn_like(p))
        return net

    def even(self, net: Net) -> Size3:
        """The size rounded up to whole strides, at least two of them."""
        stride = max(net.strides.values())
        x, y, z = (max(2 * stride, -(-n // stride) * stride) for n in self.odd)
        return x, y, z

    def images(self, net: Net, batch: int = 1, size: Size3 | None = None) -> Images:
        """{modality: [B 1 X Y Z]}: noise inside a box, 0 around it, as in the scan of a head."""
        size = size or self.even(net)
        generator = torch.Generator().manual_seed(self.seed)
        inside = torch.zeros(size)
        inside[tuple(slice(n // 4, -(n // 4)) for n in size)] = 1
        return {name: torch.randn((batch, 1, *size), generator=generator) * inside for name in net.modalities}

    def wild(self, images: Images, names: Iterable[str], rows: slice = slice(None)) -> Images:
        """The images with those of ``names`` replaced by strong noise that fills the whole volume."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        changed = dict(images)
        for name in names:
            changed[name] = images[name].clone()
            noise = WILD * torch.randn(images[name].shape, generator=generator)
            changed[name][rows] = noise[rows]
        return changed

    def answers(self, net: Net, images: Images) -> Iterator[tuple[ModalitySet, Decoded]]:
        """Everything seen and encoded once, then decoded for each supported subset; all draw the same dropout."""
        batch = len(next(iter(images.values())))
        torch.manual_seed(self.seed)
        encoded = net.encode(images, mask_of(net, *[net.modalities] * batch))
        for subset in net.supported_subsets():
            torch.manual_seed(self.seed)
            yield subset, net.decode(encoded, mask_of(net, *[subset] * batch))

    def logits(self, net: Net, images: Images, seen: Tensor, kept: Tensor) -> Tensor:
        """Logits of one pass without gradients; all draw the same dropout."""
        with torch.no_grad():
            torch.manual_seed(self.seed)
            encoded = net.encode(images, seen)
            torch.manual_seed(self.seed)
            logits: Tensor = net.decode(encoded, kept).logits
            return logits


def mask_of(net: Net, *subsets: ModalitySet) -> Tensor:
    """Bool[B M], one row for each subset."""
    return torch.stack([torch.from_numpy(subset.mask(net.modalities)) for subset in subsets])


def answering(net: Net) -> ModalitySet:
    """The modalities that some supported subset holds: all, but for a network made for a few of them."""
    subsets = net.supported_subsets()
    names: ModalitySet = net.modalities.pick(name for subset in subsets for name in subset)
    return names


def proper_subsets(net: Net) -> Iterator[tuple[ModalitySet, list[str]]]:
    """Each supported subset that leaves something out, with what it leaves out."""
    for subset in net.supported_subsets():
        others = [name for name in net.modalities if name not in subset]
        if others:
            yield subset, others


def moved(a: Tensor, b: Tensor) -> str:
    """How far two tensors lie apart, in words; "" within the tolerance. NaN in both at one place is no difference."""
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
    if torch.allclose(a, b, rtol=0, atol=TOLERANCE * (1 + _largest(a, b)), equal_nan=True):
        return ""
    return f"differ by up to {float((a - b).abs().max()):.2g}"


def _largest(*tensors: Tensor) -> float:
    return max(float(t.nan_to_num(0, 0, 0).abs().max()) for t in tensors)
