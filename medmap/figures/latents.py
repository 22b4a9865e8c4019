"""Where the latents of the sequences lie, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from medmap.figures.style import HUES, MARKERS, STYLE, label, number


def modality_gap(latents: NDArray[Any], modality: Sequence[str]) -> float:
    """Share of the latents' variance that lies between sequences: 0 = no gap, 1 = nothing but the gap.

        gap = Σ_j n_j ‖z̄_j − z̄‖² / Σ_i ‖z_i − z̄‖²

    latents:  [N C] pooled latents, one row a patient and sequence
    modality: N names
    NaN where the latents do not vary at all. Without any gap the expected value is about (M − 1)/(N − 1), not 0.

    >>> modality_gap(np.array([[0.0], [2.0], [10.0], [12.0]]), ["a", "a", "b", "b"])
    0.9615384615384616
    """
    values, names = np.asarray(latents, float), np.asarray(modality)
    centred = values - values.mean(0)
    total = float((centred**2).sum())
    between = sum((names == name).sum() * float((centred[names == name].mean(0) ** 2).sum()) for name in set(names))
    return float(between / total) if total > 0 else float("nan")


@rc_context(STYLE)
def latent_pca(latents: Mapping[str, Any]) -> Figure:
    """Pooled latents on their first two principal components, untrained | trained; one mark a patient and sequence.

    latents: before[N C], after[N C], modality[N], case[N], level (one name, or N). Grey lines join one patient's
             sequences. Each panel has its own components: distances compare within a panel, not across.
    """
    modality, case = np.asarray(latents["modality"]).astype(str), np.asarray(latents["case"]).astype(str)
    level = np.atleast_1d(np.asarray(latents.get("level", ""))).astype(str)
    level = level if level.size == modality.size else np.full(modality.size, ", ".join(dict.fromkeys(level)))
    levels, names = list(dict.fromkeys(level)), list(dict.fromkeys(modality))
    fig = Figure(figsize=(11, 4.9 * len(levels)), layout="constrained")
    for row, at in zip(fig.subplots(len(levels), 2, squeeze=False), levels, strict=True):
        here = level == at
        for ax, when, title in zip(row, ("before", "after"), ("Untrained weights", "Trained weights"), strict=True):
            values = np.asarray(latents[when], float)[here]
            points, share = _principal(values)
            _constellation(ax, points, modality[here], case[here], names)
            gap, chance = modality_gap(values, modality[here]), (len(names) - 1) / max(len(values) - 1, 1)
            ax.set_title(f"{title}{f', level {at}' if at else ''}\ngap {number(gap)} (chance {number(chance)})")
            ax.set(xlabel=f"PC 1 ({100 * share[0]:.0f} % of variance)", ylabel=f"PC 2 ({100 * share[1]:.0f} %)")
            ax.set_aspect("equal", adjustable="datalim")
    keys = [Line2D([], [], color=HUES[j % 8], marker=MARKERS[j % 8], linestyle="") for j in range(len(names))]
    keys.append(Line2D([], [], color="#b5b5b5", linewidth=1))
    fig.legend(keys, [*map(label, names), "one patient"], loc="outside lower center", ncols=len(keys))
    return fig


def _principal(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    u, s, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    u, s = np.pad(u, ((0, 0), (0, 2))), np.pad(s, (0, 2))
    total = float((s**2).sum())
    return u[:, :2] * s[:2], (s[:2] ** 2 / total if total > 0 else np.zeros(2))


def _constellation(ax: Axes, points: NDArray[Any], modality: Any, case: Any, names: Sequence[str]) -> None:
    for patient in dict.fromkeys(case):
        mine = points[case == patient]
        loop = np.vstack([mine, mine[:1]]) if len(mine) > 2 else mine
        ax.plot(*loop.T, color="#b5b5b5", linewidth=0.7, zorder=1)
    for j, name in enumerate(names):
        mine = points[modality == name]
        ax.scatter(*mine.T, s=62, color=HUES[j % 8], marker=MARKERS[j % 8], edgecolor="white", linewidth=0.7, zorder=2)
