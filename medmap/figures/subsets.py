"""Subsets of sequences against regions: the heat map, and what each sequence is worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medmap.figures.style import (
    FAINT,
    INK,
    METRIC_NAMES,
    NUMBERED_ROWS,
    REGION_HUES,
    REGION_NAMES,
    STYLE,
    label,
    number,
)

_LEGACY = (
    *("t2w", "t1c", "t1n", "t2f"),
    *("t1c+t2w", "t1c+t1n", "t2f+t1n", "t1n+t2w", "t2f+t2w", "t2f+t1c"),
    *("t2f+t1c+t1n", "t2f+t1n+t2w", "t2f+t1c+t2w", "t1c+t1n+t2w", "t1n+t1c+t2w+t2f"),
)


def order_subsets(modalities: Sequence[str]) -> list[frozenset[str]]:
    """All 2^M − 1 subsets: in the order of the field's 15-row table for its four sequences, else by size.

    >>> [sorted(subset) for subset in order_subsets(("t1n", "t1c", "t2w", "t2f"))[:2]]
    [['t2w'], ['t1c']]
    >>> len(order_subsets(("a", "b", "c")))
    7
    """
    legacy = [frozenset(text.split("+")) for text in _LEGACY]
    if legacy[-1] == set(modalities):
        return legacy
    sizes = range(1, len(modalities) + 1)
    return [frozenset(subset) for size in sizes for subset in combinations(modalities, size)]


def columns(summary: Mapping[str, Any], rows: str = "rows") -> list[str]:
    """The summary's regions, each followed by its post-processed twin (``ET-pp``) where there is one."""
    found = {row["region"] for row in summary[rows]}
    return [name for region in summary["regions"] for name in (region, f"{region}-pp") if name in found]


def cells(summary: Mapping[str, Any], metric: str, rows: str = "rows") -> dict[tuple[frozenset[str], str], Any]:
    """{(subset, region): row of the summary} for one metric; rows of groups of subsets are left out."""
    wanted = (row for row in summary[rows] if row["metric"] == metric and "subset" in row)
    return {(frozenset(row["subset"].split("+")), row["region"]): row for row in wanted}


@rc_context(STYLE)
def subset_heatmap(summary: Mapping[str, Any], metric: str = "dice", rows: str = "rows") -> Figure:
    """Every subset of sequences (rows; dots say which are there) against every region, numbers with intervals.

    summary: {"modalities", "regions", "rows": [{subset, region, metric, mean, low, high, n}], "groups": the same rows
             with ``group`` in place of ``subset``}
    rows:    ``rows``, or ``present``: only the patients who have the region
    Mean groups are drawn below for ``rows``. Dice-like metrics are coloured on the fixed range 0 … 1.
    """
    modalities, regions = summary["modalities"], columns(summary, rows)
    subsets, table = order_subsets(modalities), cells(summary, metric, rows)
    numbered = len(subsets) <= NUMBERED_ROWS
    groups = _grouped(summary, metric) if rows == "rows" else {}
    height, gap = (0.34, 0.35) if numbered else (0.055, 2.0)
    tops = np.arange(len(subsets)) + gap * np.array([len(subset) - 1 for subset in subsets])
    foot = tops[-1] + 1 + 2 * gap
    step = 1.0 if numbered else 0.34 / height
    total = foot + step * len(groups)

    dots, width = 0.46 * len(modalities), 1.85
    fig = Figure(figsize=(max(dots, 2.0) + width * len(regions) + 1.5, height * total + 1.35), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(max(dots, 2.0), width * len(regions)), sharey=True)
    colours = _scale(metric, [row["mean"] for row in table.values()])
    for top, subset in zip(tops, subsets, strict=True):
        _membership(left, top + 0.5, subset, modalities, numbered)
        for x, region in enumerate(regions):
            _cell(right, (x, top), 1.0, table.get((subset, region)), colours, numbered)
    for y, name in enumerate(groups):
        top = foot + step * y
        left.text(len(modalities) - 0.4, top + step / 2, label(name), ha="right", va="center", weight="bold")
        for x, region in enumerate(regions):
            _cell(right, (x, top), step, groups[name].get(region), colours, True)
    _head(left, right, modalities, regions, total)
    bar = fig.colorbar(colours, ax=right, fraction=0.035, aspect=35, pad=0.02)
    bar.set_label(f"mean {METRIC_NAMES.get(metric, metric)}")
    bar.outline.set_visible(False)
    return fig


def _grouped(summary: Mapping[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for row in summary.get("groups", []):
        if row["metric"] == metric:
            groups.setdefault(row["group"], {})[row["region"]] = row
    return groups


def _scale(metric: str, means: Iterable[float | None]) -> ScalarMappable:
    finite = [mean for mean in means if mean is not None and np.isfinite(mean)] or [0.0]
    physical = metric.endswith(("_mm", "_ml"))  # there, less is better: bright stays good
    top = max(max(finite), 1e-6) if physical else 1.0
    return ScalarMappable(Normalize(0, top), mpl.colormaps["viridis_r" if physical else "viridis"])


def _membership(ax: Axes, y: float, subset: frozenset[str], modalities: Sequence[str], numbered: bool) -> None:
    present = [x for x, name in enumerate(modalities) if name in subset]
    size = 95 if numbered else 5
    ax.scatter(range(len(modalities)), [y] * len(modalities), s=size, color=FAINT, linewidths=0)
    ax.plot([present[0], present[-1]], [y, y], color=INK, linewidth=2 if numbered else 0.4)
    ax.scatter(present, [y] * len(present), s=size, color=INK, linewidths=0, zorder=3)


def _cell(ax: Axes, at: tuple[float, float], high: float, row: Any, colours: ScalarMappable, numbered: bool) -> None:
    mean = row["mean"] if row else None
    known = mean is not None and np.isfinite(mean)
    fill = colours.to_rgba(mean) if known else (0.95, 0.95, 0.95, 1.0)
    inset = 0.03 * high if numbered else 0.0
    ax.add_patch(Rectangle((at[0] + 0.01, at[1] + inset), 0.98, high - 2 * inset, facecolor=fill, linewidth=0))
    if not numbered:
        return
    ink = "white" if _luminance(fill) < 0.2 else INK
    digits = 2 if colours.norm.vmax <= 1 else 1
    y = at[1] + high / 2
    ax.text(at[0] + 0.30, y, number(mean, digits), color=ink, ha="center", va="center", size=13, weight="bold")
    if known and row.get("low") is not None:
        interval = f"{number(row['low'], digits)}–{number(row['high'], digits)}"
        ax.text(at[0] + 0.69, y, interval, color=ink, ha="center", va="center", size=10)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance as WCAG defines it: white and our dark ink are equally legible on 0.2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _head(left: Axes, right: Axes, modalities: Sequence[str], regions: Sequence[str], total: float) -> None:
    left.set(xlim=(-0.5, len(modalities) - 0.5), ylim=(total, 0), yticks=[], ylabel="sequences given")
    left.set_xticks(range(len(modalities)), [label(name) for name in modalities], rotation=45, ha="left")
    right.set(xlim=(0, len(regions)), xlabel="region")
    right.set_xticks(np.arange(len(regions)) + 0.5, [_region_title(region) for region in regions])
    for ax in (left, right):
        ax.spines[:].set_visible(False)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
    right.tick_params(left=False, labelleft=False)
    right.xaxis.set_label_position("top")


def _region_title(region: str) -> str:
    base, _, processed = region.partition("-")
    name = "dropped if small" if processed else REGION_NAMES.get(base, "")
    return f"{region}\n{name}".strip()


@rc_context(STYLE)
def cost_of_losing(summary: Mapping[str, Any], metric: str = "dice") -> Figure:
    """What each sequence is worth: mean over the subsets S without m of Dice(S ∪ {m}) − Dice(S), per region.

    Bars are that mean, grey dots the single pairs (S ∪ {m}, S): their spread is over subsets, not over patients.
    """
    modalities, regions = summary["modalities"], summary["regions"]
    gains = {m: {region: _pairs(summary, metric, m, region) for region in regions} for m in modalities}
    order = sorted(modalities, key=lambda m: -np.mean([_mean(gains[m][region]) for region in regions]))
    fig = Figure(figsize=(max(9.0, 0.75 * len(modalities) * len(regions)), 4.4), layout="constrained")
    ax = fig.subplots()
    width = 0.8 / len(regions)
    for r, region in enumerate(regions):
        x = np.arange(len(order)) + (r - (len(regions) - 1) / 2) * width
        heights = [_mean(gains[m][region]) for m in order]
        hue = REGION_HUES[r % len(REGION_HUES)]
        ax.bar(x, heights, width * 0.94, color=hue, edgecolor=INK, linewidth=0.8, label=region)
        for centre, m, height in zip(x, order, heights, strict=True):
            spread = np.linspace(-0.22, 0.22, len(gains[m][region])) * width
            ax.scatter(centre + spread, gains[m][region], s=11, color="#555555", alpha=0.75, linewidths=0, zorder=3)
            top = max([height, 0.0, *gains[m][region]])
            ax.annotate(number(height), (centre, top), (0, 5), textcoords="offset points", ha="center", size=11)
    ax.axhline(0, color=INK, linewidth=1)
    ax.set_xticks(range(len(order)), [label(m) for m in order])
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.12)
    ax.set(xlabel="sequence that is lost", ylabel=f"{METRIC_NAMES.get(metric, metric)} lost (mean over subsets)")
    ax.legend(ncols=len(regions), loc="upper right", title="region")
    return fig


def mean_loss(summary: Mapping[str, Any], modality: str, region: str, metric: str = "dice") -> float:
    """The height of a bar of `cost_of_losing`: mean over S ∌ m of metric(S ∪ {m}) − metric(S); 0 without any pair."""
    return _mean(_pairs(summary, metric, modality, region))


def _pairs(summary: Mapping[str, Any], metric: str, modality: str, region: str) -> list[float]:
    table = cells(summary, metric)
    value = {subset: table[subset, region]["mean"] for subset, name in table if name == region}
    pairs = [(value[subset], value.get(subset - {modality})) for subset in value if modality in subset]
    return [more - less for more, less in pairs if more is not None and less is not None and np.isfinite(more - less)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
