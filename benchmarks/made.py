"""Patients, networks and the plain way of doing things, for all benchmarks."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context

import torch

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import AlignConfig, ModelConfig
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI
from medmap.data.preprocess import prepare_case
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


def network(name: str, size: str, *, plain: bool = False) -> AlignedSegmenter:
    """Four sequences, four classes, no alignment. plain: as a network lies in memory unless somebody moves it."""
    torch.manual_seed(0)
    found = build_segmenter(ModelConfig(name=name, size=size), AlignConfig(anchor="none"), GLIOMA_MRI, 4)
    return found if plain else placed(found, CPU)


@contextmanager
def apart():
    """A process of its own, for the plain way: memory that this one has kept would make it faster than it is.

    Gives a function that runs another one there; it is found by its name.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
