"""A run folder as training and evaluation leave it, with made-up numbers: for the tests of figures and reports."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.config import parse_config
from medmap.core.modality import ModalitySet

GLIOMA = ("t1n", "t1c", "t2w", "t2f")
REGIONS = ("WT", "TC", "ET")
METRICS = ("dice", "hd95_mm", "nsd", "volume_error_ml", "lesion_dice", "lesion_hd95_mm", "lesion_f1")


def build_run(run: Path, modalities: Sequence[str] = GLIOMA, patients: int = 12, seed: int = 0) -> Path:
    """Everything a run can hold. What a test wants absent, it deletes."""
    run.mkdir(parents=True)
    config: dict[str, Any] = {"name": "pstar-x5", "seed": 1, "data": {"store": "stores/made-up", "folds": 3}}
    tree = {**config, "align": {"anchor": "pstar", "levels": ["x5"]}, "model": {"name": "unet", "size": "base"}}
    (run / "config.yaml").write_text(parse_config(tree).to_yaml(), encoding="utf-8")
    cases = [f"Case-{index:05d}" for index in range(patients)]
    write_json(run / "env.json", environment())
    write_json(run / "splits.json", split(cases))
    write_log(run / "log.jsonl", log_records(modalities, seed=seed))
    write_evaluation(run, modalities, cases, seed)
    np.savez(run / "latents.npz", **latents(modalities, cases, seed))
    np.savez(run / "examples.npz", **examples(modalities, seed))
    return run


def build_folds(run: Path, folds: int = 3) -> Path:
    """A folder of fold runs with the pooled evaluation on top."""
    run.mkdir(parents=True)
    for fold in range(folds):
        build_run(run / f"fold{fold}", patients=4, seed=fold)
    write_evaluation(run, GLIOMA, [f"Case-{index:05d}" for index in range(4 * folds)], 0)
    return run


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def environment() -> dict[str, Any]:
    return {
        "medmap": "0.1.0",
        "python": "3.11.9",
        "torch": "2.13.0",
        "platform": "Linux x86_64",
        "device": "cpu",
        "threads": 2,
        "started": "2026-01-02T03:04:05",
    }


def split(test: Sequence[str]) -> dict[str, Any]:
    lists = {"train": [f"Case-1{i:04d}" for i in range(16)], "val": ["Case-20000", "Case-20001"], "test": list(test)}
    digest = hashlib.sha256(json.dumps(lists, sort_keys=True).encode()).hexdigest()
    return {"name": "kfold 3, seed 0, fold 0", "sha256": digest, **lists}


def log_records(modalities: Sequence[str] = GLIOMA, steps: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Training records every 10 steps, validation every 250."""
    rng = np.random.default_rng(seed)
    start = rng.normal(0, 0.025, len(modalities))
    records: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        dice_ce = 0.35 + 1.2 * np.exp(-step / 350) + rng.normal(0, 0.05)
        align = 0.3 * np.exp(-step / 500)
        weights = 1 / len(modalities) + (start - start.mean()) * np.exp(-step / 600)
        record = {"kind": "train", "step": step, "loss": float(dice_ce + 0.1 * align), "lr": 1e-3, "grad_norm": 1.0}
        record["terms"] = {"dice_ce": float(dice_ce), "align/x5": float(align)}
        record["weights"] = {"x5": dict(zip(modalities, weights.tolist(), strict=True))}
        record["seconds"] = 0.31 * step
        records.append(record)
        if step % 250 == 0 or step == steps:
            mean = 0.66 * (1 - np.exp(-step / 500)) + rng.normal(0, 0.012)
            subsets = {"t1n": {"WT": 0.5, "TC": 0.4, "ET": None}}
            val = {"kind": "val", "step": step, "mean": float(mean), "full": float(mean + 0.1), "subsets": subsets}
            if len(modalities) > 1:
                val |= {"missing": float(mean), "cost": 0.1}
            sd, rank = 0.4 + 0.1 * np.exp(-step / 300), 8 + 30 * np.exp(-step / 300)
            spread = {"std": float(sd), "std_min": float(0.7 * sd), "rank": float(rank)}
            val["latents"] = {"x5": {"gap": float(0.4 + 0.5 * np.exp(-step / 400)), "chance": 0.2, **spread}}
            records.append(val)
    return records


def write_log(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


_WORTH = {"WT": (0.02, 0.03, 0.12, 0.22), "TC": (0.04, 0.30, 0.07, 0.05), "ET": (0.03, 0.48, 0.02, 0.02)}
_FLOOR = {"WT": 0.62, "TC": 0.40, "ET": 0.15}


def expected_dice(subset: ModalitySet, modalities: ModalitySet, region: str) -> float:
    """Sequences help as they do in glioma: FLAIR finds the oedema, contrast agent the core."""
    worth = dict(zip(modalities.names, (*_WORTH[region], 0.05, 0.05, 0.05, 0.05), strict=False))
    missing = sum(worth[name] for name in modalities if name not in subset)
    full = min(_FLOOR[region] + sum(worth.values()), 0.92)
    return float(np.clip(full - missing, 0.05, 0.95))


def write_evaluation(run: Path, modalities: Sequence[str], cases: Sequence[str], seed: int = 0) -> None:
    """subsets.csv and summary.json that agree with each other."""
    rng = np.random.default_rng(seed)
    every, tidy = ModalitySet(tuple(modalities)), []
    easiness = rng.normal(0, 0.07, len(cases))
    for subset in every.subsets():
        for region in (*REGIONS, "ET-pp"):
            dice = expected_dice(subset, every, region.removesuffix("-pp")) + easiness + rng.normal(0, 0.05, len(cases))
            for case, value in zip(cases, np.clip(dice, 0, 0.98), strict=True):
                for metric, number in zip(METRICS, _metrics(float(value)), strict=True):
                    tidy.append((case, case, str(subset), region, metric, number))
    with (run / "subsets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "patient", "subset", "region", "metric", "value"))
        writer.writerows(tidy)
    write_json(run / "summary.json", summary_of(tidy, every, len(cases)))


def _metrics(dice: float) -> tuple[float, ...]:
    return (dice, 60 * (1 - dice), min(1.0, dice + 0.05), 40 * (1 - dice), dice - 0.08, 110 * (1 - dice), dice - 0.03)


def made_up_summary(modalities: Sequence[str] = GLIOMA, regions: Sequence[str] = REGIONS) -> dict[str, Any]:
    """A summary alone, for any names of modalities and regions."""
    rng, every, tidy = np.random.default_rng(0), ModalitySet(tuple(modalities)), []
    for subset in every.subsets():
        for region in regions:
            for index, value in enumerate(rng.uniform(0.3, 0.9, 5)):
                for metric, number in zip(METRICS, _metrics(float(value)), strict=True):
                    tidy.append((f"case{index}", f"case{index}", str(subset), region, metric, number))
    return summary_of(tidy, every, 5, regions)


def summary_of(
    tidy: Sequence[tuple[Any, ...]], every: ModalitySet, n: int, regions: Sequence[str] = REGIONS
) -> dict[str, Any]:
    values: dict[tuple[str, str, str], list[float]] = {}
    for _, _, subset, region, metric, value in tidy:
        values.setdefault((subset, region, metric), []).append(value)
    rows = [{"subset": s, "region": r, "metric": m, **_interval(v)} for (s, r, m), v in values.items()]
    families = {"all subsets": lambda s: True}
    if "t1c" in every:
        families["with t1c"] = lambda s: "t1c" in s
    if "t1c" in every and len(every) > 1:
        families["without t1c"] = lambda s: "t1c" not in s
    groups = []
    for group, belongs in families.items():
        for region in dict.fromkeys(row["region"] for row in rows):
            pooled = [values[s, r, m] for s, r, m in values if r == region and m == "dice" and belongs(s.split("+"))]
            groups.append({"group": group, "region": region, "metric": "dice", **_interval(np.mean(pooled, 0))})
    present = [{**row, "n": n - 1} for row in [*rows, *groups] if row["region"] != "ET-pp"]
    return {
        "evaluated": f"fold 0 of 3, {n} patients",
        "cases": n,
        "patients": n,
        "convention": "brats",
        "store": {"name": "made-up", "spacing_mm": [2.0, 2.0, 2.0]},
        "modalities": list(every.names),
        "regions": list(regions),
        "rows": rows,
        "groups": groups,
        "present": present,
    }


def _interval(values: Sequence[float] | NDArray[Any]) -> dict[str, Any]:
    array = np.asarray(values, float)
    half = 1.96 * array.std() / np.sqrt(array.size)
    mean = float(array.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": array.size, "median": float(np.median(array))}


def latents(modalities: Sequence[str], cases: Sequence[str], seed: int = 0, channels: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    patient = rng.normal(0, 1, (len(cases), channels))
    offset = rng.normal(0, 1, (len(modalities), channels))
    before, after, modality, case = [], [], [], []
    for j, name in enumerate(modalities):
        for i, identity in enumerate(cases):
            before.append(0.4 * patient[i] + 2.0 * offset[j] + rng.normal(0, 0.2, channels))
            after.append(patient[i] + 0.25 * offset[j] + rng.normal(0, 0.3, channels))
            modality.append(name)
            case.append(identity)
    return {
        "before": np.array(before, np.float32),
        "after": np.array(after, np.float32),
        "modality": np.array(modality),
        "case": np.array(case),
        "level": np.array(["x5"]),
    }


def examples(modalities: Sequence[str] = GLIOMA, seed: int = 0, count: int = 3) -> dict[str, Any]:
    """Egg-shaped heads with a blob: classes 1 (core), 2 (oedema), 3 (enhancing)."""
    rng, (width, height) = np.random.default_rng(seed), (90, 110)
    x, y = np.meshgrid(np.arange(width), np.arange(height), indexing="ij")
    brain = ((x - 45) / 36) ** 2 + ((y - 55) / 46) ** 2 < 1
    subsets = list(dict.fromkeys(["+".join(modalities), "+".join(modalities[-2:]), modalities[-1], modalities[0]]))
    images, truth, predictions = [], [], []
    for _ in range(count):
        centre = (rng.uniform(30, 60), rng.uniform(35, 75))
        reach = np.hypot(x - centre[0], (y - centre[1]) / 1.2) + 1.5 * np.sin(x / 4) + 1.5 * np.cos(y / 3)
        truth.append(_blob(reach, 1.0) * brain)
        folds = np.sin(x / 5 + 3 * np.sin(y / 9)) * np.cos(y / 6)
        tissue = [0.3 * folds + rng.normal(0, 0.15, x.shape) for _ in modalities]
        bright = [np.isin(truth[-1], (1, 2, 3)) if name != "t1c" else truth[-1] == 3 for name in modalities]
        images.append([brain * (t + 1.6 * b + 0.01) for t, b in zip(tissue, bright, strict=True)])
        scales = rng.normal(1, [0.04 + 0.09 * s for s in range(len(subsets))])
        predictions.append([_blob(reach, scale, core=s < 2) * brain for s, scale in enumerate(scales)])
    return {
        "images": np.array(images, np.float32),
        "modalities": np.array(modalities),
        "cases": np.array([f"Case-{index:05d}" for index in range(count)]),
        "truth": np.array(truth, np.uint8),
        "subsets": np.array(subsets),
        "predictions": np.array(predictions, np.uint8),
        "spacing_mm": np.array([2.0, 2.0]),
        "dice": rng.uniform(0.4, 0.95, (count, len(subsets), 3)).astype(np.float32),
    }


def _blob(reach: NDArray[Any], scale: float, core: bool = True) -> NDArray[np.uint8]:
    classes = np.where(reach < 17 * scale, 2, 0)
    if core:
        classes = np.where(reach < 11 * scale, 3, classes)
        classes = np.where(reach < 6 * scale, 1, classes)
    return classes.astype(np.uint8)
