"""What a study leaves in its folder: NAME.md, NAME.json and figures, made anew from the results that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from matplotlib.figure import Figure

from medmap.evidence.findings import MEAN, Outcome, effects, level, outcomes, page, plain, tested
from medmap.evidence.results import Results
from medmap.evidence.tables import latex, markdown, subset_rows
from medmap.figures.evidence import along, forest
from medmap.run import write_text
from medmap.scores import without_nan


def write_pages(results: Results, out: Path, command: str) -> Path:
    """Write everything a study found so far and return the page."""
    out.mkdir(parents=True, exist_ok=True)
    name, pictures = results.study.name, []
    for suffix, title, figure in _figures(results):
        file = out / f"{name}{suffix}.png"
        figure.savefig(file, dpi=110)
        pictures.append((file.name, title))
    write_text(out / f"{name}.json", json.dumps(without_nan(plain(results)), indent=1, ensure_ascii=False) + "\n")
    text = page(results, command, pictures)
    if results.study.by_subset and results.arms():
        for number, set_name in enumerate(_sets(results)):
            head, cells = subset_rows(results, set_name)
            text += f"\n## Every subset, {set_name}\n\n{markdown(head, cells)}\n"
            write_text(out / f"{name}{f'-{_file(set_name)}' if number else ''}.tex", latex(head, cells))
    write_text(out / f"{name}.md", text)
    return out / f"{name}.md"


def _sets(results: Results) -> list[str]:
    """Names of the test data."""
    return list(dict.fromkeys(outcome.set for outcome in outcomes(results)))


def _figures(results: Results) -> list[tuple[str, str, Figure]]:
    """(end of the file's name, what it shows, the figure)."""
    study, found = results.study, []
    for number, name in enumerate(_sets(results)):
        suffix, group = f"-{_file(name)}" if number else "", study.group
        everything = [o for o in outcomes(results) if o.set == name and o.group == group]
        records = [
            {"arm": e.arm, "against": e.against, "region": e.outcome.region, **vars(e.difference)}
            for e in effects(results, everything)
        ]
        if records:
            found.append((suffix, f"Differences on {name}, mean of {group}", forest(records, f"mean of {group}")))
        curves: dict[str, list[dict[str, float]]] = {}
        for arm in (arm for arm in results.arms() if arm.at is not None and name in tested(results, arm.name)):
            there = level(results, arm, Outcome(name, group, MEAN))
            curves.setdefault(arm.series, []).append({"at": arm.at or 0.0, **vars(there)})
        if curves:
            figure = along(curves, study.axis, f"Dice in percent, mean of {group}")
            found.append((f"{suffix}-curve", f"Dice on {name} against {study.axis}", figure))
    if results.arms():
        found += [(f"-{suffix}", suffix, draw(results)) for suffix, draw in study.draws.items()]
    return found


def _file(name: str) -> str:
    """A test set's name as part of a file's."""
    return re.sub(r"[^\w-]+", "-", name)
