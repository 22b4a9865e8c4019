"""Patients, networks and the plain way of doing things, for all benchmarks."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import AlignConfig, ModelConfig
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES
from medmap.core.memory import M_MMAP_MAX, M_TOP_PAD, M_TRIM_THRESHOLD, keep_freed_memory
from medmap.core.modality import GLIOMA_MRI
from medmap.data.preprocess import prepare_case
from medmap.models.blocks import placed
from medmap.phantom import Settings, simulate
from medmap.predict import resolve_precision

CPU = torch.device("cpu")
SCHEME = SCHEMES["brats2023"]
PRECISION = resolve_precision("auto", CPU)
BRATS = (240, 240, 155)

GLIBC = ((M_TRIM_THRESHOLD, 128 * 1024), (M_TOP_PAD, 0), (M_MMAP_MAX, 65536))
"""What the C library does unless asked."""


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


def memory(plain: bool) -> None:
    """Freed memory is given back, or kept."""
    if plain:
        for option, value in GLIBC:
            ctypes.CDLL("libc.so.6").mallopt(option, value)
    else:
        keep_freed_memory()
