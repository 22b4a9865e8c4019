"""Where a patient's white matter, grey matter and fluid are, found from the images alone.

Nobody has segmented the healthy tissue of real patients, and asking a simulator for its own truth would compare two
different things. So both sides are measured by this one estimator, which looks at the brain away from the tumour and
from the hull, and takes the coil's gain out while it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.case import Case
from medmap.errors import InputError

Mask = NDArray[np.bool_]
Volume = NDArray[np.float32]
Table = NDArray[np.float64]

WHITE, GREY, FLUID = 1, 2, 3
TISSUE_CLASSES = {"WM": WHITE, "GM": GREY, "CSF": FLUID}

TUMOUR_MARGIN_MM = 6.0
HULL_MM = 5.0
"""Skull-stripping leaves dura, fat and air: this much below the brain's hull nothing is called tissue."""
GAIN_MM = 25.0
"""A gain changes over this length; tissue changes faster."""
SURE = 0.7
"""A voxel is given to white or grey matter of at least this posterior probability."""
ROUNDS, STEPS, SAMPLE = 4, 15, 30_000
BRIGHTEST = 99.5
"""Percentile on t2w, of what is darker than the median on T1, that is taken for pure fluid: ventricles may be small."""
FLUID_FROM, SOLID_TO = 0.5, 0.35
"""On the way from tissue (0) to the fluid's extreme (1): what is beyond the first is fluid, up to the second solid."""


@dataclass(frozen=True)
class Tissues:
    """What was found.

    classes: UInt8[X Y Z], 0 where nothing is said, else WHITE, GREY, FLUID
    healthy: Bool[X Y Z], the brain away from tumour and hull
    gain:    {sequence: Float32[X Y Z]}, the smooth gain that was taken out, about 1
    """

    classes: NDArray[np.uint8]
    healthy: Mask
    gain: Mapping[str, Volume]


def find_tissues(case: Case) -> Tissues:
    """White matter, grey matter and fluid of an upright case.

    Sequences: t1n (else t1c), t2w and t2f, as far as they are there, each divided by its median and by its gain.

    Fluid is more than half-way from the median to pure fluid: brighter on t2w, whose extreme is taken for pure, and
    darker on T1, where pure is the lower quartile of what is bright on t2w; on t2f it is darker than the median. Solid
    tissue is at most a third on that way on t2w and not far from the median on the others. It is parted by two
    Gaussians of one covariance, halves to begin with (white: brighter on T1, darker on t2w and t2f), as `part_in_two`
    fits them. The gain is the smoothed log-ratio of the image and the mean of the voxel's class, over grey and white
    matter. All this is repeated while the gain settles.

    Raises InputError without one of t1n, t1c and one of t2w, t2f.
    """
    names = _sequences(case)
    healthy = _healthy(case, names)
    images = {name: case.images[name] / np.float32(np.median(case.images[name][healthy])) for name in names}
    gain: dict[str, Volume] = {name: np.ones_like(image) for name, image in images.items()}
    classes = np.zeros(healthy.shape, np.uint8)
    for _ in range(ROUNDS):
        table = np.stack([(images[name] / gain[name])[healthy] for name in names], axis=1).astype(np.float64)
        fluid, solid = _wet_and_dry(table, names)
        white = np.zeros(len(table))
        white[solid], means = part_in_two(table[solid], _white_first(table[solid], names))
        found = np.where(white >= SURE, WHITE, np.where(white <= 1 - SURE, GREY, 0))
        classes[healthy] = np.where(fluid, FLUID, np.where(solid, found, 0))
        gain = _gains(case, names, images, healthy, solid, white, means)
    return Tissues(classes, healthy, gain)


def part_in_two(table: Table, first: Mask) -> tuple[Table, Table]:
    """Two Gaussians of equal weight and one covariance by expectation maximisation: the direction in which a cloud of
    voxels falls apart, while neither class can swallow the other.

    table: Float64[N D]; first: Bool[N], one class to begin with
    Returns Float64[N], the posterior probability of that class, and Float64[2 D], the means.

    >>> cloud = np.concatenate([np.random.default_rng(0).normal(m, 0.1, (500, 2)) for m in (0.0, 1.0)])
    >>> share, means = part_in_two(cloud, cloud[:, 0] < 0.3)
    >>> bool((share[:500] > 0.9).all()), (means.round(1) + 0.0).tolist()
    (True, [[0.0, 0.0], [1.0, 1.0]])
    """
    step = max(1, len(table) // SAMPLE)
    thin, share = table[::step], first[::step].astype(np.float64)
    axis, middle, means = np.zeros(table.shape[1]), 0.0, np.zeros((2, table.shape[1]))
    for _ in range(STEPS):
        means = np.stack([np.average(thin, axis=0, weights=w + 1e-9) for w in (share, 1 - share)])
        away = np.stack([thin - mean for mean in means])
        covariance = np.einsum("kn,kni,knj->ij", np.stack([share, 1 - share]), away, away, optimize=True) / len(thin)
        axis = np.linalg.solve(covariance + 1e-6 * np.eye(len(covariance)), means[0] - means[1])
        middle = float(axis @ means.mean(axis=0))
        share = _logistic(thin @ axis - middle)
    return _logistic(table @ axis - middle), means


def _logistic(x: Table) -> Table:
    share: Table = 1 / (1 + np.exp(-np.clip(x, -40, 40)))
    return share


def _sequences(case: Case) -> list[str]:
    t1 = next((name for name in ("t1n", "t1c") if name in case.images), None)
    t2 = [name for name in ("t2w", "t2f") if name in case.images]
    if t1 is None or not t2:
        raise InputError(
            f"case {case.id}: has {', '.join(case.images)}; tissues are found with one of t1n, t1c and of t2w, t2f"
        )
    return [t1, *t2]


def _healthy(case: Case, names: list[str]) -> Mask:
    spacing = np.array(case.grid.spacing_mm)
    brain = np.logical_and.reduce([case.images[name] != 0 for name in names])
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(brain), sampling=spacing)
    healthy: Mask = brain & (depth > HULL_MM)
    if case.labels is not None and case.labels.any():
        healthy &= ndimage.distance_transform_edt(case.labels == 0, sampling=spacing) > TUMOUR_MARGIN_MM
    if not healthy.any():
        raise InputError(f"case {case.id}: no brain away from the tumour; leave it out")
    return healthy


def _wet_and_dry(table: Table, names: list[str]) -> tuple[Mask, Mask]:
    """Bool[N] fluid, Bool[N] solid tissue."""
    t1, middle = table[:, 0], float(np.median(table[:, 0]))
    dark = float(np.percentile(t1, 0.5))
    fluid, solid = np.ones(len(t1), bool), np.ones(len(t1), bool)
    if "t2w" in names:
        t2w, below = table[:, names.index("t2w")], t1 < middle
        tissue, bright = np.median(t2w), np.percentile(t2w[below], BRIGHTEST)
        on_t2w = (t2w - tissue) / max(bright - tissue, 1e-6)
        dark = float(np.percentile(t1[below & (on_t2w > FLUID_FROM)], 25))
        fluid, solid = on_t2w > FLUID_FROM, (on_t2w < SOLID_TO) & (t2w > 0.5 * tissue)
    if "t2f" in names:
        t2f = table[:, names.index("t2f")]
        low, tissue, high = np.percentile(t2f, (25, 50, 75))
        fluid, solid = fluid & (t2f < tissue), solid & (np.abs(t2f - tissue) < 3 * (high - low))
    on_t1 = (middle - t1) / max(middle - dark, 1e-6)
    return fluid & (on_t1 > FLUID_FROM), solid & (np.abs(on_t1) < 0.7)


def _white_first(table: Table, names: list[str]) -> Mask:
    low, middle, high = np.percentile(table, (25, 50, 75), axis=0)
    grey = (table - middle) / np.maximum(high - low, 1e-6) @ np.array([_GREY[name] for name in names])
    first: Mask = grey < np.median(grey)
    return first


def _gains(
    case: Case, names: list[str], images: Mapping[str, Volume], healthy: Mask, solid: Mask, white: Table, means: Table
) -> dict[str, Volume]:
    weight = np.zeros(healthy.shape, np.float32)
    weight[healthy] = solid
    sigma = GAIN_MM / np.array(case.grid.spacing_mm)
    covered = ndimage.gaussian_filter(weight, sigma) + 1e-6
    gains = {}
    for d, name in enumerate(names):
        expected = np.ones(healthy.shape, np.float32)
        expected[healthy] = white * means[0, d] + (1 - white) * means[1, d]
        ratio = np.log(np.clip(images[name] / np.maximum(expected, 1e-3), 0.3, 3.0)) * weight
        gains[name] = np.exp(ndimage.gaussian_filter(ratio, sigma) / covered).astype(np.float32)
    return gains


_GREY = {"t1n": -1.0, "t1c": -1.0, "t2w": 0.7, "t2f": 0.4}
"""Which way grey matter differs from white, and how far that can be relied on, to begin with."""
