"""One tidy table of scores, and a summary that says over whom and how sure. No torch: anybody's scores go in here.

    subsets.csv   case,patient,subset,region,metric,value       one number a row
    summary.json  means with intervals over patients: every subset, all / with t1c / without t1c, and over the
                  patients who have the region
    voxels.npz    log_p Float16[K V] and truth UInt8[V] of some voxels of every answer, one answer after the other;
                  patients, kinds, counts: whose, from which subset, how many of the V voxels

Region ``ET-pp`` is the enhancing tumour after removal of volumes below ``predict.et_min_ml``; raw and cleaned stand
side by side.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from medmap.core.labels import LabelScheme
from medmap.core.metrics import METRICS, postprocess, score_region
from medmap.core.modality import ModalitySet
from medmap.core.stats import bootstrap_interval
from medmap.core.temperature import Voxels
from medmap.core.witnesses import CLEANED
from medmap.data.store import Store
from medmap.data.whole import whole
from medmap.errors import InputError
from medmap.run import write_text

TABLE, SUMMARY, VOXELS = "subsets.csv", "summary.json", "voxels.npz"
CONTRAST = "t1c"
Progress = Callable[[str, int, int], None]
"""Called after each case with its id, cases done, cases in all."""


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
        **{part: [] for part in ("rows", "groups", "present", "cost")},
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
        for name in modalities:
            if (losses := table.lost_without(name, region, subsets)) is not None:
                entry = {"sequence": name, "region": region, "metric": "dice"}
                summary["cost"].append({**entry, **_described(losses, table.patients)})
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
    about = {**about, "convention": convention, "store": _hashes(stores)}
    summary: dict[str, Any] = without_nan(summarise(rows, modalities, scheme, about=about))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Score._fields)
        writer.writerows(row._replace(value=f"{row.value:.6g}") for row in rows)
        write_text(out / TABLE, text.getvalue())
        write_text(out / SUMMARY, json.dumps(summary, indent=1))
    return summary


def _hashes(stores: Sequence[Store]) -> dict[str, str]:
    """{name: SHA-256}; other data of the same name are told apart by a number."""
    found: dict[str, str] = {}
    for name, sha256 in dict.fromkeys((store.path.name, store.sha256) for store in stores):
        found[name if name not in found else f"{name} ({len(found) + 1})"] = sha256
    return found


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


def write_voxels(out: Path, answers: Sequence[Voxels]) -> None:
    """Put voxels.npz into a folder."""
    if not answers:
        (out / VOXELS).unlink(missing_ok=True)
        return
    with whole(out / VOXELS) as (fresh,), ZipFile(fresh, "w", ZIP_DEFLATED) as archive:
        _add(archive, "patients", [np.array([answer.patient for answer in answers], dtype=str)])
        _add(archive, "kinds", [np.array([answer.kind for answer in answers], dtype=str)])
        _add(archive, "counts", [np.array([len(answer.truth) for answer in answers])])
        _add(archive, "log_p", [answer.log_p for answer in answers])
        _add(archive, "truth", [answer.truth for answer in answers])


def _add(archive: ZipFile, name: str, parts: Sequence[NDArray[Any]]) -> None:
    """One array of an npz, its parts joined along the last axis as they are written: a copy of all would double what
    the answers of many thousand patients take."""
    *rest, _ = parts[0].shape
    shape = (*rest, sum(part.shape[-1] for part in parts))
    head = {"descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": True, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, head)
        for part in parts:
            stream.write(part.tobytes(order="F"))


def read_voxels(file: Path) -> list[Voxels]:
    """The answers of a voxels.npz. Raises InputError for a file that is not one."""
    try:
        with np.load(file, allow_pickle=False) as held:
            ends = np.cumsum(held["counts"])[:-1]
            parts = zip(np.split(held["log_p"], ends, axis=1), np.split(held["truth"], ends), strict=True)
            names = zip(map(str, held["patients"]), map(str, held["kinds"]), strict=True)
            return [Voxels(*whose, *values) for whose, values in zip(names, parts, strict=True)]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{file}: no voxels ({error}); run `medmap evaluate` again") from error


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

    def lost_without(self, name: str, region: str, subsets: Iterable[str]) -> NDArray[np.float64] | None:
        """Float64[cases]: mean over subsets S ∋ m of Dice(S) − Dice(S − m), of those that a case has; None without any
        pair."""
        column = {frozenset(subset.split("+")): self.column(subset, region, "dice") for subset in subsets}
        pairs = [column[s] - column[s - {name}] for s in column if name in s and s - {name} in column]
        if not pairs:
            return None
        known = np.isfinite(pairs)
        return np.where(known, pairs, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)

    def has_region(self, region: str) -> NDArray[np.bool_]:
        """Bool[cases]: whether the truth has the region."""
        columns = [self.column(subset, region, "truth_ml") for subset in self.subsets]
        return np.nan_to_num(np.array(columns)).max(axis=0) > 0


def _described(values: NDArray[np.float64], patients: Sequence[str]) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    low, median, high = np.quantile(known, (0.1, 0.5, 0.9)) if known.size else np.full(3, np.nan)
    spread = {"median": float(median), "p10": float(low), "p90": float(high)}
    return {**asdict(bootstrap_interval(values, patients)), **spread}


def without_nan(tree: Any) -> Any:
    """JSON has no NaN: undefined numbers become null."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree
