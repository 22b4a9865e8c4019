"""Views of results that several studies show: along an axis, and over the steps of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from medmap.core.stats import paired_difference
from medmap.evidence.findings import MEAN, Outcome, Table, effect, level, table
from medmap.evidence.plan import ALL, FULL, MISSING, SINGLE, Arm
from medmap.evidence.results import LEAK, Result, Results
from medmap.figures.evidence import along, weight_panels
from medmap.figures.latents import latent_map


def levels_along(results: Results, shown: Mapping[str, Outcome]) -> Figure:
    """Several outcomes of the arms that stand on the axis."""
    curves = {
        name: [{"at": arm.at, **vars(level(results, arm, outcome))} for arm in results.arms() if arm.at is not None]
        for name, outcome in shown.items()
    }
    return along(curves, results.study.axis, "Dice in percent, mean of the regions")


def effects_along(results: Results) -> Figure:
    """What the arms with an opponent gain, at their places on the axis: over all subsets, and at its two ends."""
    there = {arm.name for arm in results.arms()}
    arms = [arm for arm in results.arms() if arm.at is not None and arm.against in there]
    curves = {group: [{"at": arm.at, **_gain(results, arm, group)} for arm in arms] for group in (ALL, FULL, MISSING)}
    return along(curves, results.study.axis, "gain in points of Dice, mean of the regions", "no effect")


def _gain(results: Results, arm: Arm, group: str) -> dict[str, Any]:
    return vars(effect(results, arm.name, arm.against, Outcome("test", group, MEAN)).difference)


def gain_at_ends(results: Results) -> list[str]:
    """Whether what an arm gains differs between the two ends of the axis: a difference of differences, case by case.

        δ = (arm − its opponent) at the last place − (arm − its opponent) at the first

    A sentence with its interval over patients and runs (`paired_difference`); none before both ends are there.
    """
    there = {arm.name for arm in results.arms()}
    arms = [arm for arm in results.arms() if arm.at is not None and arm.against in there]
    if len(arms) < 2:
        return []
    ends = [arms[-1], arms[0]]
    (last, cases, patients), (first, others, _) = (_gains(results, arm) for arm in ends)
    if cases != others:
        return []
    d = paired_difference(last, first, patients)
    names = [arm.name.removesuffix(f", {arm.series}") for arm in ends]
    said = f"What {ends[0].series} brings at {names[0]} less what it brings at {names[1]}: {d.mean:+.1f} points"
    if not np.isfinite(d.low):
        return [f"{said}; without an interval: not evidence."]
    seen = "it depends" if d.low > 0 or d.high < 0 else "no dependence was seen"
    caution = "" if d.evidence else " Fewer than three runs: not evidence."
    runs = f"{d.seeds[0]} and {d.seeds[1]} runs, {d.patients} cases, p = {d.p:.3f}"
    return [f"{said} [{d.low:.1f}, {d.high:.1f}] ({runs}): {seen}.{caution}"]


def _gains(results: Results, arm: Arm) -> Table:
    """What each run of an arm gains over the run of its opponent with the same seed; cases by name."""
    with_it, without = (
        table(results.finished(name), Outcome("test", results.study.group, MEAN)) for name in (arm.name, arm.against)
    )
    seeds = min(with_it.values.shape[1], without.values.shape[1])
    cases = sorted(with_it.cases)
    ours, theirs = ([each.cases.index(case) for case in cases] for each in (with_it, without))
    gains = with_it.values[ours, :seeds] - without.values[theirs, :seeds]
    return Table(gains, cases, [with_it.patients[i] for i in ours])


def weights_over_steps(results: Results) -> Figure:
    """Weights of the anchor over training, every seed of every arm that has any."""
    panels = {
        arm.name: [
            [{"step": row["step"], "weights": _of_level(row)} for row in folds[0].facts["weights"]]
            for folds in results.finished(arm.name)
        ]
        for arm in results.arms()
        if results.finished(arm.name)[0][0].facts.get("weights")
    }
    return weight_panels(panels)


def _of_level(row: Mapping[str, Any]) -> Mapping[str, float]:
    """The weights of the first aligned level."""
    return next(value for key, value in row.items() if key != "step")


def last_weights(results: Results) -> Iterator[str]:
    """A table of the weights at the end of training, and how far the farthest is from 1/M."""
    yield "Weights at the end of training, every seed; *distance*: the largest |w − 1/M|."
    yield ""
    yield "| | distance | weights |"
    yield "|---|---|---|"
    for arm in results.arms():
        ends = [folds[0].facts["weights"][-1] for folds in results.finished(arm.name) if folds[0].facts.get("weights")]
        weights = [list(_of_level(end).values()) for end in ends]
        if weights:
            distance = np.abs(np.array(weights) - 1 / len(weights[0])).max()
            cells = "; ".join(" ".join(f"{w:.2f}" for w in row) for row in weights)
            yield f"| {arm.name} | {distance:.3f} | {cells} |"


def latent_table(results: Results) -> Iterator[str]:
    """What training made of the latents, means over the seeds: the deepest or the first aligned level of each arm."""
    yield (
        "Latents of test patients ([what the numbers are](../theory.md)): before → after training, means of the runs "
        "(least … largest of them), at the level that an arm aligns (the first of several), at the deepest without one."
    )
    yield ""
    yield from _latent_rows([(arm.name, _levels_of(results, arm, None)) for arm in results.arms()])


def latent_tables(results: Results) -> Iterator[str]:
    """The same of every level that all arms have, the deepest first."""
    arms = results.arms()
    runs = [run for arm in arms for run in _first_folds(results, arm)]
    there = [set(run.facts.get("latents", {}).get("levels", {})) for run in runs]
    for name in sorted(set.intersection(*there), reverse=True) if there else ():
        yield (
            f"Latents of test patients at {name} ([what the numbers are](../theory.md)): before → after training, "
            "means of the runs (least … largest of them)."
        )
        yield ""
        yield from _latent_rows([(arm.name, _levels_of(results, arm, name)) for arm in arms])
        yield ""


def _latent_rows(found: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Iterator[str]:
    yield f"| | {' | '.join(NUMBERS)} |"
    yield "|---|" + "---|" * len(NUMBERS)
    for name, levels in found:
        if levels:
            cells = (
                f"{_number(before)} → {_number(after)}{_range(after)}"
                for before, after in (
                    [[_at(level[when], *path) for level in levels] for when in ("before", "after")]
                    for path in NUMBERS.values()
                )
            )
            yield f"| {name} | {' | '.join(cells)} |"


def _first_folds(results: Results, arm: Arm) -> list[Result]:
    return [folds[0] for folds in results.finished(arm.name)]


def _levels_of(results: Results, arm: Arm, name: str | None) -> list[Mapping[str, Any]]:
    """Numbers on one level of every run of an arm; of its first one where none is named."""
    runs = _first_folds(results, arm)
    if name is None:
        return [first for run in runs for first in _first_level(run)]
    every = (run.facts.get("latents", {}).get("levels", {}) for run in runs)
    return [levels[name] for levels in every if name in levels]


def latents_along(results: Results, path: tuple[str, ...], what: str) -> Figure:
    """A number on the latents of every arm along the axis: mean, least and largest over its runs."""
    curves: dict[str, list[dict[str, float]]] = {}
    for arm in (arm for arm in results.arms() if arm.at is not None):
        values = np.array([latent_value(folds[0], *path) for folds in results.finished(arm.name)])
        if np.isfinite(values).any():
            point = {"mean": np.nanmean(values), "low": np.nanmin(values), "high": np.nanmax(values)}
            curves.setdefault(arm.series, []).append({"at": arm.at or 0.0, **point})
    return along(curves, results.study.axis, f"{what}\n(mean, least and largest of the runs)") if curves else Figure()


def cost_table(results: Results) -> Iterator[str]:
    """What each arm takes: parameters, seconds of a training step, of one core where the runs had one, and memory."""
    yield "| | parameters, M | s a step | peak memory of a run, GB |"
    yield "|---|---|---|---|"
    for arm in results.arms():
        runs = [folds[0] for folds in results.finished(arm.name)]
        step = np.median([run.facts["seconds"]["train"] / run.trial.config.train.steps for run in runs])
        peak = np.median([run.facts.get("peak_gb", np.nan) for run in runs])
        yield f"| {arm.name} | {runs[0].facts['parameters'] / 1e6:.2f} | {step:.2f} | {peak:.1f} |"


def total_correlations(results: Results) -> Iterator[str]:
    """Total correlation of the aggregate latents, every run with its interval over patients."""
    yield "| | total correlation of every run, nats [95 % over patients] | null, nats | conditional |"
    yield "|---|---|---|---|"
    for arm in results.arms():
        found = [
            level["after"]["total_correlation"] for f in results.finished(arm.name) for level in _first_level(f[0])
        ]
        there = [one for one in found if one is not None]
        if there:
            cells = "; ".join("{} [{}, {}]".format(*(_nats(one[k]) for k in ("nats", "low", "high"))) for one in there)
            null = np.mean([one["null_mean"] for one in there if one["null_mean"] is not None])
            given = [f[0].facts["latents"]["conditional"] for f in results.finished(arm.name)]
            nats = max((abs(one["nats"]) for one in given if one["nats"] is not None), default=float("nan"))
            private = "private" if all(one["private"] for one in given) else "not private"
            yield f"| {arm.name} | {cells} | {null:.1f} | {nats:.1g}, encoders are {private} |"


def _nats(value: float | None) -> str:
    """A dash where latents have no density, and so no number."""
    return "–" if value is None else f"{value:.1f}"


def leak_lines(results: Results) -> Iterator[str]:
    """What arms with a leaking T score as the published form is scored, beside what they reach."""
    for arm in results.arms():
        if not any(row.set == LEAK for row in results.finished(arm.name)[0][0].rows):
            continue
        for group in (ALL, SINGLE):
            seen, true = (level(results, arm, Outcome(name, group, MEAN)).mean for name in (LEAK, "test"))
            yield (
                f"* {arm.name}: {group} {seen:.1f} where T sees the dropped images, {true:.1f} where they are absent: "
                f"{seen - true:+.1f} points are a leak."
            )


def map_of(arm: str) -> Callable[[Results], Figure]:
    """A function that draws where the latents of an arm lie, before and after training (its first seed)."""

    def draw(results: Results) -> Figure:
        first = next((folds[0] for folds in results.finished(arm) if "rows" in folds[0].facts.get("latents", {})), None)
        if first is None:
            return Figure()
        latents = first.facts["latents"]
        return latent_map(latents, next(iter(latents["levels"])))

    return draw


NUMBERS = {
    "gap": ("gap", "share"),
    "KL between modalities, nats a channel": ("kl", "mean"),
    "MMD": ("mmd", "mean"),
    "cosine, same patient": ("likeness", "matched"),
    "cosine, same modality": ("likeness", "shuffled"),
    "a modality is guessed": ("probe", "accuracy"),
    "a patient is found": ("retrieval", "accuracy"),
    "effective rank": ("rank", "effective"),
    "variance": ("variance", "mean"),
    "total correlation, nats": ("total_correlation", "nats"),
}
"""Columns of a table of latents, and where they stand in `medmap.latentspace.level_numbers`."""


def latent_value(result: Result, *path: str) -> float:
    """One number on the latents of a run, after training; NaN where it was not measured."""
    return next((_at(level["after"], *path) for level in _first_level(result)), float("nan"))


def _first_level(result: Result) -> list[Mapping[str, Any]]:
    return list(result.facts.get("latents", {}).get("levels", {}).values())[:1]


def _at(numbers: Mapping[str, Any], *path: str) -> float:
    value: Any = numbers
    for key in path:
        value = None if value is None else value.get(key)
    return float("nan") if value is None else float(value)


def _number(values: Sequence[float]) -> str:
    there = [value for value in values if np.isfinite(value)]
    return f"{np.mean(there):.2g}" if there else "–"


def _range(values: Sequence[float]) -> str:
    there = [value for value in values if np.isfinite(value)]
    return f" ({min(there):.2g} … {max(there):.2g})" if len(there) > 1 else ""
