"""Patients, networks and the plain way of doing things, for all benchmarks."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context

import torch
from torch.nn import functional as F

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import AlignConfig, ModelConfig
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI
from medmap.data.preprocess import prepare_case
from medmap.models import blocks, unet
from medmap.models.blocks import placed
from medmap.phantom import Settings, simulate
from medmap.predict import resolve_precision

CPU = torch.device("cpu")
SCHEME = SCHEMES["brats2023"]
PRECISION = resolve_precision("auto", CPU)
BRATS = (240, 240, 155)


@cache
def patient(spacing_mm: float = 1.0) -> Prepared:
    """One simulated patient; at 1 mm on the grid of BraTS."""
    settings = Settings(spacing_mm=spacing_mm, shape=BRATS if spacing_mm == 1.0 else None)
    return prepare_case(simulate(5, settings), SCHEME)


def network(name: str, size: str, *, plain: bool = False, device: torch.device = CPU) -> AlignedSegmenter:
    """Four sequences, four classes, no alignment.

    plain: as a network lies in memory unless somebody moves it; and every sequence is encoded, dropped or not, as in
           published training loops, which mask afterwards
    """
    torch.manual_seed(0)
    found = build_segmenter(ModelConfig(name=name, size=size), AlignConfig(anchor="none"), GLIOMA_MRI, 4)
    if plain:
        found.backbone.uses_dropped = True
        return found.to(device)
    return placed(found, device)


def written_plainly() -> None:
    """From now on this process's U-Nets upsample and join features, and gate by a softmax, as one writes it down.

    The numbers are the same; `medmap.models.blocks` says how medmap gets to them.
    """
    blocks.conv_of_joined = _conv_of_joined
    unet.gated_mean, unet.mean_of_present = _gated_mean, _mean_of_present


def _conv_of_joined(below, skip, conv):
    return conv(torch.cat([F.interpolate(below, scale_factor=2.0, mode="nearest"), skip], dim=1))


def _gated_mean(parts, present, modalities):
    there = present[:, [modalities.names.index(name) for name in parts], None, None, None, None]
    latents, scores = (torch.stack(each, dim=1) for each in zip(*parts.values(), strict=True))
    return (scores.masked_fill(~there, -torch.inf).softmax(dim=1) * latents).sum(dim=1)


def _mean_of_present(latents, present, modalities):
    there = present[:, [modalities.names.index(name) for name in latents], None, None, None, None]
    return (torch.stack(list(latents.values()), dim=1) * there).sum(dim=1) / there.sum(dim=1)


@contextmanager
def apart():
    """A process of its own, for the plain way: memory that this one has kept would make it faster than it is.

    Gives a function that runs another one there; it is found by its name.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
