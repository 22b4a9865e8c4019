"""What a run folder holds: gathered, checked, nothing drawn."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml

from medmap.errors import CheckpointError, InputError

HASHED = ("config.yaml", "splits.json", "log.jsonl", "subsets.csv", "summary.json")
NEEDED = ("cases", "patients", "modalities", "regions", "rows")


@dataclass(frozen=True)
class Run:
    """What a run folder holds. ``folds`` is {name: folder}: one entry for a single run.

    config, env: of the first fold; splits, logs: {fold: content}; summary: None where not evaluated;
    elsewhere: {name of other data: summary}; confidence: confidence.json; latents, examples: arrays by name; None where
    absent
    """

    name: str
    config: Mapping[str, Any]
    folds: Mapping[str, Path]
    env: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    patients: Sequence[Mapping[str, Any]] = ()
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    confidence: Mapping[str, Any] | None = None
    latents: Mapping[str, Any] | None = None
    examples: Mapping[str, Any] | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)


def read_run(run: Path) -> Run:
    """Gather a run folder, or a folder whose sub-folders are the folds of one run.

    Raises InputError when there is no such folder, CheckpointError when it is not a run or a file in it is damaged.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; expected the run folder that `medmap train -o RUN` wrote")
    folds = {"run": run} if (run / "config.yaml").is_file() else _folds(run)
    if not folds:
        raise CheckpointError(
            f"{run}: not a run: there is no config.yaml in it nor in a folder below it; expected what "
            "`medmap train -o RUN` wrote, or a folder of such folds"
        )
    config = _shared_config(run, folds)
    first = next(iter(folds.values()))
    summary = _summary(run / "summary.json")
    hashed = [(run / name, name) for name in HASHED]
    hashed += [
        (folder / name, f"{folder.name}/{name}") for folder in folds.values() if folder != run for name in HASHED
    ]
    return Run(
        name=str(config.get("name") or run.resolve().name),
        config=config,
        folds=folds,
        env=_json(first / "env.json") or {},
        splits={name: split for name, at in folds.items() if (split := _json(at / "splits.json"))},
        logs={name: log for name, at in folds.items() if (log := _log(at / "log.jsonl"))},
        summary=summary,
        patients=_patients(run / "subsets.csv", summary) if summary else (),
        elsewhere={
            at.parent.name.removeprefix("on-"): found
            for at in sorted(run.glob("on-*/summary.json"))
            if (found := _summary(at))
        },
        confidence=_json(run / "confidence.json"),
        latents=_first_arrays([run, *folds.values()], "latents.npz"),
        examples=_first_arrays([run, *folds.values()], "examples.npz"),
        hashes={name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in hashed if path.is_file()},
    )


def _folds(run: Path) -> dict[str, Path]:
    found = [path.parent for path in run.glob("*/config.yaml")]
    return {path.name: path for path in sorted(found, key=lambda p: (len(p.name), p.name))}


def _shared_config(run: Path, folds: Mapping[str, Path]) -> dict[str, Any]:
    """The configuration of the first fold. Runs that differ in more than the fold are not folds of one run."""
    configs = {name: _yaml(folder / "config.yaml") for name, folder in folds.items()}
    (first, config), *others = configs.items()
    for name, other in others:
        apart = [key for key in {**config, **other} if _recipe(config).get(key) != _recipe(other).get(key)]
        if apart:
            raise CheckpointError(
                f"{run}: {first} and {name} differ in {', '.join(apart)}, so they are not folds of one run; "
                f"report each by itself: medmap report {folds[name]}"
            )
    return config


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    data = config.get("data")
    kept = {key: value for key, value in data.items() if key != "fold"} if isinstance(data, dict) else data
    return {**config, "data": kept, "name": None}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path, error, "the configuration that training saved") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"found a {type(content).__name__}", "the configuration that training saved")
    return content


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error, "a JSON object") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"found a {type(content).__name__}", "a JSON object")
    return content


def _summary(path: Path) -> dict[str, Any] | None:
    summary = _json(path)
    absent = [key for key in NEEDED if key not in summary] if summary is not None else []
    if absent:
        raise _damaged(path, f"without {', '.join(absent)}", "the summary that `medmap evaluate` wrote")
    return summary


def _log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records: list[dict[str, Any]] = []
    for position, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if position < len(lines):  # a last line that breaks off is an interrupted run, not a damaged one
                raise _damaged(path, f"line {position}: {error}", "one JSON object a line") from error
    return records


def _first_arrays(folders: Sequence[Path], name: str) -> dict[str, Any] | None:
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise _damaged(path, error, "arrays that `medmap evaluate` wrote") from error


def _damaged(path: Path, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({found}); expected {expected}: restore the file, or remove it and run the command "
        "that writes it again"
    )


def _patients(path: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{case, mean, full}], the worst first: Dice per region, mean over all subsets and with every sequence."""
    if not path.is_file():
        return []
    regions, full = summary["regions"], set(summary["modalities"])
    found: dict[str, dict[str, dict[bool, list[float]]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "dice" and row["region"] in regions:
                of = found.setdefault(row["case"], {region: {False: [], True: []} for region in regions})
                value = float(row["value"] or "nan")
                of[row["region"]][False].append(value)
                if set(row["subset"].split("+")) == full:
                    of[row["region"]][True].append(value)
    lines = [
        {"case": case, "mean": [_mean(of[r][False]) for r in regions], "full": [_mean(of[r][True]) for r in regions]}
        for case, of in found.items()
    ]
    return sorted(lines, key=lambda line: np.nansum(line["mean"]))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
