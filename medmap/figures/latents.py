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

from medmap.core.spread import chance_gap, modality_gap
from medmap.errors import InputError
from medmap.figures.style import HUES, MARKERS, STYLE, label, number


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
            gap, chance = modality_gap(values, modality[here]), chance_gap(modality[here])
            ax.set_title(f"{title}{f', level {at}' if at else ''}\ngap {number(gap)} (chance {number(chance)})")
            ax.set(xlabel=f"PC 1 ({100 * share[0]:.0f} % of variance)", ylabel=f"PC 2 ({100 * share[1]:.0f} %)")
            ax.set_aspect("equal", adjustable="datalim")
    _legend(fig, names)
    return fig


@rc_context(STYLE)
def latent_map(numbers: Mapping[str, Any], level: str | None = None) -> Figure:
    """One level's latents on a plane: PCA above t-SNE, untrained | trained; one mark a patient and sequence.

    numbers: what `medmap.latentspace.latent_numbers` gives
    level:   one of its levels; the last where none is named

    Above the maps, each with the level of chance in brackets: the modality gap, how often a linear probe names the
    sequence of a patient it has not seen, and how often the nearest point of another sequence is of the same patient.
    Grey lines join one patient's sequences. Each panel has its own axes, and those of t-SNE have no unit: it keeps
    neighbours, so that sizes of clusters and the distances between them say nothing.
    Raises InputError for a level that is not there.
    """
    level = list(numbers["levels"])[-1] if level is None else level
    if level not in numbers["levels"]:
        raise InputError(f"level: found {level!r}, expected one of {', '.join(numbers['levels'])}")
    modality, case = np.asarray(numbers["rows"]["modality"]), np.asarray(numbers["rows"]["case"])
    names = list(dict.fromkeys(numbers["rows"]["modality"]))
    fig = Figure(figsize=(11, 10.4), layout="constrained")
    panels = fig.subplots(2, 2)
    for column, when, title in zip(panels.T, ("before", "after"), ("Untrained", "Trained"), strict=True):
        found = numbers["levels"][level][when]
        points = found["map"]
        upper, lower = column
        _constellation(upper, np.asarray(points["pca"], float), modality, case, names)
        share = [100 * x for x in points["share"]]
        gap, told, same = (f"{number(found[name][key])} ({number(found[name]['chance'])})" for name, key in _SAID)
        upper.set_title(f"{title}, level {level}\ngap {gap}, sequence told {told},\nsame patient nearest {same}")
        upper.set(xlabel=f"PC 1 ({share[0]:.0f} % of variance)", ylabel=f"PC 2 ({share[1]:.0f} %)")
        upper.set_aspect("equal", adjustable="datalim")
        lower.set(xlabel=f"t-SNE 1 (perplexity {points['perplexity']:.0f})", ylabel="t-SNE 2", xticks=[], yticks=[])
        if points["tsne"] is None:
            lower.text(0.5, 0.5, "nothing varies", ha="center", transform=lower.transAxes)
            continue
        _constellation(lower, np.asarray(points["tsne"], float), modality, case, names)
        lower.set_aspect("equal", adjustable="datalim")
    _legend(fig, names)
    return fig


_SAID = (("gap", "share"), ("probe", "accuracy"), ("retrieval", "accuracy"))
"""Numbers that stand above a map, each with its chance level."""


def _legend(fig: Figure, names: Sequence[str]) -> None:
    keys = [Line2D([], [], color=HUES[j % 8], marker=MARKERS[j % 8], linestyle="") for j in range(len(names))]
    keys.append(Line2D([], [], color="#b5b5b5", linewidth=1))
    fig.legend(keys, [*map(label, names), "one patient"], loc="outside lower center", ncols=len(keys))


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
