"""Subsets × patients → one tidy table, and a summary that says over whom and how sure.

    subsets.csv   case,patient,subset,region,metric,value       one number a row
    summary.json  means with intervals over patients: every subset, all / with t1c / without t1c, and over the
                  patients who have the region

Every sequence of a patient is encoded once; each subset is decoded from these latents (`medmap.predict`). Region
``ET-pp`` is the enhancing tumour after removal of volumes below ``predict.et_min_ml``; raw and cleaned stand side by
side.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Box
from medmap.core.case import Prepared
from medmap.core.labels import LabelScheme
from medmap.core.metrics import METRICS, convention_named, score_region
from medmap.core.modality import ModalitySet
from medmap.core.stats import Interval, bootstrap_interval
from medmap.data.store import Store
from medmap.errors import CheckpointError, InputError
from medmap.predict import Predictor, SubsetAnswer, answerable, postprocess
from medmap.run import ENV, SPLITS, find_runs, write_text

TABLE, SUMMARY = "subsets.csv", "summary.json"
CLEANED = "-pp"
CONTRAST = "t1c"
Progress = Callable[[str, int, int], None]


class Score(NamedTuple):
    """One number: a metric of a region of a case, from a subset of its sequences."""

    case: str
    patient: str
    subset: str
    region: str
    metric: str
    value: float


def score_classes(
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    spacing_mm: Sequence[float],
    scheme: LabelScheme,
    *,
    et_min_ml: float = 0.5,
    convention: str = "brats",
) -> dict[tuple[str, str], float]:
    """{(region, metric): value} of one class map against another, with ET also after post-processing."""
    spacing = tuple(float(mm) for mm in spacing_mm)
    scores = {}
    for region in scheme.regions:
        mask, true = scheme.region_mask(predicted, region), scheme.region_mask(truth, region)
        for metric, value in score_region(mask, true, spacing, convention).items():
            scores[region, metric] = value
        if region == "ET":
            cleaned = postprocess(predicted, scheme, spacing, et_min_ml)
            same = cleaned is predicted
            for metric in METRICS:
                scores[region + CLEANED, metric] = scores[region, metric]
            if not same:
                for metric, value in score_region(
                    scheme.region_mask(cleaned, region), true, spacing, convention
                ).items():
                    scores[region + CLEANED, metric] = value
    return scores


def evaluate_cases(
    predictor: Predictor,
    store: Store,
    ids: Sequence[str],
    *,
    convention: str = "brats",
    on_progress: Progress = lambda case, done, total: None,
) -> list[Score]:
    """Score a model on cases of a store: every subset of the sequences that each case has.

    Raises InputError where labels mean other classes than the model's, or a case has no segmentation.
    """
    scheme = predictor.card.scheme
    if store.scheme is None or not store.scheme.same_classes(scheme):
        theirs = "none" if store.scheme is None else f"{store.scheme.name} {list(store.scheme.classes)}"
        raise InputError(
            f"{store.path}: label scheme {theirs}; the model knows {scheme.name} {list(scheme.classes)}. "
            "Prepare the data with the matching --labels"
        )
    if store.spacing_mm != predictor.card.spacing_mm:
        raise InputError(
            f"{store.path}: voxels of {store.spacing_mm or 'mixed'} mm; the model was trained at "
            f"{predictor.card.spacing_mm or 'mixed'} mm. Prepare the data with --spacing {predictor.card.spacing_mm}"
        )
    rows: list[Score] = []
    for number, case in enumerate(ids, start=1):
        prepared = store.load(case)
        for answer in predictor.answers(prepared, answerable(predictor.networks, prepared)):
            predicted, truth = on_common_box(answer, prepared)
            scores = score_classes(
                predicted,
                truth,
                prepared.grid.spacing_mm,
                scheme,
                et_min_ml=predictor.et_min_ml,
                convention=convention,
            )
            rows += [
                Score(case, store.patient(case), str(answer.subset), region, metric, value)
                for (region, metric), value in scores.items()
            ]
        on_progress(case, number, len(ids))
    return rows


def on_common_box(answer: SubsetAnswer, prepared: Prepared) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Predicted and true class maps on one box. The truth may reach beyond the brain of a subset: that is missed."""
    if prepared.labels is None:
        raise InputError(f"case {prepared.id} has no segmentation to be compared with; leave it out")
    box = Box.union([answer.box, prepared.labels.box])
    predicted = np.zeros(box.shape, np.uint8)
    predicted[answer.box.relative_to(box.start).slices] = answer.probabilities.argmax(axis=0)
    return predicted, prepared.labels.window(box)


def summarise(
    rows: Sequence[Score], modalities: ModalitySet, scheme: LabelScheme, *, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Means and 95 % intervals over patients (two scans of a patient are one cluster) of a table of scores.

    rows:    every subset × region × metric
    groups:  the mean over all subsets of a case, over those with t1c, and those without
    present: groups and rows over the cases that have the region
    """
    table = _Pivot(rows)
    regions = [region for region in (*scheme.regions, "ET" + CLEANED) if table.has(region)]
    subsets = [str(s) for s in modalities.subsets() if table.has_subset(str(s))] or table.subsets
    groups = {"all subsets": subsets}
    if CONTRAST in modalities and len(modalities) > 1:
        groups["with t1c"] = [s for s in subsets if CONTRAST in s.split("+")]
        groups["without t1c"] = [s for s in subsets if CONTRAST not in s.split("+")]
    summary: dict[str, Any] = {
        **about,
        "cases": len(table.cases),
        "patients": len(set(table.patients)),
        "modalities": list(modalities),
        "regions": list(scheme.regions),
        "rows": [],
        "groups": [],
        "present": [],
    }
    for region in regions:
        has = table.has_region(region.removesuffix(CLEANED))
        for metric in METRICS:
            for subset in subsets:
                entry = {"subset": subset, "region": region, "metric": metric}
                values = table.column(subset, region, metric)
                summary["rows"].append({**entry, **_interval(values, table.patients), "median": _median(values)})
                if metric == "dice" and not has.all():
                    summary["present"].append({**entry, **_interval(np.where(has, values, np.nan), table.patients)})
            for group, members in groups.items():
                entry = {"group": group, "region": region, "metric": metric}
                values = table.mean_over(members, region, metric)
                summary["groups"].append({**entry, **_interval(values, table.patients)})
                if metric == "dice" and not has.all():
                    summary["present"].append({**entry, **_interval(np.where(has, values, np.nan), table.patients)})
    return summary


def evaluate(
    path: Path,
    *,
    data: Store | None = None,
    name: str | None = None,
    which: str = "best",
    convention: str = "brats",
    device: str = "auto",
    on_progress: Progress = lambda case, done, total: None,
) -> Path:
    """Evaluate a run, or a folder of folds, and write subsets.csv and summary.json; returns the folder they are in.

    Without ``data`` every run is scored on its own test part, and the folds of a folder are pooled. With ``data`` all
    its cases are scored, by the folds together as an ensemble, into PATH/on-NAME.
    """
    convention_named(convention)
    runs = find_runs(path)
    if data is not None:
        predictor = Predictor.load(path, which=which, device=device)
        rows = evaluate_cases(predictor, data, data.ids, convention=convention, on_progress=on_progress)
        out = path / f"on-{name or data.path.name}"
        members = f"{len(runs)} networks together" if len(runs) > 1 else "one network"
        about = {
            "evaluated": f"all {len(data.ids)} cases of {out.name[3:]}, {members}",
            "runs": len(runs),
            "checkpoint": which,
        }
        write_scores(out, rows, predictor.card.modalities, predictor.card.scheme, convention, [data], about)
        return out
    pooled: list[Score] = []
    stores = []
    for run in runs:
        split = json.loads((run / SPLITS).read_text(encoding="utf-8"))
        store = run_store(run)
        predictor = Predictor.load(run, which=which, device=device)
        rows = evaluate_cases(predictor, store, split["test"], convention=convention, on_progress=on_progress)
        card = predictor.card
        about = {"evaluated": f"test part of {split['name']}", "runs": 1, "split_sha256": [split["sha256"]]}
        about["checkpoint"] = which
        write_scores(run, rows, card.modalities, card.scheme, convention, [store], about)
        pooled += rows
        stores.append(store)
    if runs != [path]:
        _refuse_twice_tested(pooled, path)
        about = {"evaluated": f"test parts of {len(runs)} runs, pooled", "runs": len(runs), "checkpoint": which}
        write_scores(path, pooled, card.modalities, card.scheme, convention, stores, about)
    return path


def write_scores(
    out: Path | None,
    rows: Sequence[Score],
    modalities: ModalitySet,
    scheme: LabelScheme,
    convention: str,
    stores: Sequence[Store],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Summarise a table of scores and, where a folder is named, put subsets.csv and summary.json there."""
    hashes = {store.path.name: store.sha256 for store in stores}
    summary = summarise(rows, modalities, scheme, about={**about, "convention": convention, "store": hashes})
    summary = _without_nan(summary)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Score._fields)
        writer.writerows(row._replace(value=f"{row.value:.6g}") for row in rows)
        write_text(out / TABLE, text.getvalue())
        write_text(out / SUMMARY, json.dumps(summary, indent=1))
    return summary


def read_scores(file: Path) -> list[Score]:
    """The rows of a subsets.csv. Raises InputError for a file that is not one."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            return [Score(**{**row, "value": float(row["value"])}) for row in csv.DictReader(stream)]
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{file}: not a table of scores ({error}); expected one that `medmap evaluate` wrote"
        ) from error


def run_store(run: Path) -> Store:
    """The prepared data a run was trained on. Raises CheckpointError where they are gone or were changed."""
    environment = json.loads((run / ENV).read_text(encoding="utf-8"))
    there = Path(environment["store"])
    places = [there, run / there.name, run.parent / there.name]  # beside the run, where both were moved
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise CheckpointError(f"{run}: its data were at {there}, which is not there; name them with --data")
    store = Store(found)
    if store.sha256 != environment["store_sha256"]:
        raise CheckpointError(
            f"{run}: the data at {found} changed since training (hash {store.sha256[:12]}, then "
            f"{environment['store_sha256'][:12]}); prepare them again as they were, or name others with --data"
        )
    return store


def table_text(summary: Mapping[str, Any], metric: str = "dice") -> str:
    """The summary as plain text: a row a subset, a column a region, mean and interval in percent for Dice."""
    rows = [row for row in summary["rows"] if row["metric"] == metric]
    groups = [row for row in summary["groups"] if row["metric"] == metric]
    present = [row for row in summary["present"] if "group" in row]
    regions = list(dict.fromkeys(row["region"] for row in rows))
    scale = 100 if METRICS[metric].unit == "" else 1
    lines = [f"{'':24}" + "".join(f"{region:>20}" for region in regions)]

    def cell(entries: list[dict[str, Any]], key: str, name: str, region: str) -> str:
        for row in entries:
            if row.get(key) == name and row["region"] == region and row["mean"] is not None:
                mean, low, high = ("–" if row[k] is None else f"{row[k] * scale:.1f}" for k in ("mean", "low", "high"))
                return f"{mean} [{low}, {high}]"
        return "–"

    lines += [
        f"{subset:24}" + "".join(f"{cell(rows, 'subset', subset, r):>20}" for r in regions)
        for subset in dict.fromkeys(row["subset"] for row in rows)
    ]
    lines.append("")
    for group in dict.fromkeys(row["group"] for row in groups):
        lines.append(f"{group:24}" + "".join(f"{cell(groups, 'group', group, r):>20}" for r in regions))
        if any(row["group"] == group for row in present):
            label = "  who have the region"
            lines.append(f"{label:24}" + "".join(f"{cell(present, 'group', group, r):>20}" for r in regions))
    lines += [
        "",
        f"{metric}, mean [95 % interval over patients]; {summary['cases']} cases of {summary['patients']} patients; "
        f"{summary['evaluated']}; empty regions: {summary['convention']}",
    ]
    return "\n".join(lines)


class _Pivot:
    """Scores as columns over cases."""

    def __init__(self, rows: Sequence[Score]) -> None:
        self.cases = list(dict.fromkeys(row.case for row in rows))
        patient_of = {row.case: row.patient for row in rows}
        self.patients = [patient_of[case] for case in self.cases]
        self.values = {(row.subset, row.region, row.metric, row.case): row.value for row in rows}
        self.subsets = list(dict.fromkeys(row.subset for row in rows))
        self.regions = {row.region for row in rows}

    def has(self, region: str) -> bool:
        return region in self.regions

    def has_subset(self, subset: str) -> bool:
        return subset in self.subsets

    def column(self, subset: str, region: str, metric: str) -> NDArray[np.float64]:
        """Float64[cases]; NaN where a case was not asked for that subset."""
        return np.array([self.values.get((subset, region, metric, case), np.nan) for case in self.cases])

    def mean_over(self, subsets: Iterable[str], region: str, metric: str) -> NDArray[np.float64]:
        """Float64[cases]: mean over the subsets of a group; NaN unless a case has all of them."""
        return np.mean([self.column(subset, region, metric) for subset in subsets], axis=0)

    def has_region(self, region: str) -> NDArray[np.bool_]:
        """Bool[cases]: whether the truth has the region."""
        columns = [self.column(subset, region, "truth_ml") for subset in self.subsets]
        return np.nan_to_num(np.array(columns)).max(axis=0) > 0


def _interval(values: NDArray[np.float64], patients: Sequence[str]) -> dict[str, Any]:
    interval: Interval = bootstrap_interval(values, patients)
    return asdict(interval)


def _median(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _without_nan(tree: Any) -> Any:
    """JSON has no NaN: undefined numbers become null."""
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _refuse_twice_tested(rows: Sequence[Score], path: Path) -> None:
    seen: set[tuple[str, str, str, str]] = set()
    for row in rows:
        key = (row.case, row.subset, row.region, row.metric)
        if key in seen:
            raise CheckpointError(
                f"{path}: case {row.case} is in the test part of two of its runs; pool runs of different folds, and "
                "compare runs of different seeds with medmap compare"
            )
        seen.add(key)
