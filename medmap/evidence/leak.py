"""What a network scores whose T saw the images that are said to be missing: the published first form's evaluation.

Never an evaluation of anything: it is shown beside the true one by the study of encoders.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from medmap.align import AlignedSegmenter
from medmap.core.box import Box
from medmap.core.case import Prepared
from medmap.inference import SubsetAnswer, network_device


def leaking_answers(network: AlignedSegmenter, prepared: Prepared) -> Iterator[SubsetAnswer]:
    """Every subset, decoded from what T makes of *all* images of a patient who has all."""
    names, device = list(network.modalities), network_device(network)
    box = Box.union(prepared.images[name].box for name in names).snapped(network.stride)
    images = {
        name: torch.from_numpy(prepared.images[name].window(box).astype(np.float32))[None, None] for name in names
    }
    everything = torch.ones(1, len(names), dtype=torch.bool, device=device)
    with torch.inference_mode():
        encoded = network.encode({name: image.to(device) for name, image in images.items()}, everything)
        for subset in network.modalities.subsets():
            kept = torch.tensor([[name in subset for name in names]], device=device)
            probabilities = network.decode(encoded, kept).logits.softmax(dim=1, dtype=torch.float32)
            yield SubsetAnswer(subset, box, probabilities[0].cpu().numpy())
