"""What the simulator needs to know of an organ. `medmap.phantom.brain` and `medmap.phantom.liver` describe one each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from medmap.core.labels import LabelScheme
from medmap.phantom.scan import Timing
from medmap.phantom.space import Lattice

Streams = Mapping[str, np.random.Generator]
"""One stream of random numbers for each part of a patient, by the part's name."""


class Body(NamedTuple):
    """What lies in each voxel, for B patients.

    fractions: Float[B T X Y Z], share of each of the organ's tissues; they sum to 1 inside the mask (less where
               there is air or bone) and to 0 outside
    labels:    UInt8[B X Y Z] in the codes of the organ's label scheme
    mask:      Bool[B X Y Z], what is left of the picture, such as the brain after skull-stripping
    """

    fractions: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Organ:
    """An organ with its disease.

    tissues:   {tissue: its row in `medmap.core.tissues.TISSUES`}, in the order of a body's fractions
    sick:      tissues whose relaxation varies together in one patient
    reference: healthy tissues; the brightest of them is one unit of signal, for noise and gain
    scheme:    what the labels mean
    sequences: {modality: draws its timing, from the field in T}; usual: those that are made when none are named
    extent_mm: every body that is drawn lies inside this box
    draw:      numbers of one patient's body, from a stream for each name in ``drawn``, and whether there was surgery
               and the disease grew as tissue lets it; a frozen dataclass
    agent:     {phase: {tissue: concentration of contrast agent in mmol/l}}, drawn for one patient
    build:     the bodies of some patients on a lattice, from a stream for each name in ``built``
    """

    tissues: Mapping[str, str]
    sick: tuple[str, ...]
    reference: tuple[str, ...]
    scheme: LabelScheme
    sequences: Mapping[str, Callable[[float, np.random.Generator], Timing]]
    usual: tuple[str, ...]
    extent_mm: tuple[float, float, float]
    drawn: tuple[str, ...]
    draw: Callable[[Streams, bool, bool], Any]
    agent: Callable[[np.random.Generator], dict[str, dict[str, float]]]
    built: tuple[str, ...]
    build: Callable[[Sequence[Any], Lattice, Sequence[Streams]], Body]
