"""What happened during training: loss and validation curves, what alignment did, and the weights of the anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
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
        _log_scale(left)
    left.set(title="Training loss", xlabel="optimiser step", ylabel="loss (no unit)")
    right.set(title="Validation", xlabel="optimiser step", ylabel="Dice, mean over regions", ylim=(0, 1))
    right.legend(lines, ["mean over all subsets (★ best)", "all sequences given"], loc="lower right")
    if len(logs) > 1 and positive:
        left.legend(loc="upper right", ncols=1 + len(logs) // 6)
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    return fig


def _log_scale(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


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
def alignment_effect(logs: Logs) -> Figure | None:
    """Over the validations: modality gap, standard deviation and effective rank of the latents, Dice full and missing.

    logs: {run or fold: records {"kind": "val", step, latents: {level: {std, std_min, rank[, gap, chance]}}[, full,
          missing]}, {"kind": "train", step[, latents]} and {"kind": "warning", step}}. Folds share a level's colour.

    None where no validation measured latents.
    """
    measured = [record for log in logs.values() for record in log if record["kind"] == "val" and record.get("latents")]
    levels = list(dict.fromkeys(level for record in measured for level in record["latents"]))
    if not levels:
        return None
    fig = Figure(figsize=(11, 7.6), layout="constrained")
    (gap, std), (rank, dice) = fig.subplots(2, 2)
    looks = [{"color": HUES[i % 8], "marker": MARKERS[i % 8]} for i in range(len(levels))]
    keys = [Line2D([], [], label=f"level {level}", **look) for level, look in zip(levels, looks, strict=True)]
    for log, (level, look) in product(logs.values(), zip(levels, looks, strict=True)):
        val, train = _series(log, "val", level), _series(log, "train", level)
        _over(gap, val, "gap", **look)
        _over(gap, val, "chance", color=INK, linestyle=DOTS, linewidth=1.3)
        _over(std, val, "std_min", color=look["color"], linestyle=DASHES)
        for ax, name in ((std, "std"), (rank, "rank")):
            _over(ax, train, name, color=look["color"], alpha=0.3, linewidth=1)
            _over(ax, val, name, **look)
    gap.set(title="Gap between sequences (dots: by chance)", ylabel="share of variance", ylim=(0, 1.03))
    std.set(title="Spread within a sequence (dashed: least)", ylabel="standard deviation")
    rank.set(title="Directions in use", ylabel="effective rank")
    for ax in (std, rank):
        _log_scale(ax)
    _full_and_missing(dice, logs)
    named = {record["step"] for log in logs.values() for record in log if record["kind"] == "warning"}
    for ax, step in product((gap, std, rank, dice), named):
        ax.axvline(step, color=INK, linestyle=LONG, linewidth=1.2, zorder=0)
    if named:
        keys.append(Line2D([], [], color=INK, linestyle=LONG, linewidth=1.2, label="over-alignment was named"))
    for ax in (gap, std, rank, dice):
        ax.set_xlim(left=0)
        ax.set_xlabel("optimiser step")
        ax.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    fig.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return fig


DASHES, DOTS, LONG = (0, (2, 1.5)), (0, (1, 1.5)), (0, (6, 2, 1, 2))


def _series(log: Sequence[Mapping[str, Any]], kind: str, level: str) -> list[Mapping[str, Any]]:
    """What a level's latents were like, with the step, in the records of a kind."""
    found = [record for record in log if record["kind"] == kind and level in record.get("latents", {})]
    return [{"step": record["step"], **record["latents"][level]} for record in found]


def _over(ax: Axes, records: Sequence[Mapping[str, Any]], name: str, **look: Any) -> None:
    ax.plot([record["step"] for record in records], [_nan(record.get(name)) for record in records], **look)


def _full_and_missing(ax: Axes, logs: Logs) -> None:
    looks = {"full": {"color": INK, "marker": "o"}, "missing": {"color": "#8a8a8a", "marker": "s", "linestyle": DASHES}}
    for log, (name, look) in product(logs.values(), looks.items()):
        _over(ax, [record for record in log if record["kind"] == "val"], name, **look)
    ax.set(title="Dice", ylabel="Dice, mean over regions", ylim=(0, 1))
    if any("full" in record for log in logs.values() for record in log):
        keys = [Line2D([], [], **look) for look in looks.values()]
        ax.legend(keys, ["all sequences given", "some missing (mean)"], loc="best")
    else:
        ax.text(0.5, 0.5, "no validation patient\nhas every sequence", ha="center", va="center", transform=ax.transAxes)


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
