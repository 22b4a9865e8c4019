"""Masks of single patients over their images, for the full and for reduced input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medmap.core.labels import SCHEMES
from medmap.figures.style import INK, REGION_HUES, STYLE, label, number

DARK_RIM = [withStroke(linewidth=2.6, foreground="#202020")]


@rc_context(STYLE)
def example_overlays(examples: Mapping[str, Any], regions: Mapping[str, Sequence[int]] | None = None) -> Figure:
    """One row a patient: the expert's mask, then the network's for the full and for reduced input.

    examples: images[E M X Y], modalities[M], cases[E], truth[E X Y], subsets[S], predictions[E S X Y] (class indices),
              spacing_mm[2], dice[E S R]. Slices are axial, first axis left → right, second back → front (RAS).
    regions:  {region: class indices}, outer region first; glioma's WT, TC, ET where not given
    A mask is painted over a sequence that was given for it; the white line is the expert's outermost region.
    """
    regions = regions or {name: SCHEMES["brats2023"].members(name) for name in ("WT", "TC", "ET")}
    modalities, subsets = [str(m) for m in examples["modalities"]], [str(s) for s in examples["subsets"]]
    shown, panels = len(examples["cases"]), 1 + len(subsets)
    fig = Figure(figsize=(2.3 * panels, 2.95 * shown + 0.7), layout="constrained")
    grid = fig.subplots(shown, panels, squeeze=False)
    for e, row in enumerate(grid):
        images, truth = np.asarray(examples["images"][e], float), np.asarray(examples["truth"][e])
        window = _brain_window(images)
        for ax, given, mask in zip(
            row, [subsets[0], *subsets], [truth, *np.asarray(examples["predictions"][e])], strict=True
        ):
            under = _background(given.split("+"), modalities)
            ax.text(0.98, 0.02, f"on {label(under)}", color="#cccccc", size=9, ha="right", transform=ax.transAxes)
            _overlay(ax, images[modalities.index(under)][window], mask[window], truth[window], regions)
        for s, ax in enumerate(row[1:]):
            scores = zip(regions, np.asarray(examples["dice"][e][s], float), strict=False)
            ax.set_xlabel("  ".join(f"{region} {number(score)}" for region, score in scores), size=10)
        row[0].set_xlabel("Dice of the whole volume →", size=10)
        row[0].set_ylabel(f"patient {e + 1}")
        _scale_bar(row[0], float(np.asarray(examples["spacing_mm"]).ravel()[0]))
    for ax, title in zip(grid[0], ["Expert", *_given(subsets)], strict=True):
        ax.set_title(title, loc="center", size=11.5)
    keys = [Patch(facecolor=hue, edgecolor=INK, label=r) for r, hue in zip(regions, REGION_HUES * 2, strict=False)]
    outline = f"expert's outline ({next(iter(regions))})"
    keys.append(Line2D([], [], color="white", linewidth=1.6, path_effects=DARK_RIM, label=outline))
    fig.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return fig


def _given(subsets: Sequence[str]) -> list[str]:
    rest = [label(subset).replace(" + ", " +\n", 1) for subset in subsets[1:]]
    return ["All sequences", *(f"{text} only" if "+" not in text else text for text in rest)]


def _background(given: Sequence[str], modalities: Sequence[str]) -> str:
    ranked = [*("t2f", "t1c", "t2w", "t1n"), *modalities]
    return next((name for name in ranked if name in given and name in modalities), modalities[0])


def _brain_window(images: NDArray[Any], margin: int = 2) -> tuple[slice, slice]:
    brain = (images != 0).any(0)
    spans = [np.flatnonzero(brain.any(axis)) for axis in (1, 0)]
    (x0, x1), (y0, y1) = [(s[0], s[-1]) if s.size else (0, n - 1) for s, n in zip(spans, brain.shape, strict=True)]
    return slice(max(x0 - margin, 0), x1 + 1 + margin), slice(max(y0 - margin, 0), y1 + 1 + margin)


def _overlay(
    ax: Axes, image: NDArray[Any], mask: NDArray[Any], truth: NDArray[Any], regions: Mapping[str, Sequence[int]]
) -> None:
    inside = image[image != 0]
    low, high = np.percentile(inside, (1, 99.8)) if inside.size else (0.0, 1.0)
    grey = np.where(image == 0, 0.0, np.clip((image - low) / max(high - low, 1e-6), 0, 1))
    canvas = np.repeat(grey[..., None], 3, -1)
    for members, hue in zip(regions.values(), REGION_HUES * 2, strict=False):
        inside_region = np.isin(mask, members)
        canvas[inside_region] = 0.45 * grey[inside_region, None] + 0.55 * np.array(mpl.colors.to_rgb(hue))
    # (X, Y) in RAS, seen from below as radiologists do: the patient's right is on the left
    ax.imshow(canvas[::-1].transpose(1, 0, 2), origin="lower", interpolation="nearest")
    outer = np.isin(truth, next(iter(regions.values()))).astype(float)[::-1].T
    if outer.any() and not outer.all():
        ax.contour(outer, levels=[0.5], colors="white", linewidths=1.3).set_path_effects(DARK_RIM)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _scale_bar(ax: Axes, spacing_mm: float) -> None:
    x, y, length = 2.0, 2.0, 50 / spacing_mm
    ax.plot([x, x + length], [y, y], color="white", linewidth=3, solid_capstyle="butt")
    ax.text(x, y + 2, "5 cm", color="white", size=10, va="bottom")
    ax.text(0.02, 0.97, "R", color="white", size=11, va="top", transform=ax.transAxes)
