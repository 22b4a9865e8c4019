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

from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.labels import LabelScheme
from medmap.core.metrics import METRICS, convention_named, score_region
from medmap.core.modality import ModalitySet
from medmap.core.stats import bootstrap_interval
from medmap.data.store import Store
from medmap.errors import CheckpointError, InputError
from medmap.predict import Predictor, SubsetAnswer, answerable, postprocess
from medmap.run import ENV, SPLITS, find_runs, read_run, write_text

TABLE, SUMMARY = "subsets.csv", "summary.json"
CLEANED = "-pp"
CONTRAST = "t1c"
SAME_SPACING_MM = 0.01
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

    def score(classes: NDArray[np.uint8], region: str) -> dict[str, float]:
        mask, true = scheme.region_mask(classes, region), scheme.region_mask(truth, region)
        return score_region(mask, true, spacing_mm, convention)

    found = {region: score(predicted, region) for region in scheme.regions}
    if "ET" in found:
        cleaned = postprocess(predicted, scheme, spacing_mm, et_min_ml)
        found["ET" + CLEANED] = found["ET"] if cleaned is predicted else score(cleaned, "ET")
    return {(region, metric): value for region, scores in found.items() for metric, value in scores.items()}


def evaluate_cases(
    predictor: Predictor,
    store: Store,
    ids: Sequence[str],
    *,
    convention: str = "brats",
    on_progress: Progress = lambda case, done, total: None,
) -> list[Score]:
    """Score a model on cases of a store: every subset of the sequences that each case has.

    Raises InputError, before any work, where labels mean other classes than the model's, voxels have another size, or a
    case has no segmentation or no sequence that the model knows.
    """
    scheme = predictor.card.scheme
    check_scorable(store, ids, scheme, predictor.card.modalities)
    trained_mm = predictor.card.spacing_mm  # None: on each data set's own spacing, so that it takes any
    if trained_mm is not None and not (store.spacing_mm and abs(store.spacing_mm - trained_mm) <= SAME_SPACING_MM):
        found = "of several sizes" if store.spacing_mm is None else f"of {store.spacing_mm:g} mm"
        raise InputError(
            f"{store.path}: voxels {found}; the model was trained at {trained_mm:g} mm. "
            f"Prepare the data with --spacing {trained_mm:g}"
        )
    rows: list[Score] = []
    for number, case in enumerate(ids, start=1):
        prepared = store.load(case)
        for answer in predictor.answers(prepared, answerable(predictor.networks, prepared)):
            predicted, truth = on_common_box(answer, prepared)
            spacing_mm, et_min_ml = prepared.grid.spacing_mm, predictor.et_min_ml
            scores = score_classes(predicted, truth, spacing_mm, scheme, et_min_ml=et_min_ml, convention=convention)
            whose = case, store.patient(case), str(answer.subset)
            rows += [Score(*whose, region, metric, value) for (region, metric), value in scores.items()]
        on_progress(case, number, len(ids))
    return rows


def check_scorable(store: Store, ids: Iterable[str], scheme: LabelScheme, modalities: ModalitySet) -> None:
    """Raises InputError for cases that cannot be scored: labels of other classes, or none, or no known sequence."""
    if store.scheme is None or not store.scheme.same_classes(scheme):
        theirs = "none" if store.scheme is None else f"{store.scheme.name} {list(store.scheme.classes)}"
        ours = f"the model knows {scheme.name} {list(scheme.classes)}"
        raise InputError(f"{store.path}: label scheme {theirs}; {ours}. Prepare the data with the matching --labels")
    for case in ids:
        if not store.has_labels(case):
            raise InputError(f"{store.path}: case {case} has no segmentation to be compared with; leave it out")
        if not set(modalities) & set(store.sequences(case)):
            has, needed = ", ".join(store.sequences(case)), " or ".join(modalities)
            raise InputError(f"{store.path}: case {case} has {has}; expected {needed}. Leave it out")


def on_common_box(answer: SubsetAnswer, prepared: Prepared) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Predicted and true class maps on one box of the grid.

    The truth may reach beyond the brain of a subset: that is missed. The network's box may pass the grid's end: what it
    says there is in no mask, and is not scored.
    """
    if prepared.labels is None:
        raise InputError(f"case {prepared.id} has no segmentation to be compared with; leave it out")
    box = Box.union([answer.box.within(prepared.grid.shape), prepared.labels.box])
    return class_map(answer).window(box), prepared.labels.window(box)


def class_map(answer: SubsetAnswer) -> Boxed:
    """The most probable class of every voxel, UInt8[X Y Z] on the answer's box."""
    return Boxed(answer.probabilities.argmax(axis=0).astype(np.uint8), answer.box)


def summarise(
    rows: Sequence[Score], modalities: ModalitySet, scheme: LabelScheme, *, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Means and 95 % intervals over patients (two scans of a patient are one cluster) of a table of scores.

    rows:    every subset × region × metric
    groups:  the mean over all subsets of a case, over those with t1c, and those without; a case without some of these
             subsets, because it lacks a sequence, is left out
    present: Dice of rows and groups over the cases that have the region, where not all do
    """
    table = _Pivot(rows)
    subsets = [str(s) for s in modalities.subsets() if str(s) in table.subsets]
    lines = [("rows", {"subset": subset}, [subset]) for subset in subsets]
    lines += [("groups", {"group": group}, members) for group, members in subset_groups(subsets).items()]
    summary: dict[str, Any] = {
        **about,
        "cases": len(table.cases),
        "patients": len(set(table.patients)),
        "modalities": list(modalities),
        "regions": [region for region in scheme.regions if region in table.regions],
        **{part: [] for part in ("rows", "groups", "present")},
    }
    for region in (region for region in (*scheme.regions, "ET" + CLEANED) if region in table.regions):
        has = table.has_region(region.removesuffix(CLEANED))
        for metric in METRICS:
            for part, name, members in lines:
                entry, values = {**name, "region": region, "metric": metric}, table.mean_over(members, region, metric)
                summary[part].append({**entry, **_described(values, table.patients)})
                if metric == "dice" and not has.all():
                    values = np.where(has, values, np.nan)
                    summary["present"].append({**entry, **_described(values, table.patients)})
    return summary


def subset_groups(subsets: Sequence[str]) -> dict[str, list[str]]:
    """{name: members} of the groups over which means are taken; the two about t1c where both have members.

    >>> subset_groups(["t1c", "t2f", "t1c+t2f"])
    {'all subsets': ['t1c', 't2f', 't1c+t2f'], 'with t1c': ['t1c', 't1c+t2f'], 'without t1c': ['t2f']}
    """
    groups = {"all subsets": list(subsets)}
    contrast = [subset for subset in subsets if CONTRAST in subset.split("+")]
    if 0 < len(contrast) < len(subsets):
        groups[f"with {CONTRAST}"] = contrast
        groups[f"without {CONTRAST}"] = [subset for subset in subsets if subset not in contrast]
    return groups


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

    Raises InputError for an unknown convention and data that cannot be scored, CheckpointError for a folder without
    runs, runs that test one case twice or are not of one kind, and data that are gone or were changed.
    """
    convention_named(convention)
    runs = find_runs(path)
    if data is not None:
        predictor = Predictor.load(path, which=which, device=device)
        rows = evaluate_cases(predictor, data, data.ids, convention=convention, on_progress=on_progress)
        out = path / f"on-{name or data.path.name}"
        members = f"{len(runs)} networks together" if len(runs) > 1 else "one network"
        evaluated = f"all {len(data.ids)} cases of {out.name[3:]}, {members}"
        about = {"evaluated": evaluated, "runs": len(runs), "checkpoint": which}
        write_scores(out, rows, predictor.card.modalities, predictor.card.scheme, convention, [data], about)
        return out
    splits, stores = read_splits(runs), [run_store(run) for run in runs]
    pooled: list[Score] = []
    for run, split, store in zip(runs, splits, stores, strict=True):
        predictor = Predictor.load(run, which=which, device=device)
        rows = evaluate_cases(predictor, store, split["test"], convention=convention, on_progress=on_progress)
        card = predictor.card
        about = {"evaluated": f"test part of {split['name']}", "runs": 1, "checkpoint": which}
        about["split_sha256"] = [split["sha256"]]
        write_scores(run, rows, card.modalities, card.scheme, convention, [store], about)
        pooled += rows
    if runs != [path]:
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
    about = {**about, "convention": convention, "store": hashes}
    summary: dict[str, Any] = _without_nan(summarise(rows, modalities, scheme, about=about))
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
            rows = [Score(**{**row, "value": float(row["value"])}) for row in csv.DictReader(stream)]
    except (OSError, TypeError, KeyError, ValueError, csv.Error) as error:
        raise InputError(f"{file}: no table of scores ({error}); expected one of `medmap evaluate`") from error
    if not rows:
        raise InputError(f"{file}: holds no score; run `medmap evaluate` again")
    return rows


def read_splits(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """splits.json of runs that are to be pooled.

    Raises CheckpointError where one is absent, two of them test one case, or their sequences, labels or spacing differ.
    """
    splits, cards = [_read_json(run / SPLITS) for run in runs], [read_run(run)[1] for run in runs]
    tested: dict[str, Path] = {}
    for run, split, card in zip(runs, splits, cards, strict=True):
        if card != cards[0]:
            raise CheckpointError(
                f"{run} and {runs[0]} differ in sequences, labels or spacing, so they cannot be pooled; evaluate them "
                "one by one"
            )
        for case in split["test"]:
            if case in tested:
                raise CheckpointError(
                    f"{run} and {tested[case]} both have case {case} in their test part, so they cannot be pooled; "
                    "evaluate runs of different seeds one by one, then compare them with medmap compare"
                )
            tested[case] = run
    return splits


def run_store(run: Path) -> Store:
    """The prepared data a run was trained on. Raises CheckpointError where they are gone or were changed."""
    environment = _read_json(run / ENV)
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
    """The summary as plain text: a row a subset, a column a region; ratios such as Dice in percent.

    A number that is not over all cases says over how many it is.
    """
    entries = [row for part in ("rows", "groups") for row in summary[part] if row["metric"] == metric]
    present = [row for row in summary["present"] if row["metric"] == metric and "group" in row]
    regions = list(dict.fromkeys(row["region"] for row in entries))
    scale = 100 if METRICS[metric].unit == "" else 1

    def line(label: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
        by_region = {row["region"]: row for row in found}
        return [label, *(_cell(by_region.get(region), scale, summary["cases"]) for region in regions)]

    lines = [["", *regions]]
    subsets = dict.fromkeys(row["subset"] for row in entries if "subset" in row)
    lines += [line(subset, [row for row in entries if row.get("subset") == subset]) for subset in subsets]
    lines.append([""])
    for group in dict.fromkeys(row["group"] for row in entries if "group" in row):
        everyone = [row for row in entries if row.get("group") == group]
        lines.append(line(group, everyone))
        if having := [row for row in present if row["group"] == group]:
            lines.append(line("  who have the region", [*everyone, *having]))  # all have it where no row says less
    width = max(len(cell) for cells in lines for cell in cells[1:]) + 2
    table = [f"{label:24}{''.join(f'{cell:>{width}}' for cell in cells)}".rstrip() for label, *cells in lines]
    foot = (
        f"{metric}{' in %' if scale == 100 else ''}, mean [95 % interval over patients]; {summary['cases']} cases of "
        f"{summary['patients']} patients; {summary['evaluated']}; empty regions: {summary['convention']}"
    )
    return "\n".join([*table, "", foot])


def _cell(row: Mapping[str, Any] | None, scale: int, cases: int) -> str:
    if row is None or row["mean"] is None:
        return "–"
    mean, low, high = ("–" if row[key] is None else f"{row[key] * scale:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" + (f" n={row['n']}" if row["n"] < cases else "")


class _Pivot:
    """Scores as columns over cases."""

    def __init__(self, rows: Sequence[Score]) -> None:
        self.cases = list(dict.fromkeys(row.case for row in rows))
        patient_of = {row.case: row.patient for row in rows}
        self.patients = [patient_of[case] for case in self.cases]
        self.values = {(row.subset, row.region, row.metric, row.case): row.value for row in rows}
        self.subsets = list(dict.fromkeys(row.subset for row in rows))
        self.regions = {row.region for row in rows}

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


def _described(values: NDArray[np.float64], patients: Sequence[str]) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    median = float(np.median(known)) if known.size else float("nan")
    return {**asdict(bootstrap_interval(values, patients)), "median": median}


def _without_nan(tree: Any) -> Any:
    """JSON has no NaN: undefined numbers become null."""
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy the run again, with all its files") from error
    return content
