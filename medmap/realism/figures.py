"""Pictures of the comparison: patients side by side, contrast ratios, shape statistics, tissue maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.data.cases import ordered
from medmap.figures.style import FAINT, HUES, INK, REGION_HUES, STYLE, label
from medmap.realism.compare import Realism
from medmap.realism.measure import CONTRASTS
from medmap.realism.shapes import GLIOMA, PERCENTILES, ShapeRow, compare_shapes
from medmap.realism.tissues import Tissues

WINDOW = (1.0, 99.5)
"""Percentiles in the brain that are black and white, the same for every image."""
TALL_MM, WIDE_MM = 186.0, 150.0
REAL, SIMULATED = "#666666", HUES[1]
REGIONS = ("WT", "TC", "ET")


@rc_context(STYLE)
def side_by_side(real: Sequence[Case], simulated: Sequence[Case], source: str = "") -> Figure:
    """Real patients on the left, simulated ones on the right, a row each: all sequences, and the truth.

    real, simulated: upright cases with labels in class indices
    source:          attribution of the real images, printed below

    The slice is the axial one with most tumour; each image from the 1st to the 99.5th percentile of its brain; every
    panel shows the same 150 × 186 mm. Labels are painted over the last sequence; elsewhere the whole tumour's outline.
    """
    sequences = ordered(name for case in (*real, *simulated) for name in case.images)
    panels, rows = len(sequences) + 1, max(len(real), len(simulated))
    fig = Figure(figsize=(2.5 * panels, 1.52 * rows + 1.0), dpi=110)
    fig.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0))
    for side, title, cases in zip(
        fig.subfigures(1, 2, wspace=0.03), ("real", "simulated"), (real, simulated), strict=True
    ):
        side.suptitle(title)
        grid = side.subplots(rows, panels, squeeze=False)
        for ax, name in zip(grid[0], [*map(label, sequences), "truth"], strict=True):
            ax.set_title(name, loc="center", size=9, weight="normal")
        for ax in grid.ravel():
            ax.set_axis_off()
        for row, case in zip(grid, cases, strict=False):
            _patient(row, case, sequences)
    keys = [Patch(facecolor=hue, label=r) for r, hue in zip(REGIONS, REGION_HUES, strict=False)]
    fig.legend(handles=keys, loc="outside lower center", ncols=3, title=source or None, title_fontsize=8, fontsize=9)
    return fig


@rc_context(STYLE)
def contrast_bands(realism: Realism) -> Figure:
    """Contrast ratios to white matter: what real patients have, and every simulated one."""
    sequences = ordered(name for m in realism.real for name in m.histogram)
    fig = Figure(figsize=(2.7 * len(CONTRASTS), 4.2), layout="constrained")
    bands = {band.name: band for band in realism.contrast}
    for ax, c in zip(fig.subplots(1, len(CONTRASTS)), CONTRASTS, strict=True):
        for x, name in enumerate(sequences):
            key = f"{name} {c}/WM"
            low, middle, high = bands[key].real
            ax.bar(x, high - low, 0.8, bottom=low, color=FAINT)
            ax.plot([x - 0.4, x + 0.4], [middle] * 2, color=REAL)
            for group, at, hue in ((realism.real, x - 0.18, REAL), (realism.simulated, x + 0.18, SIMULATED)):
                values = [m.contrast.get(key, np.nan) for m in group]
                ax.scatter(at + _jitter(len(values)), values, s=13, color=hue, alpha=0.75, linewidths=0)
            hue = INK if bands[key].inside else "#b00020"
            ax.plot(x + 0.18, bands[key].simulated[1], marker="_", markersize=15, markeredgewidth=2.4, color=hue)
        ax.axhline(1, color=INK, linewidth=0.6)
        ax.set_yscale("log")
        ticks = [v for v in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6) if ax.get_ylim()[0] < v < ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{v:g}" for v in ticks])
        ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
        ax.set_xticks(range(len(sequences)), [label(name) for name in sequences], size=10)
        ax.set_title(f"{c} / WM")
    keys = [
        Patch(facecolor=FAINT, label="real, 5–95 %"),
        Line2D([], [], color=REAL, marker="o", linestyle="-", markersize=4, label="real, median and patients"),
        Line2D([], [], color=SIMULATED, marker="o", linestyle="", markersize=4, label="simulated"),
        Line2D([], [], color=INK, marker="_", linestyle="", markersize=14, label="simulated, median (red: outside)"),
    ]
    fig.legend(handles=keys, loc="outside lower center", ncols=4, fontsize=10)
    return fig


@rc_context(STYLE)
def texture_bands(realism: Realism) -> Figure:
    """Every spatial number, centred on the real median and scaled to the real 5–95 % band."""
    bands = sorted(realism.texture, key=lambda b: b.name.split()[::-1])
    fig = Figure(figsize=(9, 0.2 * len(bands) + 1.2), layout="constrained")
    ax = fig.subplots()
    for y, band in enumerate(bands):
        width, middle = (band.real[2] - band.real[0]) / 2 or np.nan, band.real[1]
        ends = [(band.real[0] - middle) / width, (band.real[2] - middle) / width]
        low, middle, high = np.clip((np.array(band.simulated) - middle) / width, -5, 5)
        ax.plot(ends, [y, y], color=FAINT, linewidth=7)
        ax.plot([low, high], [y, y], color=SIMULATED, linewidth=1.4)
        ax.plot(middle, y, "o", color=SIMULATED if band.inside else "#b00020", markersize=4.5)
    ax.set_yticks(range(len(bands)), [b.name for b in bands], size=8)
    ax.set_ylim(-1, len(bands))
    ax.axvline(0, color=INK, linewidth=0.6)
    ax.set_xlabel("half widths of the real band from the real median (cut at ±5); grey: real 5–95 %")
    return fig


@rc_context(STYLE)
def shape_percentiles(found: Mapping[str, Any], reference: Mapping[str, Any]) -> Figure:
    """Percentiles of tumours' shapes: reference with ± 25 %, and what was found."""
    rows = compare_shapes(found, reference)
    fig = Figure(figsize=(13, 7.4), layout="constrained")
    volume, ratio, sphere, parts, largest, share = fig.subplots(2, 3).ravel()
    _percentile_axes(volume, [r for r in rows if r.name.startswith("volume_ml")], "volume, ml")
    volume.set_yscale("symlog", linthresh=1)
    volume.set_ylim(bottom=-0.2)
    volume.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    volume.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    _percentile_axes(ratio, [r for r in rows if r.name.endswith("_over_WT_volume") or "_over_TC_" in r.name], "ratio")
    _percentile_axes(sphere, [r for r in rows if r.name.startswith("sphericity")], "sphericity")
    _percentile_axes(parts, [r for r in rows if r.name.startswith("components")], "parts above 0.05 ml")
    _percentile_axes(largest, [r for r in rows if r.name.startswith("largest")], "share of the largest part")
    shares = [r for r in rows if len(r.found) == 1]
    for x, row in enumerate(shares):
        share.bar(x - 0.2, 100 * row.reference[0], 0.38, color=REAL)
        share.bar(x + 0.2, 100 * row.found[0], 0.38, color=SIMULATED)
    share.set_xticks(range(len(shares)), [_short(r.name) for r in shares], size=10)
    share.set_title("patients, %")
    n = f"reference (n = {reference.get('n', '?')}), 5 25 50 75 95 %, ± 25 %"
    keys = [Patch(facecolor=REAL, label=n), Patch(facecolor=SIMULATED, label=f"simulated (n = {found['n']})")]
    fig.legend(handles=keys, loc="outside lower center", ncols=2)
    return fig


@rc_context(STYLE)
def tissue_maps(cases: Sequence[tuple[Case, Tissues]]) -> Figure:
    """What the estimator took for white matter, grey matter and fluid: an axial and a coronal slice of each case."""
    fig = Figure(figsize=(9, 2.3 * len(cases)), layout="constrained")
    for row, (case, found) in zip(fig.subplots(len(cases), 4, squeeze=False), cases, strict=True):
        z = int((found.classes > 0).sum(axis=(0, 1)).argmax())
        y = case.grid.shape[1] // 2
        image = case.images.get("t1n", next(iter(case.images.values())))
        for ax, at in zip(row, ((..., z), (..., z), (slice(None), y), (slice(None), y)), strict=True):
            _grey(ax, _windowed(image)[at])
        for ax, at in ((row[1], (..., z)), (row[3], (slice(None), y))):
            ax.images[0].remove()
            ax.imshow(found.classes[at][::-1].T, origin="lower", cmap="viridis", vmin=0, vmax=3)
        row[0].text(0, 0, case.id[-9:], color="white", size=8)
    return fig


def middle_slice(case: Case) -> int:
    """The axial slice with most tumour; the middle of the brain where there is none."""
    if case.labels is not None and case.labels.any():
        return int((case.labels > 0).sum(axis=(0, 1)).argmax())
    brain = np.logical_or.reduce([image != 0 for image in case.images.values()])
    return int(brain.sum(axis=(0, 1)).argmax())


def _patient(row: NDArray[Any], case: Case, sequences: Sequence[str]) -> None:
    z = middle_slice(case)
    classes = np.zeros(case.grid.shape[:2], np.uint8) if case.labels is None else case.labels[:, :, z]
    for ax, name in zip(row, [*sequences, None], strict=True):
        last = name or next(n for n in reversed(sequences) if n in case.images)
        if last in case.images:
            image = _windowed(case.images[last])[:, :, z]
            _grey(ax, image if name else _painted(image, classes))
            _frame(ax, case, z)
            if name and classes.any() and not classes.all():
                ax.contour((classes[::-1] > 0).T, [0.5], colors=[REGION_HUES[0]], linewidths=0.5)


def _windowed(image: NDArray[Any]) -> NDArray[np.float64]:
    low, high = np.percentile(image[image != 0], WINDOW)
    return np.where(image == 0, 0.0, np.clip((image - low) / max(high - low, 1e-6), 0, 1)).astype(np.float64)


def _painted(grey: NDArray[np.float64], classes: NDArray[Any]) -> NDArray[np.float64]:
    canvas = np.repeat(grey[..., None], 3, axis=-1)
    for region, hue in zip(REGIONS, REGION_HUES, strict=False):
        mask = GLIOMA.region_mask(classes, region)
        canvas[mask] = 0.4 * grey[mask, None] + 0.6 * np.array(mpl.colors.to_rgb(hue))
    return canvas


def _grey(ax: Axes, image: NDArray[Any]) -> None:
    # seen from below, as radiologists do: the patient's right is on the left
    ax.imshow(np.swapaxes(image[::-1], 0, 1), origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    ax.set(xticks=[], yticks=[], facecolor="black")
    ax.set_axis_off()


def _frame(ax: Axes, case: Case, z: int) -> None:
    """Every panel covers the same mm, centred on the whole brain."""
    brain = np.logical_or.reduce([image != 0 for image in case.images.values()])
    at = np.argwhere(brain.any(axis=2))
    x, y = (at.min(axis=0) + at.max(axis=0)) / 2
    half = np.array([WIDE_MM, TALL_MM]) / np.array(case.grid.spacing_mm[:2]) / 2
    x = case.grid.shape[0] - 1 - x
    ax.set(xlim=(x - half[0], x + half[0]), ylim=(y - half[1], y + half[1]))
    ax.add_patch(mpl.patches.Rectangle((x - half[0], y - half[1]), *(2 * half), color="black", zorder=-1))


def _jitter(n: int) -> NDArray[np.float64]:
    return (np.arange(n) * 0.618 % 1 - 0.5) * 0.26


def _percentile_axes(ax: Axes, rows: Sequence[ShapeRow], title: str) -> None:
    for x, row in enumerate(rows):
        for i, (real, found) in enumerate(zip(row.reference, row.found, strict=True)):
            at = x + (i - 2) * 0.15
            ax.plot([at, at], [0.75 * real, 1.25 * real], color=FAINT, linewidth=5, solid_capstyle="butt")
            ax.plot(at, real, "_", color=REAL, markersize=7, markeredgewidth=2)
            within = abs(found - real) <= 0.25 * abs(real) + 1e-9
            ax.plot(at, found, "o", color=SIMULATED if within else "#b00020", markersize=4.5)
    ax.set_xticks(range(len(rows)), [_short(row.name) for row in rows])
    ax.set_title(title)


def _short(name: str) -> str:
    words = name.replace("_volume", "").replace("share_", "").replace("_over_", " / ").replace("_", " ")
    return words.split()[-1] if name.count(" ") else words


assert len(PERCENTILES) == 5
