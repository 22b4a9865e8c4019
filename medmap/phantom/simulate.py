"""Simulated patients' images: tissues on a grid, the signal of each, and what the scanner makes of it.

First everything that is a number is drawn (`draw_patient`), then it is rendered here, for many patients at once and on
any device. Each part has its own stream of random numbers, so that one sequence does not depend on which others were
asked for, nor a patient on who else is in the batch.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from medmap.core.box import Index3
from medmap.core.case import Case
from medmap.core.children import end_with
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import ModalitySet
from medmap.core.signal import bias_coefficients, complex_noise
from medmap.errors import InputError
from medmap.phantom.patient import Patient, draw_patient, organ_named, stream
from medmap.phantom.scan import acquire, bent, signals
from medmap.phantom.space import Lattice, smooth_field

TEXTURE_MM = 3.5
"""Scale on which the signal of one tissue varies."""

SPACING_MM = (1.0, 4.0)
"""Smallest and largest voxel that the anatomy makes sense on."""


@dataclass(frozen=True)
class Settings:
    """What all patients of a set have in common.

    modalities:        any of those with a signal equation; the organ's usual ones where none are named
    organ:             brain (with a glioma) or liver (with lesions)
    spacing_mm:        edge of the cubic voxels, 1 … 4
    noise:             median over scans of σ of the complex noise, the brighter of white and grey matter (of liver and
                       spleen) is 1
    noise_correlation: ρ between the complex noise of any two modalities, 0 … 1
    bias_correlation:  between the coefficients of the coil's bias of any two modalities, 0 … 1
    randomised:        weight of the randomised mode: the share of scans with random contrast, 0 (physical) … 1
    gamma:             largest |log γ| of the exponent that bends scans with random contrast; 0: none
    operated:          share of patients after surgery, with a resection cavity, 0 … 1
    grown:             share of tumours that grow by reaction–diffusion, 0 … 1; the others are round
    shape:             X, Y, Z voxels of the box, with room for any body; by default the next multiples of 8 above that

    Raises InputError, by name, for what cannot be simulated.
    """

    modalities: ModalitySet | None = None
    organ: str = "brain"
    spacing_mm: float = 2.0
    noise: float = 0.015
    noise_correlation: float = 0.0
    bias_correlation: float = 0.0
    randomised: float = 0.0
    gamma: float = 0.3
    operated: float = 0.0
    grown: float = 1.0
    shape: Index3 | None = None

    def __post_init__(self) -> None:
        sequences = organ_named(self.organ).sequences
        unknown = [name for name in self.names if name not in sequences]
        if unknown:
            raise InputError(
                f"modality {', '.join(unknown)}: no signal equation for it; expected any of {', '.join(sequences)}"
            )
        low, high = SPACING_MM
        if not low <= self.spacing_mm <= high:
            raise InputError(f"spacing: found {self.spacing_mm} mm; expected {low:g} to {high:g} mm")
        if not 0 <= self.noise < np.inf:
            raise InputError(
                f"noise: found {self.noise}; expected 0 or more, white or grey matter being 1 (0.015 is usual)"
            )
        if not 0 <= self.gamma <= 2:
            raise InputError(f"gamma: found {self.gamma}; expected the largest |log γ|, from 0 to 2 (0.3 is usual)")
        for name, what in (
            ("noise_correlation", "a correlation"),
            ("bias_correlation", "a correlation"),
            ("randomised", "a weight"),
            ("operated", "a share of patients"),
            ("grown", "a share of tumours"),
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: found {getattr(self, name)}; expected {what} from 0 to 1")
        need = self._room()
        if self.shape is not None and any(n < least for n, least in zip(self.shape, need, strict=True)):
            raise InputError(
                f"shape: found {self.shape} voxels of {self.spacing_mm:g} mm, too small for a {self.organ}; "
                f"expected at least {need}, or a larger spacing"
            )

    def _room(self) -> Index3:
        """Voxels that a body may need."""
        x, y, z = (int(np.ceil(extent / self.spacing_mm)) for extent in organ_named(self.organ).extent_mm)
        return x, y, z

    @property
    def box(self) -> Index3:
        """Voxels of the images."""
        x, y, z = self.shape or (-(-n // 8) * 8 for n in self._room())
        return x, y, z

    @property
    def names(self) -> ModalitySet:
        """The modalities that are made."""
        return self.modalities or ModalitySet(organ_named(self.organ).usual)

    @property
    def field(self) -> Index3:
        """Voxels in the middle of the box, as few as a body may need: round them every image is empty."""
        x, y, z = (n - 2 * ((n - least) // 2) for n, least in zip(self.box, self._room(), strict=True))
        return x, y, z

    @property
    def scheme_name(self) -> str:
        """The scheme of the codes that occur: 4 is in use only after surgery."""
        scheme = organ_named(self.organ).scheme.name
        return "brats2023" if scheme == "brats2024" and not self.operated else scheme


PLAIN = Settings()


class Rendered(NamedTuple):
    """B patients on one grid: images Float[B M X Y Z], 0 outside what was scanned; labels UInt8; mask Bool."""

    images: Float[Tensor, "B M X Y Z"]
    labels: UInt8[Tensor, "B X Y Z"]
    mask: Bool[Tensor, "B X Y Z"]


def simulate(
    seed: int,
    settings: Settings = PLAIN,
    *,
    id: str | None = None,
    device: torch.device | str = "cpu",
) -> Case:
    """One patient with its truth, the same for the same arguments.

    seed:     0 or more
    settings: as for all patients of a set; an image does not depend on which others are made, nor on their order
    id:       the case's name; PHANTOM-00007-000 for seed 7 by default
    device:   where it is made; on a GPU the noise is another, everything else is the same but for rounding

    Images are whole numbers from 1 to 32767 inside the skull-stripped brain (Float32) and exactly 0 outside; a
    sequence's slices may miss a few mm of the brain. Labels are UInt8 in the codes of BraTS 2023 (1 necrotic core,
    2 oedema, 3 enhancing tumour), with 4 for a resection cavity as in 2024.
    Raises InputError for an impossible request.

    >>> case = simulate(0, Settings(spacing_mm=4.0))
    >>> case.id, case.grid.shape, sorted(case.images)
    ('PHANTOM-00000-000', (40, 48, 40), ['t1c', 't1n', 't2f', 't2w'])
    """
    rendered = render([patient_of(seed, settings)], settings, grid_of(settings, device))
    edge = [((n - inner) // 2,) * 2 for n, inner in zip(settings.box, settings.field, strict=True)]
    *images, labels = (np.pad(volume.cpu().numpy(), edge) for volume in (*rendered.images[0], rendered.labels[0]))
    affine = np.diag([settings.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -settings.spacing_mm * (np.array(settings.box) - 1) / 2
    named = dict(zip(settings.names, images, strict=True))
    return Case(id or f"PHANTOM-{seed:05d}-000", named, affine, labels)


def alone_on_its_core(parent: int) -> None:
    """How a process that simulates for another one begins: one thread, and an interrupt is its parent's business.

    parent: the other one's process id, with which it ends
    """
    end_with(parent)
    torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def patient_of(seed: int, settings: Settings) -> Patient:
    """What is drawn for a seed; the settings decide only whether there was surgery and how the tumour came about."""
    operated = bool(stream(seed, "surgery").random() < settings.operated)
    grown = bool(stream(seed, "grown").random() < settings.grown)
    return draw_patient(seed, settings.organ, operated=operated, grown=grown)


def grid_of(settings: Settings, device: torch.device | str = "cpu") -> Lattice:
    """The lattice that a set is rendered on."""
    return Lattice.centred(settings.field, settings.spacing_mm, device)


def render(patients: Sequence[Patient], settings: Settings, lattice: Lattice) -> Rendered:
    """The images and labels of some patients, on the lattice's device."""
    organ = organ_named(settings.organ)
    streams = [{part: stream(patient.seed, part) for part in organ.built} for patient in patients]
    body = organ.build([patient.body for patient in patients], lattice, streams)
    images = torch.stack(
        [
            torch.stack(_images(patient, settings, fractions, mask, lattice))
            for patient, fractions, mask in zip(patients, body.fractions, body.mask, strict=True)
        ]
    )
    return Rendered(images, body.labels, body.mask)


def _images(
    patient: Patient, settings: Settings, fractions: Float[Tensor, "T X Y Z"], mask: Tensor, lattice: Lattice
) -> list[Float[Tensor, "X Y Z"]]:
    device, organ = fractions.device, organ_named(settings.organ)
    shared = torch_generator(patient.seed, "noise", device)
    own = [torch_generator(patient.seed, f"noise {name}", device) for name in settings.names]
    noise = complex_noise(lattice.shape, settings.noise_correlation, shared, own)
    images = []
    for name, grains in zip(settings.names, noise, strict=True):
        scan = patient.scans[name]
        pure = signals(scan, patient.field_t, patient.relaxation, patient.agent_mmol_l, settings.randomised)
        unit = max(pure[tissue] for tissue in organ.reference)  # a scanner's own unit is arbitrary
        strength = torch.tensor([pure[tissue] / unit for tissue in organ.tissues], device=device)
        ideal = torch.einsum("t,txyz->xyz", strength, fractions)
        varied = smooth_field(lattice, TEXTURE_MM, [stream(patient.seed, f"texture {name}")])[0, 0]
        ideal = ideal * (1 + scan.texture * varied)
        coefficients = _coil(patient.seed, name, settings.bias_correlation).to(device)
        image = acquire(scan, ideal, lattice.spacing_mm, grains, settings.noise * scan.noise, coefficients)
        if scan.randomness < settings.randomised:
            image = bent(image, float(np.exp(settings.gamma * scan.gamma_score)))
        image = (scan.gain * image).round().clamp(1, 32767)
        images.append(image * (mask & _covered(mask, scan.uncovered_mm, lattice.spacing_mm)))
    return images


def _coil(seed: int, name: str, correlation: float) -> Float64[Tensor, " 19"]:
    """√ρ of what all sequences of a patient share and √(1 − ρ) of one's own, so that a coefficient's spread stays."""
    own = bias_coefficients(stream(seed, f"bias {name}"))
    return float(np.sqrt(correlation)) * bias_coefficients(stream(seed, "bias")) + float(np.sqrt(1 - correlation)) * own


def torch_generator(seed: int, part: str, device: torch.device) -> torch.Generator:
    """The same stream as `stream`, for numbers that are drawn on a device."""
    return torch.Generator(device).manual_seed(int(stream(seed, part).integers(2**62)))


def _covered(mask: Bool[Tensor, "X Y Z"], uncovered_mm: float, spacing_mm: float) -> Bool[Tensor, "1 1 Z"]:
    """Slices that the sequence covers."""
    z = torch.arange(mask.shape[2], device=mask.device)
    slices = mask.any(dim=0).any(dim=0).nonzero()
    missed = round(abs(uncovered_mm) / spacing_mm)
    covered = z <= slices[-1] - missed if uncovered_mm > 0 else z >= slices[0] + missed
    return covered[None, None, :]
