"""Do two ways of training differ? Paired on the same patients, over patients and over runs.

An *arm* is a folder: one evaluated run (or pooled folds), or several of them in sub-folders, one per seed. Differences
are of the first arm against every other; the two-level bootstrap draws patients and runs; Holm corrects over all
differences that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.metrics import METRICS
from medmap.core.stats import Difference, holm, paired_difference
from medmap.errors import InputError
from medmap.evaluate import CONTRAST, TABLE, Score, read_scores

ALL, WITH, WITHOUT = "all subsets", f"with {CONTRAST}", f"without {CONTRAST}"


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

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "metric": self.metric,
            "patients": self.patients,
            "seeds": self.seeds,
            "lines": [asdict(line) for line in self.lines],
        }

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
            rows.append(found)
        if min(self.seeds.values()) < 2:
            rows.append("one run each: not evidence")
        elif not all(line.difference.evidence for line in self.lines):
            rows.append("fewer than three runs an arm: not evidence")
        return "\n".join(rows)


def compare_arms(paths: Sequence[Path], metric: str = "dice") -> Comparison:
    """Paired differences of the first arm against the others, for every region: all subsets, with and without t1c, and
    everything present.

    Raises InputError when arms were scored on different cases or subsets, naming some that differ.
    """
    if len(paths) < 2:
        raise InputError(f"comparing needs two folders or more; found {len(paths)}")
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; expected one of {', '.join(METRICS)}")
    arms = {name: _read_arm(path) for name, path in zip(_names(paths), paths, strict=True)}
    _refuse_unequal(arms)
    (baseline, reference), *others = arms.items()
    cases = list(dict.fromkeys(row.case for row in reference[0]))
    patient_of = {row.case: row.patient for row in reference[0]}
    clusters = [patient_of[case] for case in cases]
    regions = list(dict.fromkeys(row.region for row in reference[0]))
    found = []
    for group, subsets in _groups(reference[0]).items():
        for region in regions:
            a = _table(reference, cases, subsets, region, metric)
            for name, seeds in others:
                b = _table(seeds, cases, subsets, region, metric)
                found.append((name, region, group, paired_difference(b, a, clusters)))
    adjusted = holm([difference.p for *_, difference in found])
    lines = [
        Line(name, baseline, region, group, difference, float(p))
        for (name, region, group, difference), p in zip(found, adjusted, strict=True)
    ]
    return Comparison(metric, tuple(lines), len(set(clusters)), {name: len(seeds) for name, seeds in arms.items()})


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{paths[0]} is named twice; compare different folders")


def _read_arm(path: Path) -> list[list[Score]]:
    if (path / TABLE).is_file():
        return [read_scores(path / TABLE)]
    seeds = sorted(found for found in path.glob(f"*/{TABLE}"))
    if not seeds:
        raise InputError(f"{path}: no {TABLE} in it or one level below; run `medmap evaluate {path}` first")
    return [read_scores(file) for file in seeds]


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
    groups = {ALL: subsets}
    contrast = [s for s in subsets if CONTRAST in s.split("+")]
    if contrast and len(contrast) < len(subsets):
        groups |= {WITH: contrast, WITHOUT: [s for s in subsets if s not in contrast]}
    fullest = max(subsets, key=lambda s: s.count("+"))
    return groups | {f"only {fullest}": [fullest]} if len(subsets) > 1 else groups


def _table(
    seeds: Sequence[Sequence[Score]], cases: Sequence[str], subsets: Sequence[str], region: str, metric: str
) -> NDArray[np.float64]:
    """Float64[cases, seeds]: mean over the subsets."""
    columns = []
    for rows in seeds:
        values = {(row.case, row.subset): row.value for row in rows if row.region == region and row.metric == metric}
        columns.append([np.mean([values.get((case, s), np.nan) for s in subsets]) for case in cases])
    return np.array(columns).T
