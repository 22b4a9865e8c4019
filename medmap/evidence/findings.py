"""From results to sentences: paired differences with intervals, a verdict computed from them, tables.

Every number is in points of Dice (percent), every interval of a difference is over patients and runs
(`medmap.core.stats`). A verdict speaks of the *outcome* alone, the mean over all subsets and regions, corrected after
Holm over the arms and test sets that the study has when it is finished. What else is tabled describes, and is not
corrected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medmap.core.stats import Difference, Interval, bootstrap_interval, holm, paired_difference
from medmap.core.witnesses import CLEANED
from medmap.errors import InputError
from medmap.evidence.plan import ALL, FULL, MISSING, SINGLE, Arm, Phantoms, Study
from medmap.evidence.results import DIVERGED, FINISHED, LEAK, Result, Results
from medmap.scores import subset_groups

MEAN = "mean"
"""In place of a region: the mean over all of them."""

ALPHA = 0.05
"""Below this a corrected p counts."""


class Outcome(NamedTuple):
    """A number per patient: the mean over a group of subsets, of one region or all."""

    set: str
    group: str
    region: str


@dataclass(frozen=True)
class Effect:
    """Arm − the arm it is compared with, of one outcome."""

    arm: str
    against: str
    outcome: Outcome
    difference: Difference
    p_holm: float = float("nan")


def groups(rows: Sequence[Any]) -> dict[str, list[str]]:
    """{group: its subsets} of a table: all, with and without contrast agent, single ones, everything, the rest."""
    subsets = list(dict.fromkeys(subset for row in rows for subset, _ in row.dice))
    sizes = {subset: subset.count("+") for subset in subsets}
    full = [subset for subset in subsets if sizes[subset] == max(sizes.values())]
    found = {**subset_groups(subsets), SINGLE: [s for s in subsets if not sizes[s]], FULL: full[:1]}
    return {**found, MISSING: [subset for subset in subsets if subset not in full[:1]]}


class Table(NamedTuple):
    """Values Float64[P S] of P test cases and S seeds, with the cases' names and their patients'."""

    values: NDArray[Any]
    cases: list[str]
    patients: list[str]


def table(seeds: Sequence[Sequence[Result]], outcome: Outcome, having: bool = False) -> Table:
    """One outcome of every test case and seed; a case that several folds were tested on has their mean.

    having: only cases that have the region; a case's number is NaN where it lacks a subset of the group, or (for all
            cases, under the rule for empty regions) never
    """
    columns: list[dict[str, float]] = []
    patients: dict[str, str] = {}
    for folds in seeds:
        rows = [row for result in folds for row in result.rows if row.set == outcome.set]
        subsets = groups(rows).get(outcome.group, [outcome.group]) if rows else []  # a subset is a group of its own
        wanted = _regions(rows) if outcome.region == MEAN else [outcome.region]
        column: dict[str, list[float]] = {}
        for row in rows:
            there = [r for r in wanted if not having or r.removesuffix(CLEANED) in row.present]
            dice = [row.dice.get((subset, region), np.nan) for subset in subsets for region in there]
            column.setdefault(row.case, []).append(float(np.mean(dice)) if dice else np.nan)
            patients[row.case] = row.patient
        columns.append({case: float(np.mean(folds)) for case, folds in column.items()})
    cases = list(patients)
    values = np.array([[column.get(case, np.nan) for column in columns] for case in cases], dtype=float)
    return Table(values.reshape(len(cases), len(columns)), cases, list(patients.values()))


def _regions(rows: Sequence[Any], cleaned: bool = False) -> list[str]:
    """Regions of a table. Those that were cleaned have no part in a mean over regions."""
    found = dict.fromkeys(region for row in rows for _, region in row.dice)
    return [region for region in found if cleaned or not region.endswith(CLEANED)]


def level(results: Results, arm: Arm, outcome: Outcome, having: bool = False) -> Interval:
    """Mean of an arm over patients and seeds, with an interval over patients."""
    found = table(results.finished(arm.name), outcome, having)
    return bootstrap_interval(found.values.mean(axis=1) if found.values.size else np.array([]), found.patients)


def effect(results: Results, arm: str, against: str, outcome: Outcome) -> Effect:
    """What an arm changes, case by case. Seeds of either arm that did not finish are left out.

    Raises InputError where the arms were tested on different cases.
    """
    a, b = (table(results.finished(name), outcome) for name in (arm, against))
    strange = sorted(set(a.cases) ^ set(b.cases))
    if strange:
        raise InputError(
            f"{results.study.name}: {arm} and {against} were tested on different cases of {outcome.set}, such as "
            f"{', '.join(strange[:3])}; the data changed between their runs. Run both again, with another folder (-o)"
        )
    second = b.values[[b.cases.index(case) for case in a.cases]]
    return Effect(arm, against, outcome, paired_difference(a.values, second, a.patients))


def tested(results: Results, arm: str) -> list[str]:
    """The sets that an arm's runs were tested on."""
    rows = (row for folds in results.finished(arm)[:1] for result in folds for row in result.rows)
    return list(dict.fromkeys(row.set for row in rows))


def outcomes(results: Results) -> list[Outcome]:
    """Everything that is tabled: of every test set, every group, of every region and their mean."""
    found: dict[Outcome, None] = {}
    for arm in results.arms():
        rows = [row for result in results.finished(arm.name)[0] for row in result.rows if row.set != LEAK]
        for name in dict.fromkeys(row.set for row in rows):
            here = [row for row in rows if row.set == name]
            regions = (MEAN, *_regions(here, cleaned=True))
            found |= dict.fromkeys(Outcome(name, group, region) for group in groups(here) for region in regions)
    return list(found)


def effects(results: Results, asked: Sequence[Outcome] | None = None) -> list[Effect]:
    """Of every pair of arms, for the outcomes asked for (or all).

    Holm over all of these, also those that are still to be run: no p counts for more because others are not there yet.
    """
    sets = {arm.name: tested(results, arm.name) for arm in results.arms()}
    asked = outcomes(results) if asked is None else asked
    planned = {pair: _planned(results.study, pair) for pair in results.study.pairs()}
    wanted = [(pair, o) for o in asked for pair, names in planned.items() if o.set in names]
    there = [(pair, o) for pair, o in wanted if all(o.set in sets.get(name, ()) for name in pair)]
    found = [effect(results, *pair, o) for pair, o in there]
    each = Counter(o.set for o in asked)  # of a set that nobody was tested on yet as much is asked as of the others
    unseen = sum(len(names - each.keys()) for names in planned.values()) * max(each.values(), default=0)
    to_come = len(wanted) - len(there) + unseen
    to_come += sum(np.isnan(e.difference.p) and _several(results, e) for e in found)
    adjusted = holm([*(one.difference.p for one in found), *[1.0] * to_come])[: len(found)]
    return [Effect(e.arm, e.against, e.outcome, e.difference, float(p)) for e, p in zip(found, adjusted, strict=True)]


def _planned(study: Study, pair: tuple[str, str]) -> set[str]:
    """The sets that both arms of a pair are tested on."""
    data = [study.data_of(arm) for arm in study.arms if arm.name in pair]
    return set.intersection(*({"test", *(other.name for other in one.others)} for one in data))


def _several(results: Results, found: Effect) -> bool:
    """Whether both arms will have runs enough for a p."""
    return min(len(results.found[name]) for name in (found.arm, found.against)) > 1


def main_effects(results: Results) -> list[Effect]:
    """Those that verdicts speak of: the study's group and the mean over regions, on every test set."""
    return effects(results, [o for o in outcomes(results) if (o.group, o.region) == (results.study.group, MEAN)])


def verdict(found: Effect) -> str:
    """One sentence that follows from the interval and from nothing else.

    >>> d = Difference(1.3, 0.6, 2.1, 0.01, 60, (3, 3), 0, True)
    >>> verdict(Effect("P*", "none", Outcome("test", ALL, MEAN), d, 0.02))
    'P* raises the mean of all subsets by 1.3 points [0.6, 2.1] over none (3 and 3 runs, 60 cases, Holm p = 0.020).'
    """
    d, where = found.difference, "" if found.outcome.set == "test" else f" on {found.outcome.set}"
    what = f"the mean of {found.outcome.group}{where}"
    who = f"{d.seeds[0]} and {d.seeds[1]} runs, {d.patients} cases"
    if not np.isfinite(d.low):
        return (
            f"{found.arm} − {found.against}: {d.mean:+.1f} points of {what} ({who}); without an interval: not evidence."
        )
    interval, who = f"[{d.low:.1f}, {d.high:.1f}]", f"{who}, Holm p = {found.p_holm:.3f}"
    caution = "" if d.evidence else " Fewer than three runs: not evidence."
    if (d.low > 0 or d.high < 0) and found.p_holm < ALPHA:
        verb, size = ("raises", interval) if d.low > 0 else ("lowers", f"[{-d.high:.1f}, {-d.low:.1f}]")
        by = f"{abs(d.mean):.1f} points {size} over {found.against}"
        return f"{found.arm} {verb} {what} by {by} ({who}).{caution}"
    if d.low > 0 or d.high < 0:
        many = "but not beyond what so many comparisons would show by chance"
        return (
            f"{found.arm} against {found.against}: {d.mean:+.1f} points of {what} {interval}, {many} ({who}).{caution}"
        )
    reach = max(abs(d.low), abs(d.high))
    return (
        f"{found.arm} against {found.against}: no effect larger than ±{reach:.1f} points of {what} was seen, "
        f"{d.mean:+.1f} {interval} ({who}).{caution}"
    )


# ---- the page ----------------------------------------------------------------------------------------------------


def page(results: Results, command: str, pictures: Sequence[tuple[str, str]]) -> str:
    """A study's page in Markdown: question, verdict, figures (file, title), tables, how to run it again."""
    study = results.study
    lines = [
        f"# {study.name}",
        "",
        f"**{study.asks}**",
        "",
        study.about.strip(),
        "",
        *_setting(study),
        "",
        *_state(results),
        "",
    ]
    sets = list(dict.fromkeys(outcome.set for outcome in outcomes(results)))
    verdicts = [f"* {verdict(found)}" for found in main_effects(results)]
    lines += [*verdicts, ""] if verdicts else []
    if study.more is not None and results.arms():
        lines += [*study.more(results), ""]
    for picture, title in pictures:
        lines += [f"![{title}]({picture})", ""]
    for name in sets:
        lines += [*_levels(results, name), "", *_differences(results, name), ""]
    return "\n".join([*lines, "```sh", command, "```", ""])


def _setting(study: Study) -> Iterator[str]:
    """On whom, and with which recipe."""
    data = study.data
    if isinstance(data, Phantoms):
        parts = f"{data.train} to learn from, {data.val} to choose checkpoints by, {data.test} to be tested on"
        whom = f"Simulated patients ({data.name}), {data.settings.spacing_mm:g} mm: {parts}"
    else:
        grid = "" if data.spacing_mm is None else f" at {data.spacing_mm:g} mm"
        whom = f"Patients ({data.name}){grid}, {'one split' if data.folds == 1 else f'{data.folds} folds'}"
    other = "; some arms have other data, as their names say" if any(arm.data for arm in study.arms) else ""
    recipe = f" Every run, unless its arm says otherwise: `{' '.join(study.recipe)}`." if study.recipe else ""
    yield f"{whom}{other}.{recipe}"


def _state(results: Results) -> Iterator[str]:
    total, done, diverged = results.count(), results.count(FINISHED), results.count(DIVERGED)
    if done + diverged < total:
        yield f"*Unfinished: {done} of {total} runs are done.* What follows is from those."
    else:
        yield f"All {total} runs are done."
    if diverged:
        yield f"{diverged} runs diverged and have no score."


def _levels(results: Results, name: str) -> Iterator[str]:
    """Dice of every arm, over all patients, and over those who have the region."""
    here = [o for o in outcomes(results) if o.set == name]
    regions = [region for region in dict.fromkeys(o.region for o in here) if region != MEAN]
    shown = [g for g in dict.fromkeys(o.group for o in here) if g != MISSING]
    arms = [arm for arm in results.arms() if name in tested(results, arm.name)]
    most = max((_answered(results, arm, name) for arm in arms), default=0)
    yield (
        f"Dice on {name}, percent, means over patients and runs: {' / '.join(regions)}. *Mean*: of the regions and "
        f"{results.study.group}, with its 95 % interval over patients. *Validation*: the mean over all subsets and "
        "regions of the validation patients, by which arms are chosen."
    )
    yield ""
    yield "| | runs | validation | mean | " + " | ".join(shown) + " | all subsets, those who have the region |"
    yield "|---|---|---|---|" + "---|" * (len(shown) + 1)
    for arm in arms:
        cells = [_cell(results, arm, [Outcome(name, group, region) for region in regions]) for group in shown]
        having = _cell(results, arm, [Outcome(name, ALL, region) for region in regions], having=True)
        mean = level(results, arm, Outcome(name, results.study.group, MEAN))
        answered = _answered(results, arm, name)
        called = arm.name if answered == most else f"{arm.name} ({answered} of {most} subsets)"
        best = validated(results, arm)
        runs = f"{len(results.finished(arm.name))} | {f'{best:.1f}' if np.isfinite(best) else '–'}"
        within = f"{mean.mean:.1f} [{mean.low:.1f}, {mean.high:.1f}]"
        yield f"| {called} | {runs} | {within} | {' | '.join(cells)} | {having} |"


def _answered(results: Results, arm: Arm, set_name: str) -> int:
    """How many subsets an arm's network answers."""
    rows = (row for result in results.finished(arm.name)[0] for row in result.rows if row.set == set_name)
    return len({subset for row in rows for subset, _ in row.dice})


def validated(results: Results, arm: Arm) -> float:
    """Dice on validation patients, mean over subsets and regions, of the checkpoints that were kept."""
    runs = [result for folds in results.finished(arm.name) for result in folds]
    best = [max((row["mean"] for row in run.facts.get("validation", [])), default=np.nan) for run in runs]
    return float(100 * np.mean(best))


def _cell(results: Results, arm: Arm, asked: Sequence[Outcome], having: bool = False) -> str:
    return " / ".join(f"{level(results, arm, outcome, having).mean:.1f}" for outcome in asked)


def _differences(results: Results, name: str) -> Iterator[str]:
    """Every arm against its opponent, for the groups and regions."""
    asked = [o for o in outcomes(results) if o.set == name and o.group != MISSING]
    found = effects(results, asked)
    if not found:
        return
    shown = list(dict.fromkeys((o.group, o.region) for o in asked if o.region == MEAN or o.group == ALL))
    heads = [region if group == ALL and region != MEAN else group for group, region in shown]
    yield "Differences in points [95 % over patients and runs], not corrected for their number."
    yield ""
    yield "| arm − against | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * len(heads)
    for arm in dict.fromkeys((e.arm, e.against) for e in found):
        cells = {(e.outcome.group, e.outcome.region): e for e in found if (e.arm, e.against) == arm}
        yield f"| {arm[0]} − {arm[1]} | " + " | ".join(_difference(cells[key]) for key in shown) + " |"


def _difference(found: Effect) -> str:
    d = found.difference
    if not np.isfinite(d.mean):
        return "–"
    interval = f" [{d.low:+.1f}, {d.high:+.1f}]" if np.isfinite(d.low) else ""
    return f"{d.mean:+.1f}{interval}"


def plain(results: Results) -> dict[str, Any]:
    """Everything that was found, for JSON."""
    asked = outcomes(results)
    return {
        "study": results.study.name,
        "runs": {"needed": results.count(), FINISHED: results.count(FINISHED), DIVERGED: results.count(DIVERGED)},
        "levels": [
            {"arm": arm.name, **outcome._asdict(), **asdict(level(results, arm, outcome))}
            for arm in results.arms()
            for outcome in asked
            if outcome.set in tested(results, arm.name)
        ],
        "effects": [
            {"arm": e.arm, "against": e.against, **e.outcome._asdict(), **asdict(e.difference), "p_holm": e.p_holm}
            for e in effects(results)
        ],
        "verdicts": [verdict(e) for e in main_effects(results)],
    }
