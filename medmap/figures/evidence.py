"""What a study found: differences with their intervals, and how they change along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medmap.figures.style import HUES, INK, MARKERS, STYLE, label


@rc_context(STYLE)
def forest(effects: Sequence[Mapping[str, Any]], outcome: str) -> Figure:
    """Differences of arms, one below the other: a mark and its interval each, and the line of no effect.

    effects: records {"arm", "against", "region", "mean", "low", "high"} in points; regions share a row, side by side
    """
    pairs = list(dict.fromkeys((e["arm"], e["against"]) for e in effects))
    regions = list(dict.fromkeys(e["region"] for e in effects))
    fig = Figure(figsize=(9, 1.5 + (0.12 * len(regions) + 0.12) * len(pairs)), layout="constrained")
    ax = fig.subplots()
    for row, pair in enumerate(pairs):
        for column, region in enumerate(regions):
            found = next((e for e in effects if (e["arm"], e["against"], e["region"]) == (*pair, region)), None)
            if found is None or not np.isfinite(found["mean"]):
                continue
            y = row + (column - (len(regions) - 1) / 2) * 0.8 / len(regions)
            hue = INK if region == "mean" else HUES[column % 8]
            if np.isfinite(found["low"]):
                ax.plot([found["low"], found["high"]], [y, y], color=hue, linewidth=3 if region == "mean" else 1.8)
            ax.plot(found["mean"], y, marker=MARKERS[column % 8], color=hue, markersize=7, markeredgecolor="white")
    ax.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(pairs)), [_pair(arm, against) for arm, against in pairs])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set(xlabel=f"difference in points of Dice, {outcome}\n[95 % over patients and runs]")
    marks = [
        ax.plot([], [], marker=MARKERS[c % 8], color=INK if r == "mean" else HUES[c % 8], linestyle="")[0]
        for c, r in enumerate(regions)
    ]
    named = ["mean of the regions" if region == "mean" else region for region in regions]
    fig.legend(marks, named, loc="outside lower center", ncols=len(regions))
    ax.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    return fig


def _pair(arm: str, against: str) -> str:
    """What both begin with is said once.

    >>> _pair("unet, P*", "unet, α = 0")
    'unet, P* − α = 0'
    """
    head, comma, tail = against.rpartition(", ")
    return f"{arm} − {tail if comma and arm.startswith(head + comma) else against}"


@rc_context(STYLE)
def along(curves: Mapping[str, Sequence[Mapping[str, float]]], axis: str, what: str, level: str = "") -> Figure:
    """Numbers along an axis, a curve a series: {"at", "mean", "low", "high"} each, marks joined, intervals as bars.

    level: what the dashed line at 0 means, where differences are shown
    """
    fig = Figure(figsize=(8, 4.6), layout="constrained")
    ax = fig.subplots()
    every = sorted({point["at"] for points in curves.values() for point in points})
    place = {at: i for i, at in enumerate(every)}  # at even distances, as 0 and 10 may stand on one axis
    for index, (name, points) in enumerate(curves.items()):
        _curve(ax, name, points, place, index, len(curves))
    if level:
        ax.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(level, (0.005, 0), xycoords=("axes fraction", "data"), va="bottom", fontsize=10, color="#555555")
    ax.set_xticks(range(len(every)), [f"{at:g}" for at in every])
    ax.set(xlabel=axis, ylabel=what)
    ax.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    if len(curves) > 1:
        fig.legend(loc="outside lower center", ncols=min(3, len(curves)))
    return fig


def _curve(
    ax: Axes, name: str, points: Sequence[Mapping[str, float]], place: Mapping[float, int], index: int, count: int
) -> None:
    ordered = sorted(points, key=lambda point: point["at"])
    x = np.array([place[p["at"]] for p in ordered]) + (index - (count - 1) / 2) * 0.08
    mean = np.array([p["mean"] for p in ordered])
    hue = HUES[index % 8]
    ax.plot(x, mean, color=hue, marker=MARKERS[index % 8], markersize=8, markeredgecolor="white", label=name)
    for at, point in zip(x, ordered, strict=True):
        if np.isfinite(point["low"]):
            ax.plot([at, at], [point["low"], point["high"]], color=hue, linewidth=1.6)


@rc_context(STYLE)
def weight_panels(panels: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Weights of an anchor over the steps of training: a panel an arm, a line a modality and seed; dashes mark 1/M.

    panels: {arm: a list a seed of records {"step", "weights": {modality: w}}}
    """
    names = list(dict.fromkeys(n for seeds in panels.values() for log in seeds for row in log for n in row["weights"]))
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    fig = Figure(figsize=(4.0 * columns + 0.5, 3.2 * rows + 0.5), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, (arm, seeds) in zip(axes, panels.items(), strict=False):
        for j, name in enumerate(names):
            for log in seeds:
                ax.plot([row["step"] for row in log], [row["weights"][name] for row in log], color=HUES[j % 8], lw=1.6)
        ax.axhline(1 / len(names), color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        spread = max(abs(w - 1 / len(names)) for log in seeds for row in log for w in row["weights"].values())
        ax.set_ylim(1 / len(names) - max(1.2 * spread, 0.05), 1 / len(names) + max(1.2 * spread, 0.05))
        ax.set(title=fill(arm, 28), xlabel="optimiser step", ylabel="weight (no unit)")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    keys = [ax.plot([], [], color=HUES[j % 8])[0] for j in range(len(names))]
    keys.append(ax.plot([], [], color=INK, linestyle=(0, (4, 3)))[0])
    fig.legend(keys, [*map(label, names), f"1/{len(names)}"], loc="outside lower center", ncols=len(keys))
    return fig
