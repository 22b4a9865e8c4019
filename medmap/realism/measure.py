"""Numbers of one patient's images: contrasts between tissues, histograms, noise, sharpness, the tumour's edge.

Every number is a ratio or a length, so that a scanner's units play no part; undefined numbers are NaN. Nothing here
knows whether a patient is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.case import Case
from medmap.core.labels import SCHEMES
from medmap.core.volume import zscore
from medmap.data.cases import ordered
from medmap.realism.tissues import FLUID, GREY, HULL_MM, TISSUE_CLASSES, WHITE, Tissues, find_tissues

Mask = NDArray[np.bool_]
Numbers = dict[str, float]

LEAST_ML = 0.2
"""A class of less than this has no median."""
QUANTILES = (np.arange(200) + 0.5) / 200
PATCH_MM, PATCHES = 16.0, 60
_GLIOMA = SCHEMES["brats2023"].classes
TUMOUR_CLASSES = {"NCR": _GLIOMA.index("ncr"), "ED": _GLIOMA.index("ed"), "ET": _GLIOMA.index("et")}
CONTRASTS = ("ED", "ET", "NCR", "GM", "CSF")


@dataclass(frozen=True)
class Measured:
    """What was measured of one patient.

    id:         the case
    spacing_mm: edges of its voxels
    contrast:   {"t2f ED/WM": …}, median of a class over the median of white matter, in the file's own intensities
    texture:    {"t2f noise": …}, see `texture`
    histogram:  {sequence: Float64[200]}, quantiles of what is z-scored in the brain
    within:     {(sequence, class): Float64[200]}, quantiles of the class over the median of white matter
    patches:    Float64[P F], one row a patch, and the names of its columns
    """

    id: str
    spacing_mm: tuple[float, float, float]
    contrast: Mapping[str, float]
    texture: Mapping[str, float]
    histogram: Mapping[str, NDArray[np.float64]]
    within: Mapping[tuple[str, str], NDArray[np.float64]]
    patches: NDArray[np.float64]
    patch_names: tuple[str, ...]

    @property
    def features(self) -> Numbers:
        """Contrast and texture together."""
        return {**self.contrast, **self.texture}


def measure(case: Case) -> Measured:
    """All numbers of an upright case whose labels are class indices (`read_cases` gives such).

    Raises InputError as `find_tissues` does.
    """
    tissues = find_tissues(case)
    masks = class_masks(case, tissues)
    contrast: Numbers = {}
    texture_of: Numbers = {}
    histogram, within = {}, {}
    scaled: dict[str, NDArray[np.float32]] = {}
    for name in ordered(case.images):
        image, brain = case.images[name], case.images[name] != 0
        white = _median(image, masks["WM"])
        contrast |= {f"{name} {c}/WM": _median(image, masks[c]) / white for c in CONTRASTS}
        scaled[name] = zscore(image, brain)
        histogram[name] = np.quantile(scaled[name][brain], QUANTILES)
        within |= {(name, c): np.quantile(image[m] / white, QUANTILES) for c, m in masks.items() if m.any()}
        texture_of |= {f"{name} {key}": value for key, value in texture(case, name, masks, white).items()}
    texture_of |= _correlations(scaled, tissues)
    rows, columns = patches(scaled, tissues.healthy, case.grid.spacing_mm)
    return Measured(case.id, case.grid.spacing_mm, contrast, texture_of, histogram, within, rows, columns)


def class_masks(case: Case, tissues: Tissues) -> dict[str, Mask]:
    """Where each class is measured; all False where there is too little of it.

    White matter and fluid: voxels whose six neighbours are of the same class, if there are enough of them, for less
    of them is partial volume. Grey matter is thinner than that, so all of it counts. Tumour: all that is labelled so.
    """
    voxel_ml = float(np.prod(case.grid.spacing_mm)) / 1000
    masks: dict[str, Mask] = {}
    for name, number in TISSUE_CLASSES.items():
        mask = tissues.classes == number
        inner = ndimage.binary_erosion(mask) if number in (WHITE, FLUID) else mask
        masks[name] = inner if inner.sum() * voxel_ml >= LEAST_ML else mask
    for name, number in TUMOUR_CLASSES.items():
        masks[name] = np.zeros(tissues.healthy.shape, bool) if case.labels is None else case.labels == number
    return {name: mask & (mask.sum() * voxel_ml >= LEAST_ML) for name, mask in masks.items()}


def texture(case: Case, name: str, masks: Mapping[str, Mask], white: float) -> Numbers:
    """Spatial numbers of one sequence.

    spread C:  interquartile range in class C over the median of white matter
    noise:     1.4826 · MAD of (x − mean of the six neighbours) · √(6/7) in white matter, over its median
    grain:     correlation of neighbouring voxels of white matter, after what is smoother than 3 voxels is taken out;
               about 0 for noise that is independent per voxel, more where it was interpolated
    gain:      standard deviation of the log of white matter, smoothed over 12 mm
    gradient:  mean length of the gradient of the z-scored image inside the brain, per mm
    through:   mean |∂z| over the mean of |∂x| and |∂y|; thick slices are smooth along z
    slope:     d log(power) / d log(frequency) between 0.03 and 0.2 cycles per mm
    edge mm:   |inside − outside| / steepest slope of the median profile across the whole tumour's border
    rim:       95th percentile within 4 mm of the brain's hull over the median of white matter
    """
    image, spacing = case.images[name], case.grid.spacing_mm
    brain = image != 0
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(brain), sampling=spacing)
    inner = brain & (depth > HULL_MM)
    found = {f"spread {c}": _spread(image[m]) / white for c, m in masks.items() if c != "CSF"}
    found |= {"noise": _noise(image, masks["WM"]) / white, "grain": _grain(image, masks["WM"])}
    found |= {"gain": _gain(image, masks["WM"], spacing), "rim": _quantile(image[brain & (depth <= 4)], 0.95) / white}
    slopes = np.abs(np.stack(np.gradient(zscore(image, brain), *spacing)))[:, inner]
    found["gradient"] = float(np.linalg.norm(slopes, axis=0).mean()) if inner.any() else np.nan
    found["through"] = float(2 * slopes[2].mean() / (slopes[0].mean() + slopes[1].mean())) if inner.any() else np.nan
    found["slope"] = spectral_slope(zscore(image, brain), spacing)
    found["edge mm"] = np.nan if case.labels is None else edge_width_mm(image, case.labels > 0, inner, spacing)
    return found


def edge_width_mm(image: NDArray[Any], mask: Mask, within: Mask, spacing_mm: tuple[float, float, float]) -> float:
    """How many mm an image takes to change across the border of a mask.

    The median of the image by signed distance from the border, in steps of a voxel: w = |inside − outside| / steepest
    step per mm, inside = mean over −8 … −3 mm, outside = mean over 5 … 10 mm. A step function gives one voxel or
    little more. NaN where the two differ by less than 10 % of what is outside, or either is not there.
    """
    if not mask.any():
        return np.nan
    outer, inner = (ndimage.distance_transform_edt(m, sampling=spacing_mm) for m in (~mask, mask))
    step = float(max(spacing_mm))
    signed = np.where(mask, 0.5 * step - inner, outer - 0.5 * step)
    centres = np.arange(-round(8 / step), round(10 / step) + 1) * step
    near = within & (np.abs(signed) < 12)
    bins = np.rint((signed[near] - centres[0]) / step).astype(int)
    values = image[near]
    profile = np.array(
        [np.median(values[bins == b]) if (bins == b).sum() >= 30 else np.nan for b in range(len(centres))]
    )
    inside, outside = (_nanmean(profile[(centres >= a) & (centres <= b)]) for a, b in ((-8, -3), (5, 10)))
    steepest = np.abs(np.diff(profile)) / step
    if not np.isfinite([inside, outside]).all() or abs(inside - outside) < 0.1 * abs(outside):
        return np.nan
    return float(abs(inside - outside) / np.nanmax(steepest))


def spectral_slope(volume: NDArray[Any], spacing_mm: tuple[float, float, float]) -> float:
    """Slope of log power against log frequency, 0.03 to 0.2 cycles per mm, of a volume that is 0 outside the brain.

    White noise has slope 0; the smoother, the more negative.
    """
    power = np.abs(np.fft.rfftn(volume)) ** 2
    lines = [np.fft.fftfreq(n, d) for n, d in zip(volume.shape, spacing_mm, strict=True)]
    lines[2] = np.fft.rfftfreq(volume.shape[2], spacing_mm[2])
    frequency = np.sqrt(sum(line**2 for line in np.meshgrid(*lines, indexing="ij", sparse=True)))
    edges = np.geomspace(0.03, 0.2, 13)
    ring = np.digitize(frequency.ravel(), edges)
    count, total = (np.bincount(ring, w, minlength=14)[1:13] for w in (None, power.ravel()))
    there = (count > 0) & (total > 0)
    if there.sum() < 3:
        return np.nan
    centre = np.sqrt(edges[1:] * edges[:-1])[there]
    return float(np.polyfit(np.log(centre), np.log(total[there] / count[there]), 1)[0])


def patches(
    scaled: Mapping[str, NDArray[np.float32]], healthy: Mask, spacing_mm: tuple[float, float, float]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Float64[P F] numbers of cubes of 16 mm that lie in healthy brain, and their names.

    Per sequence: mean, standard deviation, mean |gradient| along each axis, standard deviation of what is finer than a
    voxel's neighbourhood; per pair of sequences their correlation. Up to 60 cubes, evenly spread.
    """
    size = tuple(max(2, round(PATCH_MM / mm)) for mm in spacing_mm)
    full = ndimage.uniform_filter(healthy.astype(np.float32), size)
    at = np.argwhere(full > 0.9)
    at = at[np.linspace(0, len(at) - 1, min(PATCHES, len(at))).astype(int)] if len(at) else at

    def mean(volume: NDArray[Any]) -> NDArray[np.float64]:
        smooth: NDArray[np.float64] = ndimage.uniform_filter(volume, size)[tuple(at.T)].astype(np.float64)
        return smooth

    columns: dict[str, NDArray[np.float64]] = {}
    for name, volume in scaled.items():
        fine = volume - ndimage.uniform_filter(volume, 3)
        columns |= {f"{name} mean": mean(volume), f"{name} fine": np.sqrt(mean(fine**2))}
        columns[f"{name} std"] = np.sqrt(np.maximum(mean(volume**2) - columns[f"{name} mean"] ** 2, 1e-8))
        for axis, letter in enumerate("xyz"):
            columns[f"{name} d{letter}"] = mean(np.abs(np.diff(volume, axis=axis, append=0)))
    for a, b in combinations(scaled, 2):
        shared = mean(scaled[a] * scaled[b]) - columns[f"{a} mean"] * columns[f"{b} mean"]
        columns[f"{a}~{b}"] = shared / (columns[f"{a} std"] * columns[f"{b} std"])
    return np.stack(list(columns.values()), axis=1), tuple(columns)


def _correlations(scaled: Mapping[str, NDArray[np.float32]], tissues: Tissues) -> Numbers:
    """Correlation of each pair of sequences over grey and white matter."""
    solid = np.isin(tissues.classes, (WHITE, GREY))
    return {f"{a}~{b}": _correlation(scaled[a][solid], scaled[b][solid]) for a, b in combinations(scaled, 2)}


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.size > 2 and a.std() > 0 and b.std() > 0 else np.nan


def _median(image: NDArray[Any], mask: Mask) -> float:
    return _quantile(image[mask], 0.5)


def _quantile(values: NDArray[Any], q: float) -> float:
    return float(np.quantile(values, q)) if values.size else np.nan


def _nanmean(values: NDArray[np.float64]) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else np.nan


def _spread(values: NDArray[Any]) -> float:
    return _quantile(values, 0.75) - _quantile(values, 0.25)


_SIX = ndimage.generate_binary_structure(3, 1).astype(np.float32)
_SIX[1, 1, 1] = 0
_SIX /= 6


def _noise(image: NDArray[Any], white: Mask) -> float:
    inner = ndimage.binary_erosion(white)
    rest = (image - ndimage.convolve(image, _SIX))[inner]
    if not rest.size:
        return np.nan
    return float(1.4826 * np.median(np.abs(rest - np.median(rest))) * np.sqrt(6 / 7))


def _grain(image: NDArray[Any], white: Mask) -> float:
    share = ndimage.gaussian_filter(white.astype(np.float32), 3) + 1e-6
    rough = image - ndimage.gaussian_filter(np.where(white, image, 0), 3) / share
    pairs = []
    for axis in range(3):
        one, two = (tuple(s if a == axis else slice(None) for a in range(3)) for s in (slice(None, -1), slice(1, None)))
        both = white[one] & white[two]
        pairs.append(_correlation(rough[one][both], rough[two][both]))
    return _nanmean(np.array(pairs))


def _gain(image: NDArray[Any], white: Mask, spacing_mm: tuple[float, float, float]) -> float:
    if not white.any():
        return np.nan
    sigma = 12.0 / np.array(spacing_mm)
    logs = np.where(white, np.log(np.maximum(image, 1e-6)), 0.0)
    smooth = ndimage.gaussian_filter(logs, sigma) / (ndimage.gaussian_filter(white.astype(float), sigma) + 1e-6)
    return float(smooth[white].std())
