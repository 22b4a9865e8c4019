"""Do two ways of training differ? Paired on the same patients, over patients and over runs.

An *arm* is a folder: one evaluated run (or pooled folds), or several of them in sub-folders, one per seed. Differences
are of the first arm against every other; intervals are of Student's t over patients and runs; Holm corrects over all
differences that are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.metrics import METRICS
from medmap.core.stats import EVIDENCE_SEEDS, Difference, holm, paired_difference
from medmap.errors import InputError
from medmap.scores import SUMMARY, TABLE, Score, read_scores, subset_groups, without_nan


@dataclass(frozen=True)
class Line:
    """One difference: arm − baseline, of a region and a group of subsets."""

    arm: str
    baseline: str
    region: str
    group: str
    difference: Difference
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Everything `compare_arms` found."""

    metric: str
    lines: tuple[Line, ...]
    patients: int
    seeds: dict[str, int]
    one_store: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        plain: dict[str, Any] = without_nan(
            {
                "metric": self.metric,
                "patients": self.patients,
                "seeds": self.seeds,
                "one_store": self.one_store,
                "lines": [asdict(line) for line in self.lines],
            }
        )
        return plain

    def text(self) -> str:
        """A table for people."""
        scale = 100 if METRICS[self.metric].unit == "" else 1
        unit = "points" if scale == 100 else METRICS[self.metric].unit
        width = max(len(line.group) for line in self.lines)
        rows = [f"{self.metric}, difference in {unit} [95 % interval over patients × runs], {self.patients} patients"]
        for line in self.lines:
            d = line.difference
            found = f"{line.arm} − {line.baseline}  {line.region:6} {line.group:{width}} {d.mean * scale:+7.2f}"
            if np.isfinite(d.low):
                found += f" [{d.low * scale:+.2f}, {d.high * scale:+.2f}]  p = {line.p_holm:.3f} (Holm)"
            if d.undefined:
                found += f"  over {d.patients} of {d.patients + d.undefined} cases"
            rows.append(found)
        return "\n".join([*rows, *self._caveats()])

    def _caveats(self) -> list[str]:
        other = (
            [] if self.one_store else ["scored on differently prepared data: spacing or labels may be the difference"]
        )
        return [*other, *self._of_few()]

    def _of_few(self) -> list[str]:
        few = [name for name, runs in self.seeds.items() if runs < EVIDENCE_SEEDS]
        if max(self.seeds.values()) == 1:
            return ["one run each: not evidence"]
        if few:
            return [f"fewer than three runs ({', '.join(few)}): not evidence"]
        return ["without an interval: not evidence"] if not all(line.difference.evidence for line in self.lines) else []


def compare_arms(paths: Sequence[Path], metric: str = "dice") -> Comparison:
    """Paired differences of the first arm against the others, for every region: all subsets, with and without t1c, and
    everything present.

    A case counts where it has every subset of the group in every run.
    Raises InputError when arms were scored on different cases, subsets or regions, naming some that differ, or by
    different conventions for empty regions.
    """
    if len(paths) < 2:
        raise InputError(f"comparing needs two folders or more; found {len(paths)}")
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; expected one of {', '.join(METRICS)}")
    tables = {name: _tables_of(path) for name, path in zip(_names(paths), paths, strict=True)}
    summaries = _summaries([file for files in tables.values() for file in files])
    _refuse_other_conventions(summaries)
    arms = {name: [_read(file, metric) for file in files] for name, files in tables.items()}
    _refuse_unequal(arms)
    (baseline, reference), *others = arms.items()
    cases = list(dict.fromkeys(row.case for row in reference[0]))
    patient_of = {row.case: row.patient for row in reference[0]}
    clusters = [patient_of[case] for case in cases]
    regions = list(dict.fromkeys(row.region for row in reference[0]))
    found = []
    for group, subsets in _groups(reference[0]).items():
        for region in regions:
            a = _table(reference, cases, subsets, region)
            for name, seeds in others:
                b = _table(seeds, cases, subsets, region)
                found.append((name, region, group, paired_difference(b, a, clusters)))
    adjusted = holm([difference.p for *_, difference in found])
    lines = [
        Line(name, baseline, region, group, difference, float(p))
        for (name, region, group, difference), p in zip(found, adjusted, strict=True)
    ]
    stores = {frozenset(summary["store"].values()) for summary in summaries.values() if summary.get("store")}
    counts = {name: len(seeds) for name, seeds in arms.items()}
    return Comparison(metric, tuple(lines), len(set(clusters)), counts, len(stores) < 2)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{paths[0]} is named twice; compare different folders")


def _tables_of(path: Path) -> list[Path]:
    """The table of an arm, or one a seed; tables of floors and of other data are no seeds."""
    if (path / TABLE).is_file():
        return [path / TABLE]
    seeds = sorted(file for file in path.glob(f"*/{TABLE}") if not file.parent.name.startswith(("baseline-", "on-")))
    if not seeds:
        raise InputError(f"{path}: no {TABLE} in it or one level below; run `medmap evaluate {path}` first")
    return seeds


def _read(file: Path, metric: str) -> list[Score]:
    rows = [row for row in read_scores(file) if row.metric == metric]
    if not rows:
        raise InputError(f"{file}: holds no {metric}; run `medmap evaluate {file.parent}` again")
    return rows


def _summaries(tables: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """What stands beside the tables, by folder."""
    files = [file.with_name(SUMMARY) for file in tables]
    return {file.parent: json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()}


def _refuse_other_conventions(summaries: Mapping[Path, Mapping[str, Any]]) -> None:
    """A table alone does not say what it holds for empty regions; the summary beside it does."""
    found = {folder: summary.get("convention") for folder, summary in summaries.items()}
    if len(set(found.values())) > 1:
        named = ", ".join(f"{folder}: {convention}" for folder, convention in list(found.items())[:5])
        raise InputError(
            f"arms follow different conventions for empty regions ({named}); evaluate them with the same --empty"
        )


def _refuse_unequal(arms: dict[str, list[list[Score]]]) -> None:
    tables = [(name, table) for name, seeds in arms.items() for table in seeds]
    first_name, first = tables[0]
    for name, table in tables[1:]:
        for what, of in (("cases", lambda r: r.case), ("subsets", lambda r: r.subset), ("regions", lambda r: r.region)):
            ours, theirs = {of(row) for row in first}, {of(row) for row in table}
            if ours != theirs:
                raise InputError(
                    f"{name} and {first_name} were not scored on the same {what}: they differ in "
                    f"{', '.join(sorted(ours ^ theirs)[:5])}; evaluate both on the same data and split"
                )


def _groups(rows: Sequence[Score]) -> dict[str, list[str]]:
    subsets = list(dict.fromkeys(row.subset for row in rows))
    fullest = max(subsets, key=lambda subset: subset.count("+"))
    only = {f"only {fullest}": [fullest]} if len(subsets) > 1 else {}
    return {**subset_groups(subsets), **only}


def _table(
    seeds: Sequence[Sequence[Score]], cases: Sequence[str], subsets: Sequence[str], region: str
) -> NDArray[np.float64]:
    """Float64[cases, seeds]: mean over the subsets; NaN where a case lacks one of them."""
    columns = []
    for rows in seeds:
        values = {(row.case, row.subset): row.value for row in rows if row.region == region}
        columns.append([np.mean([values.get((case, s), np.nan) for s in subsets]) for case in cases])
    return np.array(columns).T
