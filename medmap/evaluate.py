"""Subsets × patients: every subset of the sequences that each patient has, scored against the truth.

Every sequence of a patient is encoded once; each subset is decoded from these latents (`medmap.inference`). What
becomes of the numbers: `medmap.scores`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.labels import LabelScheme
from medmap.core.metrics import convention_named
from medmap.core.modality import ModalitySet
from medmap.data.store import Store
from medmap.errors import CheckpointError, InputError
from medmap.inference import SubsetAnswer
from medmap.predict import Predictor, answerable
from medmap.run import ENV, SPLITS, find_runs, read_run
from medmap.scores import Progress, Score, score_classes, write_scores

SAME_SPACING_MM = 0.01


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
        for answer in predictor.answers(prepared, answerable(predictor.networks, prepared.images)):
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
    if environment["store"] is None:
        raise CheckpointError(f"{run}: was trained on phantoms simulated as it went; name patients with --data")
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy the run again, with all its files") from error
    return content
