"""The table that papers print: a row a subset of sequences, a column a method, in Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medmap.core.modality import ModalitySet
from medmap.evidence.findings import Outcome, table
from medmap.evidence.results import Results
from medmap.figures.subsets import order_subsets

GIVEN, MISSING = "●", "○"
LATEX = {GIVEN: r"$\bullet$", MISSING: r"$\circ$"}


def subset_rows(results: Results, set_name: str) -> tuple[list[str], list[list[str]]]:
    """Head and cells: for every subset what is given, then mean Dice of each region and arm.

    Rows are in the order of the field's 15-row table.

    The last row is the mean over the rows above it. A region's best arm of a row is not marked: with an interval as
    wide as the differences it would say nothing.
    """
    arms = results.arms()
    if not arms:
        return [], []
    runs = [
        result for arm in arms for result in results.finished(arm.name)[0]
    ]  # PMKL's answer fewer subsets than others
    rows = [row for result in runs for row in result.rows if row.set == set_name]
    subsets = list(dict.fromkeys(subset for row in rows for subset, _ in row.dice))
    regions = list(dict.fromkeys(region for row in rows for _, region in row.dice))
    names = ModalitySet(tuple(max(subsets, key=lambda subset: subset.count("+")).split("+")))
    places = {frozenset(subset.split("+")): subset for subset in subsets}
    subsets = [places[subset] for subset in order_subsets(tuple(names)) if subset in places]
    means = np.array(
        [
            [[_mean(results, arm.name, set_name, subset, region) for arm in arms] for region in regions]
            for subset in subsets
        ]
    )
    head = [*names, *(f"{region} {arm.name}" for region in regions for arm in arms)]
    cells = []
    for subset, values in zip(subsets, means, strict=True):
        given = [GIVEN if name in subset.split("+") else MISSING for name in names]
        cells.append([*given, *map(_shown, values.ravel())])
    average = list(map(_shown, means.mean(axis=0).ravel()))
    return head, [*cells, ["mean", *[""] * (len(names) - 1), *average]]


def _mean(results: Results, arm: str, set_name: str, subset: str, region: str) -> float:
    values = table(results.finished(arm), Outcome(set_name, subset, region)).values
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _shown(value: float) -> str:
    """A dash where a network answers no such subset, and so has no mean over all."""
    return f"{value:.1f}" if np.isfinite(value) else "–"


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """As GitHub renders it."""
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A tabular with booktabs rules; the last row stands apart."""
    lines = [[LATEX.get(cell, cell.replace("_", r"\_").replace("%", r"\%")) for cell in line] for line in cells]
    body = [" & ".join(line) + r" \\" for line in lines]
    columns = "c" * sum(" " not in name for name in head) + "r" * sum(" " in name for name in head)
    title = " & ".join(name.replace("_", r"\_") for name in head) + r" \\"
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", title, r"\midrule"]
    return "\n".join([*top, *body[:-1], r"\midrule", body[-1], r"\bottomrule", r"\end{tabular}", ""])
