"""One simulated patient's images: tissues on a grid, the signal of each, blur, noise, the coil's gain.

First everything that is a number is drawn (`draw_patient`), then it is rendered here. Each part has its own stream of
random numbers, so that one sequence does not depend on which others were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.box import Index3
from medmap.core.case import Case, Grid
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.core.signal import (
    TISSUES,
    bias_field,
    enhanced_t1,
    inversion_recovery,
    rician,
    spin_echo,
    spoiled_gradient_echo,
)
from medmap.errors import InputError
from medmap.phantom.anatomy import Anatomy, Volume, build_anatomy, centred_grid, smooth_field
from medmap.phantom.patient import Pathology, Patient, Scan, draw_patient, stream
from medmap.phantom.tumour import CODES, grow_tumour

FIELD_OF_VIEW_MM = (160.0, 192.0, 160.0)
"""Every brain that is drawn lies inside this box."""

SPACING_MM = (1.0, 4.0)
"""Smallest and largest voxel that the anatomy makes sense on."""


def simulate(
    seed: int,
    *,
    modalities: ModalitySet = GLIOMA_MRI,
    spacing_mm: float = 2.0,
    shape: Index3 | None = None,
    noise: float = 0.03,
    id: str | None = None,
) -> Case:
    """One patient with its truth, the same for the same arguments.

    seed:       0 or more
    modalities: any of t1n t1c t2w t2f; an image does not depend on which others are made, nor on their order
    spacing_mm: edge of the cubic voxels, 1 … 4
    shape:      X, Y, Z voxels; at least 160×192×160 mm; by default the next multiples of 8 above that
    noise:      σ of the complex noise in units of each image's white-matter signal, before the coil's gain
    id:         the case's name; PHANTOM-00007-000 for seed 7 by default

    Images are whole numbers from 1 to 32767 inside the skull-stripped brain (Float32) and exactly 0 outside; a
    sequence's slices may miss a few mm of the brain. Labels are UInt8 in the codes of BraTS 2023: 1 necrotic core,
    2 oedema, 3 enhancing tumour.
    Raises InputError for an impossible request.

    >>> case = simulate(0, spacing_mm=4.0)
    >>> case.id, case.grid.shape, sorted(case.images)
    ('PHANTOM-00000-000', (40, 48, 40), ['t1c', 't1n', 't2f', 't2w'])
    """
    check_request(modalities, spacing_mm, noise)
    patient = draw_patient(seed)
    grid = centred_grid(_shape(shape, spacing_mm), spacing_mm)
    anatomy = build_anatomy(patient.head, grid, stream(seed, "anatomy"))
    labels = grow_tumour(patient.tumour, anatomy, grid, stream(seed, "growth"))
    fractions = _with_tumour(patient.pathology, anatomy, labels, grid, stream(seed, "texture"))
    images = {name: _image(patient, name, fractions, anatomy.brain, grid, noise) for name in modalities}
    return Case(id or f"PHANTOM-{seed:05d}-000", images, grid.affine, labels)


def check_request(modalities: ModalitySet, spacing_mm: float, noise: float) -> None:
    """Raise InputError, by name, for what cannot be simulated."""
    unknown = [name for name in modalities if name not in GLIOMA_MRI]
    if unknown:
        raise InputError(
            f"modality {', '.join(unknown)}: no signal equation for it; expected any of {', '.join(GLIOMA_MRI)}"
        )
    low, high = SPACING_MM
    if not low <= spacing_mm <= high:
        raise InputError(f"spacing: found {spacing_mm} mm; expected {low:g} to {high:g} mm")
    if not 0 <= noise < np.inf:
        raise InputError(
            f"noise: found {noise}; expected 0 or more, in units of the white-matter signal (0.03 is usual)"
        )


def _shape(shape: Index3 | None, spacing_mm: float) -> Index3:
    need = [int(np.ceil(extent / spacing_mm)) for extent in FIELD_OF_VIEW_MM]
    if shape is None:
        x, y, z = (-(-n // 8) * 8 for n in need)
        return x, y, z
    if any(n < least for n, least in zip(shape, need, strict=True)):
        raise InputError(
            f"shape: found {shape} voxels of {spacing_mm:g} mm, too small for a head; "
            f"expected at least {tuple(need)}, or a larger spacing"
        )
    return shape


def _with_tumour(
    pathology: Pathology, anatomy: Anatomy, labels: NDArray[np.uint8], grid: Grid, generator: np.random.Generator
) -> dict[str, Volume]:
    """Tissue fractions with the tumour mixed in; ``enhancing`` is solid tumour that takes up contrast agent."""
    rough = smooth_field(grid, 9.0, generator)
    grain = smooth_field(grid, 5.0, generator)
    edge_voxels = 1.3 / grid.spacing_mm[0]
    necrotic, oedema, enhancing = (
        ndimage.gaussian_filter((labels == CODES[name]).astype(np.float32), edge_voxels) * anatomy.brain
        for name in ("ncr", "ed", "et")
    )
    solid = np.clip(pathology.solid + 0.18 * rough, 0, 1)
    taken_up = np.clip(0.9 + 0.2 * grain, 0.25, 1.0)
    wet = np.clip(_wetness(pathology, labels, grid) + 0.12 * rough + 0.06 * grain, 0.1, 1.0)
    halo = np.clip((pathology.halo_mm * (1 + 0.5 * rough) - anatomy.ventricle_mm) / 3, 0, 0.6)
    halo = halo * anatomy.fractions["white"]
    swollen = np.maximum(oedema * wet, halo * (1 - necrotic - enhancing))
    healthy = 1 - necrotic - enhancing - swollen
    fractions = {tissue: share * healthy for tissue, share in anatomy.fractions.items()}
    return fractions | {
        "oedema": swollen,
        "solid": necrotic * solid + enhancing * (1 - taken_up),
        "enhancing": enhancing * taken_up,
        "necrosis": necrotic * (1 - solid),
    }


def _wetness(pathology: Pathology, labels: NDArray[np.uint8], grid: Grid) -> Volume:
    """Share of oedema where there is some: highest deep inside the whole tumour, half at its edge."""
    heart = ndimage.gaussian_filter((labels > 0).astype(np.float32), 5.0 / grid.spacing_mm[0])
    wetness: Volume = pathology.oedema * (0.45 + 0.6 * heart)
    return wetness


def _signals(patient: Patient, name: str) -> dict[str, float]:
    """Signal of each pure tissue in a sequence."""
    signals = {}
    for tissue in (*TISSUES, "enhancing"):
        base = "solid" if tissue == "enhancing" else tissue
        pd, t1_s, t2_s = (
            value * factor
            for value, factor in zip(astuple(TISSUES[base]), patient.pathology.relaxation[base], strict=True)
        )
        if name == "t1c" and tissue != "solid":
            t1_s = enhanced_t1(t1_s, patient.pathology.agent_mmol_l.get(base, 0.0))
        signals[tissue] = _measure(patient.scans[name], pd, t1_s, t2_s)
    return signals


def _measure(scan: Scan, pd: float, t1_s: float, t2_s: float) -> float:
    if scan.kind == "spoiled_gradient_echo":
        # T2* at echo times of a few ms is not what these images show: T2 stands in for it
        return float(spoiled_gradient_echo(pd, t1_s, t2_s, scan.tr_s, scan.te_s, scan.flip_rad))
    if scan.kind == "inversion_recovery":
        return float(inversion_recovery(pd, t1_s, t2_s, scan.tr_s, scan.te_s, scan.ti_s))
    return float(spin_echo(pd, t1_s, t2_s, scan.tr_s, scan.te_s))


def _image(
    patient: Patient, name: str, fractions: Mapping[str, Volume], brain: NDArray[np.bool_], grid: Grid, noise: float
) -> Volume:
    scan, generator = patient.scans[name], stream(patient.seed, name)
    signals = _signals(patient, name)
    signal = np.zeros(grid.shape, np.float32)
    for tissue, share in fractions.items():
        signal += np.float32(signals[tissue] / signals["white"]) * share
    signal = ndimage.gaussian_filter(signal, scan.blur_mm / grid.spacing_mm[0])
    signal = rician(signal, noise, generator) * bias_field(grid.shape, scan.bias, generator)
    image = np.clip(np.rint(np.float32(scan.gain) * signal), 1, 32767).astype(np.float32)
    image[~(brain & _covered(brain, scan.uncovered_mm, grid))] = 0
    return image


def _covered(brain: NDArray[np.bool_], uncovered_mm: float, grid: Grid) -> NDArray[np.bool_]:
    """Slices [1 1 Z] that the sequence covers."""
    slices = np.flatnonzero(brain.any(axis=(0, 1)))
    missed = round(abs(uncovered_mm) / grid.spacing_mm[2])
    z = np.arange(grid.shape[2])
    covered = z <= slices[-1] - missed if uncovered_mm > 0 else z >= slices[0] + missed
    return np.asarray(covered)[None, None, :]
