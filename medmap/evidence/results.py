"""What a trial found, small enough to be kept with the code: a table of Dice and a page of facts, both plain text.

    KEY.csv    set,case,patient,present,t1n:WT,…    Dice in percent of every test case, subset and region
    KEY.json   what was run, on what, how long, and what was seen on the way

A result belongs to a trial by its hash: whoever asks for the same trial finds it, in whichever study it was run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from medmap.core.stats import EVIDENCE_SEEDS
from medmap.errors import InputError
from medmap.evidence.plan import Arm, Study, Trial
from medmap.run import write_text

FINISHED, DIVERGED = "finished", "diverged"
LEAK = "test, dropped behind T"
"""The set of rows of which T saw what is said to be missing (`medmap.evidence.leak`): shown, and never compared."""
RUNS = "runs"
"""The folder of all trials' results, beside the folders of the studies."""


@dataclass(frozen=True)
class Scored:
    """Dice of one test case: {(subset, region): percent}, and which regions it has."""

    set: str
    case: str
    patient: str
    present: tuple[str, ...]
    dice: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Result:
    """A trial that was run: finished, or diverged without a table."""

    trial: Trial
    status: str
    rows: tuple[Scored, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_result(folder: Path, result: Result) -> None:
    """Both files; the facts last, so that whoever finds them finds the table."""
    folder.mkdir(parents=True, exist_ok=True)
    key = result.trial.key
    if result.rows:
        columns, text = list(dict.fromkeys(column for row in result.rows for column in row.dice)), StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["set", "case", "patient", "present", *(f"{subset}:{region}" for subset, region in columns)])
        for row in result.rows:
            scores = [_written(row.dice.get(column)) for column in columns]
            table.writerow([row.set, row.case, row.patient, "+".join(row.present), *scores])
        write_text(folder / f"{key}.csv", text.getvalue())
    about = {"hash": result.trial.hash, "status": result.status, **result.facts, "trial": result.trial.identity}
    # On one line: with a line a number it would be twice as long.
    write_text(folder / f"{key}.json", json.dumps(about, ensure_ascii=False) + "\n")


def _written(score: float | None) -> str:
    """Empty where a case lacks a sequence of the subset."""
    return "" if score is None else f"{score:.1f}".removesuffix(".0")


def read_result(folder: Path, trial: Trial) -> Result | None:
    """The result of a trial; None where it was not run. Raises InputError for one that is damaged."""
    file = folder / f"{trial.key}.json"
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["hash"] != trial.hash:
            return None
        rows = _rows(file.with_suffix(".csv")) if facts["status"] == FINISHED else ()
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error}); delete it and run the study again with --resume") from error
    return Result(trial, facts["status"], rows, facts)


def _rows(file: Path) -> tuple[Scored, ...]:
    with file.open(encoding="utf-8", newline="") as stream:
        head, *lines = csv.reader(stream)
    columns = [(subset, region) for subset, _, region in (name.partition(":") for name in head[4:])]
    return tuple(
        Scored(
            line[0],
            line[1],
            line[2],
            tuple(filter(None, line[3].split("+"))),
            {column: float(score) for column, score in zip(columns, line[4:], strict=True) if score},
        )
        for line in lines
    )


@dataclass(frozen=True)
class Results:
    """All results of a study that are there, by arm and seed."""

    study: Study
    found: Mapping[str, Sequence[Sequence[Result | None]]]

    def finished(self, arm: str) -> list[list[Result]]:
        """The seeds of an arm of which every fold is finished."""
        whole = []
        for seed in self.found[arm]:
            there = [result for result in seed if result is not None and result.status == FINISHED]
            if len(there) == len(seed):
                whole.append(there)
        return whole

    def count(self, status: str | None = None) -> int:
        """Trials with a result of this status; without one, all that the study needs."""
        cells = {id: r for seeds in self.found.values() for seed in seeds for id, r in self._named(seed)}
        return len(cells) if status is None else sum(r is not None and r.status == status for r in cells.values())

    def _named(self, seed: Iterable[Result | None]) -> list[tuple[Any, Result | None]]:
        return [(r.trial.hash if r is not None else object(), r) for r in seed]

    def arms(self) -> list[Arm]:
        """Arms that have a whole seed."""
        return [arm for arm in self.study.arms if self.finished(arm.name)]

    @property
    def is_evidence(self) -> bool:
        """Whether every arm has as many runs as evidence asks for."""
        return all(len(self.finished(arm.name)) >= EVIDENCE_SEEDS for arm in self.study.arms)


def read_results(study: Study, out: Path) -> Results:
    """What was found so far."""
    folder = out / RUNS
    found = {
        arm.name: [[read_result(folder, trial) for trial in seed] for seed in study.trials(arm)] for arm in study.arms
    }
    return Results(study, found)
