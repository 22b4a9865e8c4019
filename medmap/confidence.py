"""How far one mask can be trusted, from what needs no truth: a predicted Dice with an interval that held its promise.

What speaks for a mask is in `medmap.core.witnesses`. `medmap evaluate` keeps it beside the scores, and fits to it what
held-out patients had (`medmap.core.conformal`).
From some voxels of every answer it fits a temperature a subset (`medmap.core.temperature`). Both are
``confidence.json`` in the model's folder, with how they did for patients that they had not seen.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.card import GOOD_DICE, ModelFolder, percent
from medmap.core.conformal import Fit, Rows, conformal, others_mean, tried
from medmap.core.stats import bootstrap_interval
from medmap.core.temperature import (
    Reading,
    Temperatures,
    Voxels,
    calibration_error,
    each_left_out,
    fit_temperatures,
    losses,
    reading,
)
from medmap.core.witnesses import CLEANED, FEATURES, Evidence, Witnesses
from medmap.errors import CheckpointError, InputError
from medmap.run import write_text
from medmap.scores import SUMMARY, TABLE, VOXELS, Score, read_scores, read_voxels, without_nan

CONFIDENCE = "confidence.json"
QC_TABLE = "qc.csv"
FORMAT = 2
LEVEL = 0.8
"""Share of masks whose Dice is to lie in the interval: that of the card's "8 of 10 cases"."""

LEAST_PATIENTS = 10
"""Nothing is claimed for a combination of sequences that fewer held-out patients were segmented from."""

# ---- what held-out patients had ----------------------------------------------------------------------------------


def write_confidence(model: ModelFolder, evaluated: Path, out: Path | None = None) -> dict[str, Any] | None:
    """Fit confidence.json to what a folder's subsets.csv and voxels.npz hold, into it or ``out``; returns the content.

    None, and no file, where fewer than `LEAST_PATIENTS` patients were scored, or by a medmap that kept no agreement.
    """
    regions = calibrate(read_scores(evaluated / TABLE))
    file = (out or evaluated) / CONFIDENCE
    if not regions:
        file.unlink(missing_ok=True)
        return None
    summary = json.loads((evaluated / SUMMARY).read_text(encoding="utf-8"))
    measured = {key: summary[key] for key in ("evaluated", "cases", "patients", "convention", "store")}
    found = {"format": FORMAT, "level": LEVEL, "good_dice": GOOD_DICE, "weights_sha256": model.weights_sha256}
    voxels = read_voxels(evaluated / VOXELS) if (evaluated / VOXELS).is_file() else []
    whole = {**found, "measured": measured, "regions": regions, "temperature": temperatures(voxels, _members(model))}
    write_text(file, json.dumps(without_nan(whole), indent=1, ensure_ascii=False) + "\n")
    return whole


def temperatures(voxels: Sequence[Voxels], regions: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """{patients, common, of: {combination: T}, left_out}; None where no combination has enough patients.

    voxels: of every answer; regions: {name: its classes}
    """
    everyone = losses(voxels)
    found = everyone.where(_often(everyone.patients, everyone.kinds))
    if not len(found.values):
        return None
    fitted, kept = fit_temperatures(found), set(map(str, found.kinds))
    some = [answer for answer in voxels if answer.kind in kept]
    return {
        "patients": len(set(found.patients)),
        "common": round(fitted.common, 4),
        "of": {kind: round(value, 4) for kind, value in fitted.of.items()},
        "left_out": _read(reading(some, found, regions, each_left_out(found))),
    }


def _read(read: Reading) -> dict[str, Any]:
    """How the temperatures did on patients whom they had not seen."""
    before, after = np.array(list(read.losses.values())).T
    regions = {
        region: {
            "error": [round(calibration_error(some), 5) for some in read.tallies[region]],
            "error_where_doubtful": [round(calibration_error(some), 5) for some in read.doubtful[region]],
            "bins": [[[round(float(x), 1) for x in row] for row in some] for some in read.doubtful[region]],
        }
        for region in read.tallies
    }
    loss = [round(float(before.mean()), 5), round(float(after.mean()), 5)]
    return {"loss": loss, "lowered": _mean(before - after), "regions": regions}


def calibrate(scores: Sequence[Score]) -> dict[str, Any]:
    """{region: the fit, its reach, and how it did on patients left out}, of regions with enough patients.

    scores: the rows of a subsets.csv. Empty masks are left out: they have no soft Dice.
    """
    table, found = _table(scores), {}
    for region in dict.fromkeys(row.region for row in scores):
        rows = _enough(_rows(region, table))
        if len(rows.truth):
            found[region] = _calibrated(rows)
    return found


Table = Mapping[tuple[str, str, str, str], Mapping[str, float]]


def _table(scores: Sequence[Score]) -> Table:
    """{(region, patient, case, combination): {metric: value}}."""
    table: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in scores:
        table.setdefault((row.region, row.patient, row.case, row.subset), {})[row.metric] = row.value
    return table


def _rows(region: str, table: Table) -> Rows:
    kept = [
        (patient, subset, [values.get(name, np.nan) for name in FEATURES], values["dice"])
        for (where, patient, _, subset), values in table.items()
        if where == region and np.isfinite(values.get("soft_dice", np.nan)) and np.isfinite(values["dice"])
    ]
    patients, kinds, features, truth = zip(*kept, strict=True) if kept else ((), (), (), ())
    shaped = np.array(features, dtype=np.float64).reshape(len(kept), len(FEATURES))
    return Rows(np.array(patients, dtype=str), np.array(kinds, dtype=str), shaped, np.array(truth, dtype=np.float64))


def _enough(rows: Rows) -> Rows:
    """The rows of combinations that enough patients were segmented from."""
    return rows.where(_often(rows.patients, rows.kinds))


def _often(patients: NDArray[Any], kinds: NDArray[Any]) -> NDArray[np.bool_]:
    counts = {kind: len(set(patients[kinds == kind])) for kind in set(kinds)}
    return np.array([counts[kind] >= LEAST_PATIENTS for kind in kinds], dtype=bool)


def _calibrated(rows: Rows) -> dict[str, Any]:
    fitted, reach = conformal(rows, LEVEL)
    return {
        "patients": len(set(rows.patients)),
        "masks": len(rows.truth),
        **asdict(fitted),
        "centre": list(fitted.centre),
        "slopes": list(fitted.slopes),
        "reach": reach,
        "features": list(FEATURES),
        "left_out": _left_out(rows),
    }


def _left_out(rows: Rows) -> dict[str, Any]:
    """How the intervals and lights did on patients whom nothing in them had seen."""
    guess = round(float(np.abs(rows.truth - others_mean(rows)).mean()), 4)
    return {**_held(rows, *tried(rows, LEVEL)), "mean_error_of_the_combinations_mean": guess}


def _held(rows: Rows, middle: NDArray[np.float64], reach: NDArray[np.float64]) -> dict[str, Any]:
    """How often the truth was in its interval, how wide that was, and what the lights were worth."""
    predicted, low, high = _within(middle, reach)
    held = (low <= rows.truth) & (rows.truth <= high)
    lights = np.array([light(*numbers) for numbers in zip(predicted, low, strict=True)])
    return {
        "coverage": _mean([held[rows.patients == name].mean() for name in sorted(set(rows.patients))]),
        "outside": {"better": int((rows.truth > high).sum()), "worse": int((rows.truth < low).sum())},
        "width": round(float((high - low).mean()), 4),
        "mean_error": round(float(np.abs(rows.truth - predicted).mean()), 4),
        "lights": {
            name: {"masks": int((lights == name).sum()), "good": int((rows.truth[lights == name] >= GOOD_DICE).sum())}
            for name in LIGHTS
        },
    }


def _mean(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """A mean over patients with its bootstrap interval."""
    found = asdict(bootstrap_interval(values))
    return {key: round(found[key], 4) for key in ("mean", "low", "high")}


def held_elsewhere(confidence: Confidence, scores: Sequence[Score]) -> dict[str, Any]:
    """{region: how its intervals and lights did} on patients to whom nothing was fitted; scores: of a subsets.csv."""
    table, found = _table(scores), {}
    for region, (fitted, reach) in confidence.fits.items():
        rows = _rows(region, table)
        rows = rows.where(np.isin(rows.kinds, list(fitted.spreads)))
        if len(rows.truth):
            guess = fitted.predict(rows.features, rows.kinds), reach * fitted.spread(rows.kinds)
            found[region] = {"masks": len(rows.truth), **_held(rows, *guess)}
    return found


# ---- about one mask ----------------------------------------------------------------------------------------------

LIGHTS = ("green", "amber", "red")
NOTHING = dict.fromkeys(("dice", "low", "high", "light"))


def light(predicted: float, low: float) -> str:
    """green: the whole interval is at `GOOD_DICE` or above; red: the predicted Dice is below it; amber: in between.

    >>> light(0.9, 0.8), light(0.8, 0.6), light(0.6, 0.4)
    ('green', 'amber', 'red')
    """
    return "green" if low >= GOOD_DICE else "amber" if predicted >= GOOD_DICE else "red"


@dataclass(frozen=True)
class Confidence:
    """What confidence.json says: fits and reaches of regions, and on how many patients they stand.

    temperatures: {combination: T}
    failed:       {region: {whom: the share of masks in their interval}}, of patients for whom it was too small
    """

    measured_on: str
    patients: int
    level: float
    fits: Mapping[str, tuple[Fit, float]]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def about(self, witnesses: Witnesses, used: str, clean: bool) -> dict[str, Any]:
        """For a JSON: {measured_on, patients, level, regions: {region: dice, low, high, light, agreement, soft_dice}}.

        Where nothing can be said of a region, dice, low, high and light are None, and ``why`` says why. ``failed`` says
        of whom the interval did not hold.
        """
        evidence = witnesses.about(used)
        regions = {}
        for region in witnesses.scheme.regions:
            name = region + CLEANED if clean and region + CLEANED in evidence else region
            regions[region] = {**self._verdict(name, used, evidence[name]), "failed": dict(self.failed.get(name, {}))}
        return {"measured_on": self.measured_on, "patients": self.patients, "level": self.level, "regions": regions}

    def _verdict(self, region: str, used: str, evidence: Evidence) -> dict[str, Any]:
        seen = {name: _number(getattr(evidence, name)) for name in FEATURES}
        if not evidence.volume_ml:
            return {**NOTHING, **seen, "why": "the mask is empty on the model's grid, so it has no soft Dice"}
        fitted, reach = self.fits.get(region, (None, np.nan))
        if fitted is None or used not in fitted.spreads:
            return {**NOTHING, **seen, "why": f"fewer than {LEAST_PATIENTS} held-out patients had it from {used}"}
        features = np.array([[getattr(evidence, name) for name in FEATURES]])
        middle = fitted.predict(features, [used])
        predicted, low, high = (float(x[0]) for x in _within(middle, reach * fitted.spread([used])))
        predicted, low, high = (round(number, 4) for number in (predicted, low, high))  # as told, so as judged
        return {"dice": predicted, "low": low, "high": high, "light": light(predicted, low), **seen, "why": None}


def confidence_text(found: Mapping[str, Any]) -> list[str]:
    """What `Confidence.about` says, a line for the patients it stands on and a line a region."""
    of_ten = f"{10 * found['level']:.0f} of 10"
    lines = [f"this mask, predicted Dice in %, {of_ten} between the ends ({found['patients']} patients measured):"]
    for region, row in found["regions"].items():
        if row["why"] is not None:
            lines.append(f"  {region:3} nothing can be said: {row['why']}")
            continue
        middle, low, high = (percent(row[key]) for key in ("dice", "low", "high"))
        agree = "" if row["agreement"] is None else f"; subsets agree to {100 * row['agreement']:.0f}"
        lines.append(f"  {region:3} {row['light']}: {middle} [{low}, {high}]{agree}")
    return [*lines, *(f"  known to fail: {sentence}" for sentence in broken_promises(found))]


def broken_promises(found: Mapping[str, Any]) -> list[str]:
    """Where intervals are known to have held less often than they promise, a sentence a region.

    found: what `Confidence.about` says

    >>> row = {"why": None, "failed": {"8 patients of elsewhere": 0.625}}
    >>> broken_promises({"level": 0.8, "regions": {"TC": row}})
    ['of the TC masks of 8 patients of elsewhere, 62 % lay between the ends, not 80 %']
    """
    return [
        f"of the {region} masks of {whom}, {100 * share:.0f} % lay between the ends, not {100 * found['level']:.0f} %"
        for region, row in found["regions"].items()
        if row["why"] is None
        for whom, share in row.get("failed", {}).items()
    ]


def write_table(file: Path, records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """qc.csv: a row a case and region of the JSONs beside masks that say something of it; returns {light: rows}.

    No file is written, and one that is there goes, where no JSON does.
    """
    text, counts = io.StringIO(), Counter[str]()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "region", "light", "dice", "low", "high", *FEATURES, "volume_ml", "sequences"])
    for record in records:
        for region, row in ((record.get("confidence") or {}).get("regions") or {}).items():
            numbers = [row[key] for key in ("light", "dice", "low", "high", *FEATURES)]
            used = "+".join(record["sequences"]["used"])
            writer.writerow([record["case"], region, *numbers, record["volumes_ml"][region], used])
            counts[row["light"] or "unknown"] += 1
    if counts:
        write_text(file, text.getvalue())
    else:
        file.unlink(missing_ok=True)
    return {name: counts[name] for name in (*LIGHTS, "unknown") if counts[name]}


def read_confidence(model: ModelFolder) -> Confidence | None:
    """The confidence.json of a model's folder; None where there is none, or it was fitted to other weights.

    Raises CheckpointError where it cannot be read.
    """
    file = model.path / CONFIDENCE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["weights_sha256"] != model.weights_sha256:
            return None
        measured = found["measured"]
        fits = {region: (_fit(values), float(values["reach"])) for region, values in found["regions"].items()}
        level, cooled = float(found["level"]), found.get("temperature") or {"of": {}}
        about = measured["evaluated"], int(measured["patients"]), level
        return Confidence(*about, fits, cooled["of"], _failed(found.get("elsewhere", {}), level))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); run `medmap evaluate` again, or delete it") from error


def _failed(elsewhere: Mapping[str, Any], level: float) -> dict[str, dict[str, float]]:
    """{region: {whom: share}} of those in whom less than was promised held, by more than which patients they were."""
    failed: dict[str, dict[str, float]] = {}
    for whom, told in elsewhere.items():
        for region, values in told["regions"].items():
            high = values["coverage"]["high"]  # None for patients too few for an interval
            if high is not None and high < level:
                failed.setdefault(region, {})[whom] = values["coverage"]["mean"]
    return failed


def write_elsewhere(model: ModelFolder, folders: Sequence[Path]) -> dict[str, Any]:
    """Put into a model's confidence.json how it did on patients to whom nothing was fitted; returns {whom: how}.

    folders: what `medmap evaluate RUN --data PATIENTS` wrote, one for each collection of patients

    Raises InputError where the model has no confidence.json.
    """
    confidence = read_confidence(model)
    if confidence is None:
        raise InputError(f"{model.path}: has no {CONFIDENCE} of these weights; run `medmap evaluate` on patients first")
    found = {}
    for folder in folders:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        whom = f"{summary['patients']} patients of {folder.name.removeprefix('on-')}"
        found[whom] = {"regions": held_elsewhere(confidence, read_scores(folder / TABLE))}
        found[whom] |= {"temperature": _tempered_elsewhere(confidence, model, folder)}
    file = model.path / CONFIDENCE
    whole = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps(without_nan({**whole, "elsewhere": found}), indent=1, ensure_ascii=False) + "\n")
    return found


def _tempered_elsewhere(confidence: Confidence, model: ModelFolder, folder: Path) -> dict[str, Any] | None:
    known = confidence.temperatures
    voxels = read_voxels(folder / VOXELS) if (folder / VOXELS).is_file() else []
    voxels = [answer for answer in voxels if answer.kind in known]
    if not voxels:
        return None
    everyone = {answer.patient for answer in voxels}, Temperatures(1.0, known)
    return _read(reading(voxels, losses(voxels), _members(model), [everyone]))


def _members(model: ModelFolder) -> dict[str, tuple[int, ...]]:
    """{region: its classes}."""
    return {region: tuple(model.scheme.members(region)) for region in model.scheme.regions}


def _fit(values: Mapping[str, Any]) -> Fit:
    if values["features"] != list(FEATURES):
        raise ValueError(f"features {values['features']}, expected {list(FEATURES)}")
    return Fit(
        values["intercept"], tuple(values["centre"]), tuple(values["slopes"]), values["deviations"], values["spreads"]
    )


def _within(predicted: NDArray[np.float64], reach: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """ŷ and the interval's ends, which no Dice passes."""
    middle = predicted.clip(0, 1)
    return middle, (predicted - reach).clip(0, 1), (predicted + reach).clip(0, 1)


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
