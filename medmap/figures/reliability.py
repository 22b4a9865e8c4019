"""Whether probabilities mean what they say: predicted against found, as the network gives them and tempered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medmap.figures.style import HUES, INK, REGION_NAMES, STYLE

LEAST_VOXELS = 30
"""A share of fewer voxels is no point of the curve."""

_LOOKS = (("as the network gives them", HUES[1], "o", "white", (0, (2, 1.5))), ("tempered", HUES[0], "s", HUES[0], "-"))


@rc_context(STYLE)
def reliability_diagram(temperature: Mapping[str, Any]) -> Figure:
    """A panel a region: share of voxels that were the region against their probability, before and after tempering.

    temperature: what confidence.json has under that name
    """
    found = temperature["left_out"]["regions"]
    fig = Figure(figsize=(4.1 * max(len(found), 1), 5.6), layout="constrained")
    upper, lower = fig.subplots(2, len(found), squeeze=False, height_ratios=(3, 1), sharex=True, sharey="row")
    for (region, row), curve, count in zip(found.items(), upper, lower, strict=True):
        _panel(curve, count, row)
        before, after = (100 * error for error in row["error_where_doubtful"])
        curve.set_title(f"{region}, {REGION_NAMES[region]}" if region in REGION_NAMES else region)
        curve.text(0.97, 0.03, f"ECE {before:.1f} → {after:.1f} %", ha="right", transform=curve.transAxes)
        count.set_xlabel("probability of the region")
    upper[0].set_ylabel("share that was the region")
    lower[0].set_ylabel("voxels")
    upper[0].legend(loc="upper left", fontsize=11)
    return fig


def _panel(curve: Axes, count: Axes, row: Mapping[str, Any]) -> None:
    curve.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    for (name, hue, marker, fill, line), bins in zip(_LOOKS, row["bins"], strict=True):
        voxels, predicted, true = np.array(bins, dtype=np.float64)
        some = voxels >= LEAST_VOXELS
        looks = {"color": hue, "linestyle": line}
        curve.plot(
            predicted[some] / voxels[some],
            true[some] / voxels[some],
            marker=marker,
            markerfacecolor=fill,
            label=name,
            **looks,
        )
        count.stairs(np.maximum(voxels, 0.5), np.linspace(0, 1, len(voxels) + 1), linewidth=1.8, **looks)
    count.set_yscale("log")
    curve.set(xlim=(0, 1), ylim=(0, 1), xticks=(0.1, 0.3, 0.5, 0.7, 0.9))
    for axes in (curve, count):
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
