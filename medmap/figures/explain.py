"""What decided one patient's mask: where subsets agree, what each sequence carries, what each subset would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from medmap.figures.style import FAINT, HUES, INK, NUMBERED_ROWS, REGION_NAMES, STYLE, label

RIM = [withStroke(linewidth=3.4, foreground="#101010")]
OPAQUE = 0.8  # agreement over an image
COLUMN_IN = 3.7


@rc_context(STYLE)
def explanation_figure(record: Mapping[str, Any], views: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One column a region: its fullest slice with the full answer's outline and the agreement of all subsets, what each
    sequence carries (Shapley values), and the volume that every subset gives.

    record: of an explanation.json {"case", "used", "subsets", "regions": {region: {"shapley", "volume_ml",
            "volumes_ml"}}}
    views:  {region: {"on": sequence below, "image", "mask", "agreement": [X Y], "spacing_mm": [2]}}; slices are axial,
            first axis left → right, second back → front (RAS)
    """
    regions, used, subsets = record["regions"], record["used"], record["subsets"][::-1]
    dotted = len(subsets) <= NUMBERED_ROWS
    heights = (3.9, 0.75 + 0.38 * len(used), 0.75 + (0.27 if dotted else 0.05) * len(subsets))
    names = max(1.7, 0.45 * len(used) + 0.3)
    fig = Figure(figsize=(names + COLUMN_IN * len(regions), sum(heights) + 1.6), layout="constrained")
    widths = (names, *[COLUMN_IN] * len(regions))
    (key, *pictures), (names_of_bars, *bars), (dots, *lines) = fig.subplots(
        3, 1 + len(regions), squeeze=False, height_ratios=heights, width_ratios=widths
    )
    shades = ScalarMappable(Normalize(0, 100), "viridis")
    for (region, found), picture, bar, line in zip(regions.items(), pictures, bars, lines, strict=True):
        _slice(picture, views[region], shades)
        picture.set_title(f"{region} {REGION_NAMES.get(region, '')}".strip(), loc="center")
        _carried(bar, found["shapley"], used, [one["shapley"] for one in regions.values()])
        _volumes(line, found, subsets, 42 if dotted else 5)
    fig.suptitle(f"{record['case']}: what decided the mask from {label('+'.join(used))}", weight="bold")
    fig.supxlabel(
        "Influence on the model's answer, not accuracy. Shares are Shapley values and add up to 100 %.", size=12
    )
    _key(key, shades, len(subsets))
    _names(names_of_bars, used)
    _membership(dots, subsets, used, dotted)
    return fig


def _slice(ax: Axes, view: Mapping[str, Any], shades: ScalarMappable) -> None:
    """In radiological view, the patient's right on the left; agreement in colour, the full answer outlined."""
    image = np.asarray(view["image"], float)
    inside = image[image != 0]
    low, high = np.percentile(inside, (1, 99.8)) if inside.size else (0.0, 1.0)
    grey = np.where(image == 0, 0.0, np.clip((image - low) / max(high - low, 1e-6), 0, 1))
    agreement = 100 * np.asarray(view["agreement"], float)
    colour = np.asarray(shades.to_rgba(agreement, norm=True))[..., :3]
    share = np.where(agreement > 0, OPAQUE, 0.0)[..., None]
    canvas = (1 - share) * grey[..., None] + share * colour
    width, height = view["spacing_mm"]
    ax.imshow(canvas[::-1].transpose(1, 0, 2), origin="lower", interpolation="nearest", aspect=height / width)
    mask = np.asarray(view["mask"])
    if mask.any() and not mask.all():
        outline = ax.contour(mask[::-1].T.astype(float), levels=[0.5], colors="white", linewidths=1.5)
        outline.set_path_effects(RIM)
    white: dict[str, Any] = {"color": "white", "path_effects": [withStroke(linewidth=2, foreground="#101010")]}
    ax.text(0.02, 0.98, "R", va="top", transform=ax.transAxes, **white)
    ax.text(0.98, 0.02, f"on {label(view['on'])}", ha="right", transform=ax.transAxes, **white)
    if not mask.any():
        ax.text(0.5, 0.98, "not in the full answer", ha="center", va="top", transform=ax.transAxes, **white)
    length = 50 / width
    ax.plot([2, 2 + length], [3, 3], color="white", linewidth=3, solid_capstyle="butt")
    ax.text(2 + length / 2, 5, "5 cm", va="bottom", ha="center", **white)
    ax.set(xticks=[], yticks=[], facecolor="black")
    ax.spines[:].set_visible(False)


def _carried(
    ax: Axes, shares: Mapping[str, float] | None, used: Sequence[str], every: Sequence[Mapping[str, float] | None]
) -> None:
    shown = [value for one in every if one for value in one.values()]
    low, high = min([0.0, *shown]), max([0.0, *shown], default=1.0) or 1.0
    ax.set(
        xlim=(1.45 * 100 * low, 100 * high + 30), ylim=(len(used) - 0.5, -0.5), yticks=[], xlabel="share carried (%)"
    )
    ax.axvline(0, color=INK, linewidth=1)
    ax.spines["left"].set_visible(False)
    if shares is None:
        ax.text(0.5, 0.5, "nothing to share out", ha="center", va="center", transform=ax.transAxes, color="#555555")
        return
    values = [100 * shares[name] for name in used]
    ax.barh(range(len(used)), values, 0.68, color=HUES[0])
    for y, value in enumerate(values):
        ax.annotate(
            f"{round(value)}".replace("-", "−"), (max(value, 0), y), (5, 0), textcoords="offset points", va="center"
        )


def _volumes(ax: Axes, found: Mapping[str, Any], subsets: Sequence[str], size: float) -> None:
    volumes, ml = [found["volumes_ml"][subset] for subset in subsets], found["volume_ml"]
    ax.axvline(ml["full"], color=INK, linewidth=1.5)
    ax.axvline(ml["median"], color=INK, linewidth=1.5, linestyle=(0, (2, 2)))
    ax.scatter(volumes, range(len(subsets)), s=size, color=HUES[1], zorder=3, clip_on=False)
    ax.set(ylim=(len(subsets) - 0.5, -0.5), yticks=[], xlabel="volume (ml)")
    ax.set_xlim(0, 1.04 * max(volumes) or 1.0)
    ax.spines["left"].set_visible(False)
    ax.hlines(range(len(subsets)), 0, 1, color=FAINT, linewidth=0.6, zorder=0, transform=ax.get_yaxis_transform())


def _key(ax: Axes, shades: ScalarMappable, count: int) -> None:
    """What colours and lines mean."""
    ax.set_axis_off()
    bar = ax.figure.colorbar(shades, cax=ax.inset_axes((0.72, 0.34, 0.16, 0.6)))
    bar.ax.yaxis.set_ticks_position("left")
    bar.ax.yaxis.set_label_position("left")
    bar.set_ticks([0, 25, 50, 75, 100])
    bar.set_label(f"subsets, of {count}, whose\nmask has the voxel (%)")
    bar.outline.set_visible(False)
    lines = [
        Line2D([], [], color="white", linewidth=1.5, path_effects=RIM, label="full answer"),
        Line2D([], [], color=INK, linewidth=1.5, label="its volume"),
        Line2D([], [], color=INK, linewidth=1.5, linestyle=(0, (2, 2)), label="median"),
    ]
    ax.legend(handles=lines, loc="lower right", handlelength=1.4, borderpad=0)


def _names(ax: Axes, used: Sequence[str]) -> None:
    ax.set(xlim=(0, 1), ylim=(len(used) - 0.5, -0.5))
    ax.set_axis_off()
    for y, name in enumerate(used):
        ax.text(1, y, label(name), ha="right", va="center")


def _membership(ax: Axes, subsets: Sequence[str], used: Sequence[str], dotted: bool) -> None:
    size = 50 if dotted else 4
    given = np.array([[name in subset.split("+") for name in used] for subset in subsets])
    for some, colour in ((~given, FAINT), (given, INK)):
        y, x = np.nonzero(some)
        ax.scatter(x, y, s=size, color=colour, linewidths=0)
    ax.set(xlim=(-0.6, len(used) - 0.4), ylim=(len(subsets) - 0.5, -0.5), yticks=[], ylabel="sequences given")
    ax.set_xticks(range(len(used)), [label(name) for name in used], rotation=90)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
