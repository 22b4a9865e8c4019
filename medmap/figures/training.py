"""What happened during training: loss and validation curves, and the weights of the anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from medmap.figures.style import HUES, INK, MARKERS, STYLE, label

Logs = Mapping[str, Sequence[Mapping[str, Any]]]
"""{name of the run or fold: records of its log.jsonl}"""


@rc_context(STYLE)
def learning_curves(logs: Logs) -> Figure:
    """Training loss, and Dice on the validation patients: mean over all subsets and with every sequence.

    logs: {run or fold: records {"kind": "train", step, loss, terms} and {"kind": "val", step, mean[, full, best]}}
    """
    fig = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    lines = [Line2D([], [], color=INK), Line2D([], [], color=INK, linestyle=(0, (2, 1.5)))]
    for (name, log), hue in zip(logs.items(), HUES * 9, strict=False):
        train = [record for record in log if record["kind"] == "train"]
        _smoothed(left, [r["step"] for r in train], [r["loss"] for r in train], hue, name)
        val = [record for record in log if record["kind"] == "val"]
        steps = [record["step"] for record in val]
        mean = [_nan(record["mean"]) for record in val]
        right.plot(steps, mean, color=hue)
        right.plot(steps, [_nan(record.get("full")) for record in val], color=hue, linestyle=(0, (2, 1.5)))
        best = _best(val)
        if best is not None:
            right.plot(steps[best], mean[best], marker="*", markersize=15, color=hue, markeredgecolor="white")
    positive = [record["loss"] for log in logs.values() for record in log if record["kind"] == "train"]
    if positive and min(positive) > 0:
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_locator(NullLocator())
    left.set(title="Training loss", xlabel="optimiser step", ylabel="loss (no unit)")
    right.set(title="Validation", xlabel="optimiser step", ylabel="Dice, mean over regions", ylim=(0, 1))
    right.legend(lines, ["mean over all subsets (★ best)", "all sequences given"], loc="lower right")
    if len(logs) > 1 and positive:
        left.legend(loc="upper right", ncols=1 + len(logs) // 6)
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    return fig


def _best(val: Sequence[Mapping[str, Any]]) -> int | None:
    """The validation whose weights were kept: the last one marked so, else the highest mean."""
    marked = [i for i, record in enumerate(val) if record.get("best")]
    means = [_nan(record["mean"]) for record in val]
    if not marked and np.isfinite(means).any():
        marked = [int(np.nanargmax(means))]
    return marked[-1] if marked else None


def _smoothed(ax: Axes, steps: Sequence[float], values: Sequence[float], hue: str, name: str) -> None:
    window = max(1, len(values) // 25)
    ax.plot(steps, values, color=hue, alpha=0.25, linewidth=1)
    if values:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], smooth, color=hue, label=name)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


@rc_context(STYLE)
def anchor_weights(logs: Logs) -> Figure | None:
    """The anchor's weight of every sequence over training, one panel per aligned level; dashes mark 1/M.

    None where no record carries weights. Folds share a sequence's colour.
    """
    records = {name: [r for r in log if r["kind"] == "train" and r.get("weights")] for name, log in logs.items()}
    levels = sorted({level for log in records.values() for record in log for level in record["weights"]})
    if not levels:
        return None
    fig = Figure(figsize=(max(9.0, 4.6 * len(levels) + 1), 4.0), layout="constrained")
    for ax, level in zip(fig.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        series = [
            (
                [r["step"] for r in log if level in r["weights"]],
                [r["weights"][level] for r in log if level in r["weights"]],
            )
            for log in records.values()
        ]
        names = list(dict.fromkeys(name for _, weights in series for row in weights for name in row))
        for j, name in enumerate(names):
            for steps, weights in series:
                curve = [row.get(name, np.nan) for row in weights]
                every = max(1, len(steps) // 8)
                ax.plot(steps, curve, color=HUES[j % 8], marker=MARKERS[j % 8], markevery=(j * every // 4, every))
        uniform = 1 / len(names)
        spread = np.nanmax([abs(w - uniform) for _, weights in series for row in weights for w in row.values()])
        reach = max(1.25 * spread, 0.3 * uniform)
        ax.axhline(uniform, color=INK, linestyle=(0, (4, 3)), linewidth=1.3)
        ax.set(title=f"Level {level}", xlabel="optimiser step", ylabel="weight in the anchor (no unit)")
        ax.set_ylim(uniform - reach, uniform + reach)
    keys = [Line2D([], [], color=HUES[j % 8], marker=MARKERS[j % 8], label=label(n)) for j, n in enumerate(names)]
    keys.append(Line2D([], [], color=INK, linestyle=(0, (4, 3)), linewidth=1.3, label=f"1/{len(names)}"))
    fig.legend(handles=keys, loc="outside right upper")
    return fig
