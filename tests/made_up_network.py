"""Networks and patients for tests: small, quick, and with parts that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import AlignConfig, ModelConfig
from medmap.core.box import Box, Boxed, Index3
from medmap.core.case import Grid, Prepared
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.models.backbone import Decoded, Encoded, columns


class BrightVoxels(nn.Module):
    """A network without a secret: class ``label`` where the kept sequences' z-scores sum to more than 1."""

    separable = True

    def __init__(self, modalities: ModalitySet = GLIOMA_MRI, label: int = 1) -> None:
        super().__init__()
        self.modalities = modalities
        self.classes = 4
        self.label = label
        self.strides = {"x1": 1}
        self.steepness = nn.Parameter(torch.tensor(100.0))

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Tensor) -> Encoded:
        names = [name for name, _ in columns(seen, self.modalities)]
        x, y, z = images[names[0]].shape[2:]
        return Encoded({"x1": {name: images[name] for name in names}}, (x, y, z))

    def decode(self, encoded: Encoded, kept: Tensor) -> Decoded:
        latents = encoded.levels["x1"]
        total = torch.cat([latents[name] for name, _ in columns(kept, self.modalities)], dim=1).sum(dim=1)
        logits = torch.full((len(total), self.classes, *total.shape[1:]), -1000.0)
        logits[:, 0] = 0
        logits[:, self.label] = self.steepness * (total - 1)
        return Decoded(logits, {}, {})


def bright_voxels(modalities: ModalitySet = GLIOMA_MRI, label: int = 1) -> AlignedSegmenter:
    """`BrightVoxels`, ready to answer."""
    return AlignedSegmenter(BrightVoxels(modalities, label), None, {}).eval()


def tiny_network(
    model: ModelConfig | None = None,
    align: AlignConfig | None = None,
    modalities: ModalitySet = GLIOMA_MRI,
    seed: int = 0,
) -> AlignedSegmenter:
    """A network in which no weight has its neutral starting value, so that every part of it shows in the answer."""
    torch.manual_seed(seed)
    network = build_segmenter(model or ModelConfig(size="tiny"), align or AlignConfig(anchor="none"), modalities, 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def made_up_prepared(
    boxes: Mapping[str, Box], shape: Index3 = (40, 40, 40), labels: Boxed | None = None, seed: int = 0
) -> Prepared:
    """Noise on the given boxes: each sequence has its own brain."""
    generator = np.random.default_rng(seed)
    images = {n: Boxed(generator.normal(size=box.shape).astype(np.float16), box) for n, box in boxes.items()}
    grid = Grid(shape, np.eye(4))
    return Prepared("made-up", grid, grid, images, labels)


def mirrored(prepared: Prepared, axes: Sequence[int]) -> Prepared:
    """The same patient seen in a mirror: every sequence flipped about the middle of the grid."""
    shape = prepared.grid.shape
    images = {}
    for name, image in prepared.images.items():
        start, stop = list(image.box.start), list(image.box.stop)
        for axis in axes:
            start[axis], stop[axis] = shape[axis] - image.box.stop[axis], shape[axis] - image.box.start[axis]
        values = np.ascontiguousarray(np.flip(image.values, axes)) if axes else image.values
        images[name] = Boxed(values, Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    return Prepared(prepared.id, prepared.grid, prepared.native, images, prepared.labels)
